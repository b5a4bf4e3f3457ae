"""What all stages share: reading what is broken, counts that add up, restarts, tasks, recipes."""

import gzip
import json
import os
import random
import subprocess
import sys
from pathlib import Path

import pytest
import zstandard
from stages import hashes, manifest, read, run_stage, texts, write

from data_prep.frame import shards
from data_prep.frame.chance import unit
from data_prep.frame.config import read_config
from data_prep.frame.records import Broken, JsonlWriter, partial_name, read_documents
from data_prep.frame.shards import _share, _task, find_shards
from data_prep.frame.tally import Flow, Tally
from data_prep.stages.clean import CleanConfig
from llmrecipes.cli import main
from llmrecipes.errors import UserError

GOOD = "今日は朝から雨が降っていたので、家で本を読んで過ごすことにした。夕方には晴れて、虹が見えた。"
RECIPES = Path(__file__).parents[2] / "recipes" / "data"


def sentences(count, seed=0):
    """Different Japanese sentences that every rule keeps."""
    draw = random.Random(seed)
    who, where, what = (
        ("父", "妹", "先生", "友人", "駅員"),
        ("公園", "図書館", "海岸", "市場"),
        ("本", "絵", "花", "地図"),
    )
    return [
        f"{draw.choice(who)}は{draw.choice(where)}で{draw.choice(what)}を{draw.randrange(10**6)}回も探したそうだ。"
        f"それから{draw.choice(where)}へ行き、{draw.choice(who)}に{draw.choice(what)}を渡した。"
        for _ in range(count)
    ]


def broken_lines():
    return {
        "not_json": b'{"text": "cut off',
        "invalid_utf8": b'{"text": "\xff\xfe abc"}',
        "not_an_object": b'["text"]',
        "no_text_field": b'{"body": "x"}',
        "text_is_no_string": b'{"text": 5}',
        "empty": b'{"text": " \\n "}',
        "too_large": b'{"text": "' + b"a" * 3_000_000 + b'"}',
    }


def test_broken_lines_are_counted_and_named(tmp_path, capsys):
    lone, deep = b'{"text": "\\ud800"}', b'{"text": "x", "y": ' + b"[" * 100_000 + b"}"
    lines = [GOOD, *broken_lines().values(), lone, deep, b"", GOOD + "また"]
    write(tmp_path / "in" / "a.jsonl", lines)
    write(tmp_path / "in" / "none.jsonl", [])
    run_stage("clean", input=[str(tmp_path / "in")], output=tmp_path / "out", max_document_mb=1)
    found = manifest(tmp_path / "out")
    for reason in broken_lines():
        assert found["rejected"][reason]["documents"] == 1 + (reason in ("not_json", "invalid_utf8")), reason
    assert found["read"]["documents"] == 11 and found["kept"]["documents"] == 2  # the blank line is no document
    assert found["num_problems"] == 8  # all but the empty document
    shown = capsys.readouterr().out
    assert "a.jsonl:2: not JSON" in shown and "a.jsonl:8: 3.0 MB in a line; max_document_mb is 1" in shown
    assert read(tmp_path / "out" / "none.jsonl.zst") == []


@pytest.mark.parametrize("ending", ["gz", "zst"])
def test_a_broken_archive_gives_what_can_be_read(tmp_path, ending):
    lines = sentences(30_000)
    batches = ["".join(lines[i : i + 15]) for i in range(0, len(lines), 15)]
    data = "".join(json.dumps({"text": text}) + "\n" for text in batches).encode()
    packed = gzip.compress(data) if ending == "gz" else zstandard.ZstdCompressor().compress(data)
    path = tmp_path / f"a.jsonl.{ending}"
    path.write_bytes(packed[: len(packed) // 2])
    found = list(read_documents(path, "text", 1e9))
    assert isinstance(found[-1], Broken) and found[-1].reason == "broken_archive"
    if ending == "gz":
        assert sum(not isinstance(entry, Broken) for entry in found) > 100
    run_stage("clean", input=[str(path)], output=tmp_path / "out")
    assert manifest(tmp_path / "out")["rejected"]["broken_archive"]["documents"] == 1


def test_a_large_document_passes_or_is_skipped(tmp_path):
    text = "".join(f"{line}{number}\n" for number, line in enumerate(sentences(200_000)))
    write(tmp_path / "a.jsonl", [text, GOOD])
    assert (tmp_path / "a.jsonl").stat().st_size > 20_000_000
    found = list(read_documents(tmp_path / "a.jsonl", "text", 1e9))
    assert [entry.text for entry in found] == [text, GOOD]
    skipped, kept = read_documents(tmp_path / "a.jsonl", "text", 1e6)
    assert skipped.reason == "too_large" and skipped.num_bytes > 20_000_000 and kept.text == GOOD


@pytest.mark.parametrize("format", ["zst", "gz", "plain"])
def test_written_lines_are_the_same_bytes_and_whole_or_absent(tmp_path, format):
    for name in ("a", "b"):
        with JsonlWriter(tmp_path / name, format) as writer:
            writer.write({"text": "日本", "bad": "\ud800"})
    assert (tmp_path / "a").read_bytes() == (tmp_path / "b").read_bytes()
    with pytest.raises(RuntimeError), JsonlWriter(tmp_path / "c", format) as writer:
        writer.write({"text": "x"})
        raise RuntimeError
    assert sorted(path.name for path in tmp_path.iterdir()) == ["a", "b"]


def test_fields_of_a_record_survive(tmp_path):
    write(tmp_path / "a.jsonl", [{"id": 7, "body": GOOD + "\n\n\n\n", "licence": "CC0", "meta": {"x": [1, None]}}])
    run_stage("clean", input=[str(tmp_path / "a.jsonl")], output=tmp_path / "out", field="body")
    assert read(tmp_path / "out") == [{"id": 7, "body": GOOD, "licence": "CC0", "meta": {"x": [1, None]}}]


def test_order_and_sharding_change_nothing(tmp_path):
    """The web line goes or stays by its document's hash: in one file, in ten, forwards and backwards, in processes."""
    documents = [f"{text}\n続きを読む\n{text[::-1]}。" for text in sentences(300)]
    write(tmp_path / "one" / "a.jsonl", documents)
    for part in range(10):
        write(tmp_path / "ten" / f"{part}.jsonl", documents[part::10][::-1])
    kept = {}
    for name, workers in (("one", 1), ("ten", 2)):
        run_stage(
            "clean", input=[str(tmp_path / name)], output=tmp_path / f"{name}-out", web_lines=0.5, workers=workers
        )
        kept[name] = sorted(texts(tmp_path / f"{name}-out"))
        counts = manifest(tmp_path / f"{name}-out")
        kept[name + "-counts"] = {key: counts[key] for key in ("read", "kept", "rejected", "trimmed", "samples")}
    assert kept["one"] == kept["ten"] and kept["one-counts"] == kept["ten-counts"]
    with_line = sum("続きを読む" in text for text in kept["one"])
    assert 110 < with_line < 190  # half of 300, by chance that is no chance
    run_stage("clean", input=[str(tmp_path / "one")], output=tmp_path / "other", web_lines=0.5, seed=1)
    assert sorted(texts(tmp_path / "other")) != kept["one"]


KILLED = """
import os, sys
from data_prep.frame.config import read_config
from data_prep.frame import map as frame
from data_prep.stages import clean
settle, seen = frame._settle, []
def dying(document, *rest):
    settle(document, *rest)
    seen.append(document)
    if len(seen) == int(sys.argv[1]):
        os.kill(os.getpid(), 9)
frame._settle = dying
clean.clean(read_config(clean.CleanConfig, sys.argv[2:]))
"""


def test_killed_anywhere_and_restarted_gives_the_same_bytes(tmp_path):
    for part in range(4):
        write(tmp_path / "in" / f"{part}.jsonl", [*sentences(50, part), "短い"])
    run_stage("clean", input=[str(tmp_path / "in")], output=tmp_path / "whole")
    words = [f"--input={json.dumps([str(tmp_path / 'in')])}", f"--output={tmp_path / 'killed'}"]
    for place in (10, 51, 60):
        ended = subprocess.run([sys.executable, "-c", KILLED, str(place), *words], capture_output=True, check=False)
        assert ended.returncode == -9, ended.stderr
        assert not (tmp_path / "killed" / "manifest.json").exists()
    run_stage("clean", input=[str(tmp_path / "in")], output=tmp_path / "killed")
    assert hashes(tmp_path / "killed") == hashes(tmp_path / "whole")
    assert len(hashes(tmp_path / "whole")) == 5


def test_a_killed_worker_is_named_and_a_restart_gives_the_same_bytes(tmp_path):
    from killing import make

    from data_prep.frame.map import run_map

    for part in range(4):
        write(tmp_path / "in" / f"{part}.jsonl", sentences(50, part))

    def config(output):
        words = ["--input", str(tmp_path / "in"), "--output", str(tmp_path / output), "--workers", "2"]
        return read_config(CleanConfig, words)

    (tmp_path / "whole.died").touch()
    run_map("test", config("whole"), make)
    with pytest.raises(
        UserError, match="a worker process died, perhaps for want of memory; run the same command again"
    ):
        run_map("test", config("killed"), make)
    assert not (tmp_path / "killed" / "manifest.json").exists()
    run_map("test", config("killed"), make)
    assert hashes(tmp_path / "killed") == hashes(tmp_path / "whole")


def test_tasks_of_an_array_do_together_what_one_does(tmp_path, monkeypatch, capsys):
    for part in range(5):
        write(tmp_path / "in" / f"{part}.jsonl", sentences(20 + part, part))
    run_stage("clean", input=[str(tmp_path / "in")], output=tmp_path / "whole")
    run_stage("clean", input=[str(tmp_path / "in")], output=tmp_path / "array", task="0/3")
    assert "3 of 5 files belong to other tasks" in capsys.readouterr().out
    assert not (tmp_path / "array" / "manifest.json").exists()
    monkeypatch.setenv("SLURM_ARRAY_TASK_COUNT", "3")
    monkeypatch.setenv("SLURM_ARRAY_TASK_MIN", "1")
    for number in (2, 3):
        monkeypatch.setenv("SLURM_ARRAY_TASK_ID", str(number))
        run_stage("clean", input=[str(tmp_path / "in")], output=tmp_path / "array")
    assert hashes(tmp_path / "array") == hashes(tmp_path / "whole")


def test_tasks_that_begin_at_the_same_moment(tmp_path, monkeypatch):
    """One has made the folder of marks and not the mark when the other looks."""
    write(tmp_path / "in" / "a.jsonl", [GOOD])
    real, looked = shards.write_json, []

    def write_json(path, value):
        if path.name == "job.json" and not looked:
            path.parent.mkdir(parents=True)
            partial_name(path).touch()
            looked.append(path)
            run_stage("clean", input=[str(tmp_path / "in")], output=tmp_path / "out", task="1/2")
        real(path, value)

    monkeypatch.setattr(shards, "write_json", write_json)
    run_stage("clean", input=[str(tmp_path / "in")], output=tmp_path / "out", task="0/2")
    assert looked and texts(tmp_path / "out") == [GOOD]


def test_shares_of_tasks_are_disjoint_and_complete(tmp_path):
    for part in range(11):
        write(tmp_path / f"{part}.jsonl", ["x" * part])
    shards = find_shards([str(tmp_path)])
    for count in (1, 2, 3, 11, 20):
        names = [shard.name for number in range(count) for shard in _share(shards, (number, count))]
        assert sorted(names) == sorted(shard.name for shard in shards) and len(names) == 11
    for wrong in ("3/3", "a/2", "1", "-1/2", "1/0"):
        with pytest.raises(UserError, match="is not i/N"):
            _task(wrong)


def test_a_changed_input_is_done_again_and_a_changed_recipe_refused(tmp_path, capsys):
    write(tmp_path / "in" / "a.jsonl", sentences(5))
    write(tmp_path / "in" / "b.jsonl", sentences(6, 1))
    run_stage("clean", input=[str(tmp_path / "in")], output=tmp_path / "out")
    write(tmp_path / "in" / "b.jsonl", sentences(7, 2))
    run_stage("clean", input=[str(tmp_path / "in")], output=tmp_path / "out")
    assert "1 of 2 files are done already" in capsys.readouterr().out
    assert manifest(tmp_path / "out")["kept"]["documents"] == 12
    with pytest.raises(UserError, match="other values of min_characters; choose another output, or say --overwrite"):
        run_stage("clean", input=[str(tmp_path / "in")], output=tmp_path / "out", min_characters=20)
    run_stage("clean", input=[str(tmp_path / "in")], output=tmp_path / "out", min_characters=20, overwrite=True)


def test_inputs_and_outputs_that_make_no_sense(tmp_path):
    write(tmp_path / "x" / "a.jsonl", [GOOD])
    write(tmp_path / "x" / "a.jsonl.gz", [])
    write(tmp_path / "y" / "a.jsonl", [GOOD])
    (tmp_path / "empty").mkdir()
    with pytest.raises(UserError) as found:
        find_shards([str(tmp_path / "x" / "a.jsonl")] * 2 + [str(tmp_path / "no"), str(tmp_path / "empty")])
    assert len(found.value.problems) == 3
    with pytest.raises(UserError, match="both would become a; rename one"):
        find_shards([str(tmp_path / "x")])
    both = find_shards([str(tmp_path / "x" / "a.jsonl"), str(tmp_path / "y")])
    assert [shard.name for shard in both] == ["x/a", "y/a"]
    with pytest.raises(UserError, match="the results would go where the input"):
        run_stage("clean", input=[str(tmp_path / "y" / "a.jsonl")], output=tmp_path / "y")
    with pytest.raises(UserError, match="is not empty, and not made by this command"):
        run_stage("clean", input=[str(tmp_path / "y" / "a.jsonl")], output=tmp_path / "x")


def test_counts_that_do_not_add_up_are_our_bug():
    tally = Tally(read=Flow(2, 10, 10), kept=Flow(1, 5, 5))
    with pytest.raises(AssertionError):
        tally.check()
    tally.reject("why", Flow(1, 4, 4), "text", 3)
    with pytest.raises(AssertionError):
        tally.check()
    tally.trim("rule", 1)
    tally.check()
    both = Tally.from_json(json.loads(json.dumps(tally.to_json())))
    both.merge(tally, 3)
    both.check()
    assert both.samples["why"] == tally.samples["why"] and both.read.documents == 4


def test_mistakes_in_a_recipe_are_named_all_at_once_with_their_lines(tmp_path, capsys):
    recipe = tmp_path / "r.yaml"
    recipe.write_text("input: [a]\noutput: b\nlangauge: ja\nmin_share: half\nrepetition:\n  lines: x\n")
    assert main(["data", "clean", "--config", str(recipe), "--workers", "none"]) == 2
    shown = capsys.readouterr().err
    assert f"{recipe}:3: unknown key 'langauge': it is not an argument of clean - did you mean 'language'?" in shown
    assert f"{recipe}:4: min_share: expected a number" in shown and f"{recipe}:6: repetition.lines" in shown
    assert "command line: --workers" in shown and "Traceback" not in shown
    recipe.write_text("input: [a]\noutput: b\nlanguage: ja\ngopher: true\nworkers: 0\n")
    assert main(["data", "clean", "--config", str(recipe)]) == 2
    shown = capsys.readouterr().err
    assert f"{recipe}:4: gopher" in shown and f"{recipe}:5: workers" in shown
    assert main(["data", "noize"]) == 2 and main(["data", "noise"]) == 2 and main(["data", "tokenizer", "bild"]) == 2
    shown = capsys.readouterr().err
    assert "say what to do: train, evaluate, apply, export" in shown and "not 'bild'" in shown


def test_every_recipe_of_data_is_sound():
    from data_prep.commands import STAGES

    seen = 0
    for path in sorted(RECIPES.glob("*.yaml")):
        text = path.read_text()
        commands = [line for line in text.splitlines() if f"--config recipes/data/{path.name}" in line]
        assert commands and text.startswith("# Purpose"), f"{path}: the head of a recipe holds its command"
        for line in commands:
            words = line.partition("llmrecipes data ")[2].partition(" --")[0].split()
            stage = STAGES[" ".join(words)]
            kind = getattr(__import__(stage.module, fromlist=["_"]), stage.recipe)
            read_config(kind, ["--config", str(path)], files=False)
            seen += 1
    assert seen == 15


def test_numbers_typed_for_text_stay_text():
    config = read_config(CleanConfig, ["--input", "a", "b", "--output", "7", "--field", "1e3", "--min_share", "1"])
    assert (config.output, config.field, config.input, config.min_share) == ("7", "1e3", ["a", "b"], 1.0)


def test_chance_is_even_and_independent_by_purpose():
    values = [unit(f"document {i}") for i in range(4000)]
    others = [unit(f"document {i}", purpose="other") for i in range(4000)]
    assert abs(sum(values) / 4000 - 0.5) < 0.02
    assert abs(sum((a - 0.5) * (b - 0.5) for a, b in zip(values, others, strict=True)) / 4000) < 0.01


def test_leftovers_of_dead_processes_go(tmp_path):
    from data_prep.frame.records import remove_leftovers

    dead, living = (
        tmp_path / f".a.jsonl.{os.uname().nodename}.999999999.tmp",
        tmp_path / (f".a.jsonl.{os.uname().nodename}.{os.getpid()}.tmp"),
    )
    for path in (dead, living):
        path.write_text("x")
    remove_leftovers(tmp_path / "a.jsonl")
    assert not dead.exists() and living.exists()

"""Evaluation while a model trains, and beside it for each checkpoint once; the training does not notice."""

from __future__ import annotations

import json
import shutil

import pytest
import yaml
from helpers import cli, trajectory, write_recipe

from llmrecipes.evaluate.config import EvaluateConfig, TaskConfig
from llmrecipes.evaluate.each_checkpoint import evaluate_each
from llmrecipes.evaluate.report.along import along
from llmrecipes.evaluate.report.gather import read_runs
from llmrecipes.evaluate.store import step_of


@pytest.fixture(scope="module")
def place(tmp_path_factory):
    """A tokenizer of words with shards, questions in its words, and the recipe of an evaluation."""
    import numpy as np
    from tokenizers import Tokenizer, models, pre_tokenizers

    from llmrecipes.data import ShardWriter
    from llmrecipes.data.tokenizer import Tokenizer as FolderTokenizer

    folder = tmp_path_factory.mktemp("along")
    vocabulary = {"<unk>": 0, "<s>": 1, "</s>": 2} | {f"w{i}": i for i in range(3, 64)}
    tokenizer = Tokenizer(models.WordLevel(vocabulary, unk_token="<unk>"))
    tokenizer.pre_tokenizer = pre_tokenizers.WhitespaceSplit()
    (folder / "tokenizer").mkdir()
    tokenizer.save(str(folder / "tokenizer" / "tokenizer.json"))
    sha256 = FolderTokenizer(folder / "tokenizer").sha256
    generator = np.random.default_rng(0)
    with ShardWriter(folder / "text", 64, eos_id=2, tokenizer_sha256=sha256) as writer:
        for _ in range(200):
            writer.add(np.append(generator.integers(3, 64, generator.integers(5, 60)), 2))
    asked = [{"question": f"w{i}", "answer": f"w{i + 1}", "cloze": f"w{i}"} for i in range(3, 13)]
    texts = [{"text": " ".join(f"w{3 + (i * k) % 60}" for k in range(1, 20))} for i in range(1, 5)]
    for name, rows in (("asked", asked), ("texts", texts), ("more", texts[::-1])):
        (folder / f"{name}.jsonl").write_text("".join(json.dumps(row) + "\n" for row in rows))
    tasks = [
        {
            "name": "asked",
            "kind": "questions",
            "file": str(folder / "asked.jsonl"),
            "ask": "cloze",
            "max_new_tokens": 2,
        },
        {"name": "texts", "kind": "perplexity", "file": str(folder / "texts.jsonl")},
        {"name": "more", "kind": "perplexity", "file": str(folder / "more.jsonl")},
    ]
    (folder / "little.yaml").write_text(yaml.safe_dump({"model": "none", "tasks": tasks}))
    return folder


def trained(place, recipe, root, evaluated, **trainer):
    made = recipe(moe=True, steps=6, train={str(place / "text"): 1.0}, tokenizer=str(place / "tokenizer"))
    made["checkpoint"] = {"every": "2 steps", "keep_last": 5}
    made["trainer"] |= trainer
    if evaluated:
        callback = "llmrecipes.evaluate.training.EvaluateWhileTraining"
        init = {"recipe": str(place / "little.yaml"), "every": 2}
        made["trainer"]["callbacks"] = [{"class_path": callback, "init_args": init}]
    path = write_recipe(root, made)
    assert cli("fit", "--config", path, "--run_root", root / "runs") == 0
    return root / "runs" / "moe"


@pytest.fixture(scope="module")
def run(place, recipe, tmp_path_factory):
    return trained(place, recipe, tmp_path_factory.mktemp("evaluated"), True)


def test_figures_at_every_step_that_is_due(run):
    found = sorted(step_of(path.name) for path in (run / "evaluation").iterdir())
    assert found == [("little", 2), ("little", 4), ("little", 6)]
    records = [json.loads(line) for line in (run / "metrics.jsonl").read_text().splitlines()]
    noted = {r["step"]: r for r in records if "eval/texts" in r}
    assert sorted(noted) == [2, 4, 6]
    for step, record in noted.items():
        summary = json.loads((run / "evaluation" / f"little@{step:06d}" / "summary.json").read_text())
        assert record["eval/texts"] == summary["tasks"][1]["figures"]["bits_per_byte"]["value"]
    routing = summary["tasks"][1]["routing"]
    assert len(routing) == 2 and all(sum(row) == pytest.approx(1, abs=1e-5) for row in routing)


def test_training_is_the_same_without_it(place, recipe, run, tmp_path):
    """Bit for bit, with dropout: no random number is used up, and the model is given back in training mode."""
    without = trained(place, recipe, tmp_path, False)
    with_it = [r for r in trajectory(run) if "eval/texts" not in r]
    assert with_it == trajectory(without) and len(with_it) >= 6


def test_a_checkpoint_gives_the_figures_that_were_measured_while_training(place, run, tmp_path):
    config = EvaluateConfig(
        model=str(run / "checkpoints" / "step=000004"),
        output=str(tmp_path / "out"),
        tasks=[TaskConfig(name="texts", kind="perplexity", file=str(place / "texts.jsonl"))],
    )
    from llmrecipes.evaluate.run import evaluate

    figure = evaluate(config, tmp_path / "out")["tasks"][0]["figures"]["bits_per_byte"]
    live = json.loads((run / "evaluation" / "little@000004" / "summary.json").read_text())["tasks"][1]
    assert figure == live["figures"]["bits_per_byte"]


def test_each_checkpoint_is_measured_once(place, run, tmp_path, capsys):
    copy = tmp_path / "run"
    shutil.copytree(run, copy)
    shutil.rmtree(copy / "evaluation" / "little@000002")  # the others were measured while training
    shutil.rmtree(copy / "checkpoints" / "step=000004")
    words = ["evaluate", "--config", place / "little.yaml", "--model", copy, "--checkpoints", "each"]
    assert cli(*words) == 0
    out = capsys.readouterr().out
    assert "step=000002:" in out and "step=000006: measured already" in out
    assert cli(*words) == 0
    assert "step=000002: measured already" in capsys.readouterr().out
    # A run that was started again has other checkpoints of the same steps.
    summary = copy / "evaluation" / "little@000002" / "summary.json"
    summary.write_text(summary.read_text().replace('"model_fingerprint": "', '"model_fingerprint": "0'))
    assert cli(*words) == 0
    assert "step=000002:\n" in capsys.readouterr().out


def test_it_waits_for_new_checkpoints_until_the_run_is_done(place, run, tmp_path):
    copy = tmp_path / "run"
    shutil.copytree(run, copy, ignore=shutil.ignore_patterns("evaluation", "DONE"))
    late = tmp_path / "late"
    (copy / "checkpoints" / "step=000006").rename(late)
    (copy / "checkpoints" / "step=000004" / "manifest.json").unlink()  # being written
    looks = []

    def sleep(seconds):
        looks.append(
            sorted(step_of(p.name)[1] for p in (copy / "evaluation").glob("*/summary.json") for p in [p.parent])
        )
        if len(looks) == 2:
            late.rename(copy / "checkpoints" / "step=000006")
            (copy / "DONE").write_text("{}")

    task = TaskConfig(name="texts", kind="perplexity", file=str(place / "texts.jsonl"))
    config = EvaluateConfig(model=str(copy), tasks=[task], checkpoints="each", wait=1.0)
    assert evaluate_each(config, copy / "evaluation" / "little", sleep) == 0
    assert looks == [[2], [2]]
    assert (copy / "evaluation" / "little@000006" / "summary.json").exists()


def test_a_run_may_begin_later(place, tmp_path, capsys):
    task = TaskConfig(kind="perplexity", file=str(place / "texts.jsonl"))
    late = tmp_path / "later"

    def sleep(seconds):
        late.mkdir()
        (late / "DONE").write_text("{}")

    config = EvaluateConfig(model=str(late), tasks=[task], checkpoints="each", wait=1.0)
    assert list(config.missing()) == [] and evaluate_each(config, late / "evaluation" / "x", sleep) == 0
    assert cli("evaluate", "--config", place / "little.yaml", "--model", late, "--checkpoints", "each") == 2
    assert "is no run folder" in capsys.readouterr().err


def test_an_evaluation_that_fails_is_a_warning(place, recipe, tmp_path, monkeypatch, caplog):
    from llmrecipes.evaluate import training

    monkeypatch.setattr(training, "measure", lambda *_: 1 / 0)
    folder = trained(place, recipe, tmp_path, True, max_steps=4)
    assert (folder / "DONE").exists()
    assert "no evaluation, ZeroDivisionError" in (folder / "log.txt").read_text()


def test_the_report_draws_them_against_the_step(run, tmp_path):
    assert cli("report", run, "--output", tmp_path / "out") == 0
    names = {path.stem for path in (tmp_path / "out").glob("*.png")}
    assert {"along_training_0", "router_by_domain_0"} <= names
    (found,) = read_runs([run])
    series = along(found)
    assert len(series) == 3 and all([step for step, _ in one] == [2, 4, 6] for one in series.values())
    assert [s["name"] for s in found.summaries] == ["little@000006"] and len(found.earlier) == 2


def test_mistakes_come_before_the_first_step(place, recipe, tmp_path, capsys):
    made = recipe(steps=6, train={str(place / "text"): 1.0}, tokenizer=str(place / "tokenizer"))
    (tmp_path / "bad.yaml").write_text("model: x\ntasks: [{kind: perplexity, file: nowhere.jsonl}]\n")
    callback = {"class_path": "llmrecipes.evaluate.training.EvaluateWhileTraining"}
    made["trainer"]["callbacks"] = [callback | {"init_args": {"recipe": str(tmp_path / "bad.yaml"), "every": 2}}]
    assert cli("fit", "--config", write_recipe(tmp_path, made), "--run_root", tmp_path / "runs") == 2
    assert "nowhere.jsonl: no such file" in capsys.readouterr().err

"""The stages as the command line calls them."""

import subprocess
import sys
from pathlib import Path

import pytest

from data_prep.commands import STAGES, help_text, run
from data_prep.inspect_shards import COLOURS, RESET, inspect, piece_boundaries, stats
from data_prep.tokenize import tokenize
from llmrecipes.arguments import join_lists
from llmrecipes.data.tokenizer import Tokenizer
from llmrecipes.errors import UserError


@pytest.fixture(scope="module")
def shard(corpus, tokenizer, tmp_path_factory):
    prefix = tmp_path_factory.mktemp("shard") / "ja"
    tokenize([str(corpus / "ja_towns.jsonl")], str(tokenizer), str(prefix), workers=1)
    return str(prefix)


def test_every_stage_loads_and_every_option_is_documented(capsys):
    seen = 0
    for name, stage in STAGES.items():
        assert callable(stage.load())
        assert name in help_text()
        with pytest.raises(SystemExit) as ended:
            run(name, ["--help"])
        assert ended.value.code == 0
        shown = capsys.readouterr().out
        for parameter in stage.load().__annotations__:
            if parameter != "return":
                seen += 1
                # An option without a description is followed at once by its "(type" or "(required".
                described = " ".join(shown.split(f"--{parameter} ")[-1].split()[:4])
                assert "(type" not in described.split("]")[-1][:8], (name, parameter)
    assert seen > 30


def test_importing_the_table_is_light():
    heavy = ["torch", "transformers", "datasets", "sentencepiece", "tokenizers", "jsonargparse", "numpy"]
    code = f"import sys, data_prep.commands; print([m for m in {heavy} if m in sys.modules])"
    assert subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=True).stdout == "[]\n"


def test_lists_as_the_shell_gives_them():
    join = join_lists
    assert join(tokenize, ["--input", "a", "b", "--workers", "1"]) == ['--input=["a", "b"]', "--workers", "1"]
    assert join(tokenize, ["--output", "x", "--input", "a"]) == ["--output", "x", '--input=["a"]']
    assert join(tokenize, ["--input", "[a, b]"]) == ["--input", "[a, b]"]
    assert join(inspect, ["--documents", "3", "5"]) == ["--documents=[3,5]"]


def test_run_end_to_end(tmp_path, capsys):
    folder = str(tmp_path / "demo")
    run("demo", ["--output", folder, "--documents", "200"])
    inputs = [f"{folder}/ja_towns.jsonl", f"{folder}/en_towns.jsonl"]
    run(
        "tokenizer",
        ["--input", *inputs, "--output", f"{tmp_path}/t", "--vocab_size", "900", "--sample_bytes", "1_000_000"],
    )
    run(
        "tokenize",
        ["--input", *inputs, "--tokenizer", f"{tmp_path}/t", "--output_dir", f"{tmp_path}/s", "--workers", "1"],
    )
    run("stats", ["--shards", f"{tmp_path}/s/ja_towns", f"{tmp_path}/s/en_towns"])
    run("inspect", ["--shard", f"{tmp_path}/s/ja_towns", "--tokenizer", f"{tmp_path}/t", "--documents", "0", "2"])
    shown = capsys.readouterr().out
    assert "verified: sizes, checksums, ends of documents" in shown
    assert "--- document 0:" in shown and "--- document 2:" in shown and "--- document 1:" not in shown


def test_unknown_stage():
    with pytest.raises(UserError, match=r"data tokenise: no such stage - did you mean 'tokenize'\?"):
        run("tokenise", [])


def test_stats_verifies(shard, tmp_path, capsys):
    stats([shard])
    assert "verified" in capsys.readouterr().out
    broken = tmp_path / "broken"
    for ending in ("bin", "idx", "json"):
        content = bytearray(Path(f"{shard}.{ending}").read_bytes())
        if ending == "bin":
            content[100] ^= 1
        (tmp_path / f"broken.{ending}").write_bytes(content)
    with pytest.raises(UserError, match="wrong checksum"):
        stats([shard, str(broken)])


def test_piece_boundaries(tokenizer):
    pieces = Tokenizer(tokenizer)
    text = "夕里町は 🍣\nx </s>"
    ids = pieces.encode(text)
    assert piece_boundaries(ids, pieces, colour=False).replace("|", "") == text
    coloured = piece_boundaries(ids, pieces, colour=True)
    for code in (*COLOURS, RESET):
        assert code in coloured
        coloured = coloured.replace(code, "")
    assert coloured == text
    assert piece_boundaries([2], pieces, colour=False) == "</s>"


def test_inspect_mistakes(shard, tokenizer, tmp_path, corpus):
    with pytest.raises(UserError, match=r"--documents \[999\]: .* has documents 0 to 107"):
        inspect(shard, str(tokenizer), documents=[1, 999])
    with pytest.raises(UserError, match="--start 99999999"):
        inspect(shard, str(tokenizer), start=99_999_999)
    from data_prep.tokenizer import train_tokenizer

    train_tokenizer([str(corpus / "ja_towns.jsonl")], str(tmp_path / "other"), vocab_size=900)
    with pytest.raises(UserError, match="made with another tokenizer"):
        inspect(shard, str(tmp_path / "other"))


def test_inspect_window(shard, tokenizer, capsys):
    inspect(shard, str(tokenizer), start=10, length=5)
    shown = capsys.readouterr().out
    assert shown.startswith("--- tokens 10 on\n") and len(shown.strip().split("\n")[-1].split()) == 5

"""What a recipe trains on, as people see it."""

from __future__ import annotations

import json
import sys
from pathlib import Path

import pytest
import yaml

sys.path.insert(0, str(Path(__file__).parents[1] / "data"))

from chat_tokenizers import byte_level

from data_prep.commands import run
from llmrecipes.errors import UserError


def recipe(folder, kind="ChatExamples"):
    byte_level(folder / "t")
    lines = [{"question": f"{n} + 1 ?", "answer": f"はい{n}"} for n in range(20)]
    if kind == "PreferencePairs":
        lines = [{"prompt": line["question"], "chosen": line["answer"], "rejected": "いいえ"} for line in lines]
    (folder / "talks.jsonl").write_text("\n".join(map(json.dumps, lines)))
    init = {"train": {str(folder / "talks.jsonl"): 1.0}, "tokenizer": str(folder / "t"), "seq_len": 128}
    init |= {"micro_batch": 2, "global_batch": 2, "cache": str(folder / "cache")}
    path = folder / "recipe.yaml"
    path.write_text(yaml.safe_dump({"data": {"class_path": f"llmrecipes.data.{kind}", "init_args": init}}))
    return path


@pytest.mark.parametrize("kind", ["ChatExamples", "PreferencePairs"])
def test_the_trained_part_is_marked(kind, tmp_path, capsys):
    run("inspect", ["--recipe", str(recipe(tmp_path, kind)), "--count", "2"])
    out = capsys.readouterr().out
    assert out.count("--- step 0") == 2
    assert "<|im_start|>assistant\n⟦はい" in out
    assert "<|im_end|>⟧" in out
    assert out.count("⟦") == out.count("⟧") == 2


def test_mistakes(tmp_path):
    path = recipe(tmp_path)
    for words, problem in (
        ([], "give --shard and --tokenizer, or --recipe"),
        (["--recipe", str(path), "--shard", "x"], "leave --shard and --tokenizer out"),
        (["--recipe", str(tmp_path / "absent.yaml")], "absent.yaml"),
    ):
        with pytest.raises(UserError, match=problem):
            run("inspect", words)
    path.write_text("data: {class_path: os.path, init_args: {}}")
    with pytest.raises(UserError, match=r"only data of llmrecipes\.data"):
        run("inspect", ["--recipe", str(path)])
    path.write_text("data: {class_path: llmrecipes.data.ChatExamples, init_args: {train: {}}}")
    with pytest.raises(UserError, match=r"missing .* required positional arguments"):
        run("inspect", ["--recipe", str(path)])

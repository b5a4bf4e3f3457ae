"""A model that was fine-tuned with a template is talked to, and exported, with the same one."""

from __future__ import annotations

import json
import sys
from pathlib import Path

import pytest
from helpers import cli, write_recipe

sys.path.insert(0, str(Path(__file__).parents[1] / "data"))

from chat_tokenizers import byte_level

from llmrecipes.data import Tokenizer
from llmrecipes.inference.opened import open_model


@pytest.fixture(scope="module")
def run(tmp_path_factory):
    """A run folder of two steps of fine-tuning, begun from a pretraining run of one."""
    folder = tmp_path_factory.mktemp("chat_run")
    byte_level(folder / "t", None)
    lines = [{"question": f"{n} + 1 ?", "answer": f"はい{n}"} for n in range(30)]
    (folder / "talks.jsonl").write_text("\n".join(map(json.dumps, lines)))
    config = {
        "vocab_size": Tokenizer(folder / "t").vocab_size,
        "dim": 32,
        "num_layers": 1,
        "num_heads": 2,
        "ffn_dim": 32,
    }
    data = {
        "class_path": "llmrecipes.data.ChatExamples",
        "init_args": {
            "train": {str(folder / "talks.jsonl"): 1.0}, "tokenizer": str(folder / "t"), "template": "instruction_ja",
            "seq_len": 192, "micro_batch": 2, "global_batch": 2, "cache": str(folder / "cache"), "valid_batches": 1,
        },
    }  # fmt: skip
    init = {
        "config": config,
        "optimizer": {"class_path": "llmrecipes.optim.AdamW", "init_args": {"lr": 0.001}},
        "schedule": {"class_path": "llmrecipes.optim.Constant"},
    }
    common = {"data": data, "trainer": {"max_steps": 2, "accelerator": "cpu", "val_check_interval": 2}}
    common |= {"checkpoint": {"every": "1 steps"}, "samples": {"every": None}}
    first = {"name": "base", "model": {"class_path": "llmrecipes.modules.PretrainModule", "init_args": init}} | common
    assert cli("fit", "--config", write_recipe(folder, first), "--run_root", folder / "runs") == 0
    init = init | {"init_from": str(folder / "runs/base")}
    second = {"name": "sft", "model": {"class_path": "llmrecipes.modules.SFTModule", "init_args": init}} | common
    assert cli("fit", "--config", write_recipe(folder, second), "--run_root", folder / "runs") == 0
    return folder / "runs/sft"


def test_generation_uses_the_template_of_the_recipe(run, capsys):
    opened = open_model(str(run))
    ids = opened.codec.chat([{"role": "user", "content": "1 + 1 ?"}])
    assert opened.codec.decode(ids).endswith("### 指示:\n1 + 1 ?\n\n### 応答:\n")
    assert cli("generate", run, "--chat", "--prompt", "1 + 1 ?", "--max_new_tokens", 3, "--json") == 0
    assert cli("generate", run, "--chat", "--prompt", "1 + 1 ?", "--max_new_tokens", 3, "--template", "chatml") == 0
    capsys.readouterr()
    assert cli("generate", run, "--chat", "--prompt", "1 + 1 ?", "--template", "absent.jinja") == 2
    assert "neither a file nor one of instruction_ja, alpaca, chatml" in capsys.readouterr().err


def test_the_export_carries_it(run, tmp_path):
    import transformers

    assert cli("convert", "to-hf", run, tmp_path / "hf") == 0
    theirs = transformers.AutoTokenizer.from_pretrained(str(tmp_path / "hf"))
    messages = [{"role": "user", "content": "1 + 1 ?"}]
    want = open_model(str(run)).codec.chat(messages)
    text = theirs.apply_chat_template(messages, tokenize=False, add_generation_prompt=True)
    assert theirs(text, add_special_tokens=False)["input_ids"] == want
    assert open_model(str(tmp_path / "hf")).codec.chat(messages) == want

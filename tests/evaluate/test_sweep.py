"""A sweep over the number of examples: nested sets, one run for each, a picture; goes on after a stop."""

from __future__ import annotations

import json
import sys
from pathlib import Path

import pytest
import yaml
from helpers import REPOSITORY, cli

from data_prep.frame.config import read_config
from llmrecipes.errors import UserError
from llmrecipes.evaluate.sweep.config import SweepConfig
from llmrecipes.evaluate.sweep.run import find_figure, run_sweep
from llmrecipes.evaluate.sweep.subsets import in_order, read_examples, write_subset

sys.path.insert(0, str(Path(__file__).parents[1] / "data"))
sys.path.insert(0, str(Path(__file__).parents[1] / "convert"))


def test_sets_are_nested_and_a_matter_of_the_seed(tmp_path):
    lines = [json.dumps({"question": f"q{i}", "answer": "a"}).encode() for i in range(200)]
    (tmp_path / "all.jsonl").write_bytes(b"\n".join([*lines, lines[0], b""]))
    examples = read_examples([str(tmp_path / "all.jsonl")])
    assert examples == lines  # each once
    sets = {}
    for seed in (1, 2):
        for count in (10, 50, 200):
            write_subset(tmp_path / f"{seed}-{count}", examples, seed, count)
            sets[seed, count] = set((tmp_path / f"{seed}-{count}").read_bytes().splitlines())
            assert len(sets[seed, count]) == count
        assert sets[seed, 10] < sets[seed, 50] < sets[seed, 200]
    assert sets[1, 50] != sets[2, 50]
    assert in_order(examples, 1) == in_order(examples[::-1], 1)  # whatever the order of the file
    with pytest.raises(UserError, match="there are 200"):
        write_subset(tmp_path / "x", examples, 1, 201)


@pytest.fixture(scope="module")
def prepared(tmp_path_factory):
    from branches import write
    from chat_tokenizers import byte_level

    from llmrecipes.data import Tokenizer
    from llmrecipes.models import Decoder, ModelConfig, init_weights

    folder = tmp_path_factory.mktemp("sweep")
    byte_level(folder / "t", None)
    talks = [{"question": f"{n} + 1 ?", "answer": f"{n + 1}"} for n in range(40)]
    (folder / "talks.jsonl").write_text("".join(json.dumps(t) + "\n" for t in talks))
    asked = [t | {"held_out": n % 2 == 0} for n, t in enumerate(talks[:8])]
    (folder / "asked.jsonl").write_text("".join(json.dumps(t) + "\n" for t in asked))
    sizes = {
        "vocab_size": Tokenizer(folder / "t").vocab_size,
        "dim": 16,
        "num_layers": 1,
        "num_heads": 2,
        "ffn_dim": 16,
    }
    data = {
        "class_path": "llmrecipes.data.ChatExamples",
        "init_args": {
            "train": {str(folder / "talks.jsonl"): 1.0}, "tokenizer": str(folder / "t"), "template": "instruction_ja",
            "seq_len": 192, "micro_batch": 2, "global_batch": 2, "cache": str(folder / "cache"), "valid_batches": 1,
            "split": "80,20",
        },
    }  # fmt: skip
    decoder = Decoder(ModelConfig(**sizes))
    init_weights(decoder, 3)
    write(folder / "base", decoder)
    init = {
        "init_from": str(folder / "base"),
        "config": sizes,
        "optimizer": {"class_path": "llmrecipes.optim.AdamW", "init_args": {"lr": 0.001}},
        "schedule": {"class_path": "llmrecipes.optim.Constant"},
    }
    model = {"class_path": "llmrecipes.modules.SFTModule", "init_args": init}
    trainer = {"max_steps": 2, "accelerator": "cpu", "val_check_interval": 2}
    recipe = {"name": "x", "model": model, "data": data, "trainer": trainer, "samples": {"every": None}}
    (folder / "sft.yaml").write_text(yaml.safe_dump(recipe, allow_unicode=True))
    task = {"name": "asked", "kind": "questions", "file": str(folder / "asked.jsonl"), "max_new_tokens": 2}
    (folder / "e.yaml").write_text(yaml.safe_dump({"model": "x", "tasks": [task]}))
    return folder


def config_of(folder, **more):
    given = {"recipe": [str(folder / "sft.yaml")], "evaluation": str(folder / "e.yaml"), "examples": [20, 10]}
    given |= {"figure": "asked / held_out: no", "output": str(folder / "out")}
    (folder / "sweep.yaml").write_text(yaml.safe_dump(given | more))
    return read_config(SweepConfig, ["--config", str(folder / "sweep.yaml")])


def test_a_sweep_goes_on_where_it_stopped(prepared, capsys):
    started = []

    def start(words):
        started.append((words[0], next(w for w in words if "seed1" in w or "--model" in w)))
        return 75 if len(started) == 3 else cli(*words)

    config = config_of(prepared)
    assert run_sweep(config, start) == 75  # the second training was told to stop
    assert [word for word, _ in started] == ["fit", "evaluate", "fit"]
    assert run_sweep(config, start) == 0
    assert [word for word, _ in started[3:]] == ["fit", "evaluate"]
    found = json.loads((prepared / "out" / "sweep.json").read_text())
    assert [(p["examples"], p["seed"], p["n"]) for p in found["points"]] == [(10, 1, 4), (20, 1, 4)]
    assert (prepared / "out" / "sweep.png").stat().st_size > 5_000
    recipe = yaml.safe_load((prepared / "out" / "runs" / "0000010-seed1" / "recipe.yaml").read_text())
    (trained_on,) = recipe["data"]["init_args"]["train"]
    assert len(Path(trained_on).read_text().splitlines()) == 10 and recipe["seed"] == 1
    with pytest.raises(UserError, match=r"no 'nothing'; it has asked, asked.contains"):
        find_figure(json.loads(next((prepared / "out").rglob("summary.json")).read_text()), "nothing")


def test_mistakes_are_named(prepared, monkeypatch):
    with pytest.raises(UserError) as caught:
        config_of(prepared, examples=[5, 5], seeds=[], overrides=["--seed=3"], evaluation="none.yaml")
    for text in ("examples:", "seeds:", "--seed is what the sweep sets", "none.yaml: no such file"):
        assert text in str(caught.value), text
    monkeypatch.chdir(REPOSITORY)
    for path in (REPOSITORY / "recipes" / "sweep").glob("*.yaml"):
        assert read_config(SweepConfig, ["--config", str(path)]).examples

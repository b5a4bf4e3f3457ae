# ruff: noqa: E501 - one line of output, one line here
"""``llmrecipes check`` as a whole, and the rules across fields."""

from __future__ import annotations

import subprocess
import sys
import time
from pathlib import Path

import pytest
from good_recipe import GOOD, write_shard

from llmrecipes.errors import UserError
from llmrecipes.recipe import Recipe, check, checked_recipe
from llmrecipes.recipe.check import check_arguments, main
from llmrecipes.recipe.schema import SECTION_CLASSES
from llmrecipes.recipe.signatures import Sources

PLANTED = (("model:\n", "modle:\n"), ("max_steps", "max_step"), ("seq_len", "seq_lenn"), ("top_k: 2", "top_k: two"))


def test_four_planted_mistakes_are_exactly_four_problems(problems_of, capfd):
    expected = [
        "r.yaml:6: unknown section 'modle' - did you mean 'model'?",
        "r.yaml:16: model.init_args.config.moe.top_k: expected an integer, not 'two'",
        "r.yaml:32: unknown key 'data.init_args.seq_lenn': it is not an argument of PackedShards - did you mean 'seq_len'?",
        "r.yaml:36: unknown key 'trainer.max_step': it is not an argument of Trainer - did you mean 'max_steps'?",
    ]
    assert problems_of(*PLANTED) == expected
    assert main(["r.yaml"]) == 2
    assert capfd.readouterr().err.splitlines() == [*expected, "checked 1 recipe: 4 problems"]


def test_a_process_of_its_own_is_quick_and_imports_neither_torch_nor_lightning(problems_of):
    problems_of(*PLANTED)
    code = (
        "import sys; from llmrecipes.recipe.check import check_arguments, main; code = main(['r.yaml', 'good.yaml']);"
        "assert not {'torch', 'lightning', 'jsonargparse', 'numpy'} & set(sys.modules); sys.exit(code)"
    )
    start = time.monotonic()
    result = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=False)
    assert time.monotonic() - start < 3
    assert result.returncode == 2, result.stderr
    assert "Traceback" not in result.stderr
    assert result.stderr.endswith("checked 2 recipes: 4 problems\n")


def test_the_lost_week_is_refused(problems_of):
    """175,000 steps, decay after 20, warm-up 10 (one_RTX3090_test.sh): a week of training at the lowest rate."""
    changes = (
        ("max_steps: 62500", "max_steps: 175_000"),
        ("decay: null", "decay: 20 steps"),
        ("2000 steps", "10 steps"),
    )
    assert problems_of(*changes) == [
        "r.yaml:26: model.init_args.schedule: the learning rate decays in 20 of 175,000 steps and stays at its floor for "
        "the other 174,980 - write decay: null for the whole run"
    ]
    assert problems_of(changes[0], ("decay: null", "decay: 175000 steps")) == []


@pytest.mark.parametrize("key", ["load", "save", "load_dir", "ckpt_path", "resume_from"])
def test_a_load_folder_apart_from_the_save_folder_cannot_be_written(problems_of, key):
    """The other half of the lost week: load `Llama-3-8b/tp-pp`, save `Llama-3-8/...`: every restart began at zero."""
    (found,) = problems_of(("seed: 42", f"{key}: checkpoints/Llama-3-8b/tp-pp"))
    assert "fit resumes from where it saves, run_root/name: write resume: auto, never or required" in found


WSD = ("WarmupCosine", "WarmupStableDecay")
LEARNED = ("dim: 128", "dim: 128\n      positions: learned\n      max_seq_len: 1024")
RULES = [
    ((("decay: null", "decay: 40000 steps"),), ()),
    ((("decay: null", "decay: 31249 steps"),), ("decays in 31,249 of 62,500",)),
    ((("decay: null", "decay: 40B tokens"),), ("decays in 16,955 of 62,500",)),
    ((("2000 steps", "63000 steps"),), ("warmup (63,000 steps) is longer than the run (62,500 steps)",)),
    ((("2000 steps", "41000 steps"), ("decay: null", "decay: 40000 steps")), ("warmup (41,000 steps) is longer than decay",)),
    ((WSD, ("decay: null", "decay: 6000 steps")), ()),
    ((WSD, ("decay: null", "decay: 61000 steps")), ("do not fit in the run (62,500 steps)",)),
    ((WSD,), ("decay: expected a length such as '2000 steps', not null",)),
    ((("floor: 0.05", "floor: -1"),), ("floor -1 is negative",)),
    ((("lr: 1e-3", "lr: 0"),), ("lr 0 is not positive",)),
    ((("max_steps: 62500", "max_steps: 62500\n  devices: 5\n  strategy: {class_path: llmrecipes.distributed.ShardedStrategy, init_args: {mode: no_shard}}"),), ("micro_batch 8 x 5 data ranks = 40 - use 1120 or 1160",)),
    ((("max_steps: 62500", "max_steps: 62500\n  devices: 4\n  num_nodes: 2\n  strategy: {class_path: llmrecipes.distributed.ShardedStrategy}"),), ()),
    ((("max_steps: 62500", "max_steps: 62500\n  devices: auto"),), ()),
    ((("micro_batch: 8", "micro_batch: 0"),), ("micro_batch 0 is less than 1",)),
    ((("data/ja: 0.5", "data/ja: -1"),), ("the weight of data/ja is negative, -1",)),
    ((("data/ja: 0.5, data/en: 0.5", "data/ja: 0, data/en: 0"),), ("all weights are zero",)),
    ((("data/ja: 0.5", "data/ja: .nan"),), ("the weight of data/ja is not finite",)),
    ((("vocab_size: 16000", "vocab_size: 15999"), ("    expected_params: 7_509_120\n", "")),
     ("vocab_size 15,999 is smaller than the tokenizer's of data/ja, 16,000", "tokenizer's of data/en")),
    ((("seq_len: 2048", "seq_len: 9999"),), ()),
    ((("seq_len: 2048", "seq_len: 10000"),), ("too long for data/ja, which holds 10,000", "too long for data/en")),
    ((LEARNED, ("    expected_params: 7_509_120\n", "")), ("longer than the position table, max_seq_len 1024",)),
    ((("data/en: 0.5}", "data/en: 0.5}\n    valid: {ja: data/no}"),), ("missing files data/no.bin and data/no.idx",)),
    ((("data/en: 0.5}", "data/en: 0.5}\n    tokenizer: nowhere"),), ("missing folder nowhere",)),
    ((("logging: {every: 10}", "logging: {every: 0}"),), ("logging.every 0 is less than 1",)),
    ((("every: 1000 steps", "every: 1100 steps"),), ("keep_every (1100 steps) is not a multiple of",)),
    ((("top_k: 2", "top_k: 1\n        renormalize: false"),), ()),
    ((("num_layers: 4", "num_layers: 1000000000000"),), ("num_layers 1,000,000,000,000 is beyond",)),
    ((("moe:", "moe_every: 2\n      moe:"),), ("ffn_dim is missing: there are layers without experts",)),
    ((("num_experts: 8", "experts_per_layer: [8, 8, 8]"),), ("moe.experts_per_layer names 3 layers, the model has 4",)),
    ((("num_experts: 8", "experts_per_layer: [8, 8, 8, 8]"),), ()),
    ((("num_experts: 8", "num_experts: 8\n        min_capacity: 4"),), ("moe.min_capacity has no effect without",)),
    ((("num_experts: 8", "num_experts: 8\n        capacity_factor: 1.25\n        drop_policy: probs"),), ()),
    ((("num_experts: 8", "num_experts: 8\n        shared_ffn_dim: 0"),), ("moe.shared_ffn_dim 0 is less than 1",)),
    ((("num_experts: 8", "num_experts: 8\n        residual: true"),), ("ffn_dim is missing: moe.residual needs",)),
    ((("max_steps: 62500", "max_steps: 62500\n  accumulate_grad_batches: 1\n  enable_checkpointing: false"),), ()),
]  # fmt: skip


@pytest.mark.parametrize(("changes", "expected"), RULES, ids=range(len(RULES)))
def test_rules(problems_of, changes, expected):
    found = problems_of(*changes)
    assert len(found) == len(expected), found
    for part, line in zip(expected, found, strict=True):
        assert part in line


def test_shards_of_different_tokenizers_are_refused(problems_of):
    write_shard(Path("data/en"), sha="b")
    assert problems_of()[0].endswith("data/en and data/ja were made with different tokenizers - tokenize one again")


def test_shards_without_a_manifest_are_measured_by_their_index(problems_of):
    write_shard(Path("data/ja"), tokens=100)
    Path("data/ja.json").unlink()
    assert "too long for data/ja, which holds 100 tokens" in problems_of()[0]


def test_files_can_be_left_out(folder):
    Path("r.yaml").write_text(GOOD.replace("data/ja", "elsewhere/ja"))
    assert len(check(Path("r.yaml"))) == 1
    assert check(Path("r.yaml"), files=False) == []
    assert main(["r.yaml", "--without_files"]) == 0


def test_files_that_are_no_recipes(folder, capfd):
    Path("empty.yaml").write_text("# nothing\n")
    Path("list.yaml").write_text("- a\n")
    Path("binary.yaml").write_bytes(b"\xff\xfe\x00")
    Path("control.yaml").write_bytes(b"a: \x01\n")
    Path("folder.yaml").mkdir()
    names = ["empty.yaml", "list.yaml", "binary.yaml", "control.yaml", "folder.yaml", "absent.yaml"]
    assert main(names) == 2
    lines = capfd.readouterr().err.splitlines()
    assert lines[-1] == "checked 6 recipes: 6 problems"
    parts = ["is empty", "not a list", "not a text file", "control character", "a folder", "no such file"]
    for name, part, line in zip(names, parts, lines, strict=False):
        assert line.startswith(name)
        assert part in line


def test_missing_sections_are_named_once_each(problems_of):
    assert problems_of(text="name: x\n") == [
        f"r.yaml:1: the section {s} is missing" for s in ("model", "data", "trainer")
    ]


def test_overrides_and_further_files_are_checked_under_their_own_names(folder, capfd):
    Path("more.yaml").write_text("\ntrainer:\n  max_step: 5\n")
    assert main(["good.yaml", "--config", "more.yaml", "--data.seq_lenn=4", "--seed", "x"]) == 2
    lines = capfd.readouterr().err.splitlines()
    assert lines[0].startswith("more.yaml:3: unknown key 'trainer.max_step'")
    assert any(
        line.startswith("command line: --data.seq_lenn: unknown key 'data.init_args.seq_lenn'") for line in lines
    )
    assert "command line: --seed: seed: expected an integer, not 'x'" in lines
    assert main(["--help"]) == 0
    assert main([]) == 2


def test_checked_recipe_raises_all_at_once_and_leaves_a_sound_one_alone(folder):
    assert isinstance(checked_recipe([Path("good.yaml")]), Recipe)
    with pytest.raises(UserError) as error:
        checked_recipe([Path("good.yaml")], ["--trainer.max_steps=0", "--seed=x"])
    assert len(error.value.problems) == 2


def test_the_words_after_fit(folder):
    Path("more.yaml").write_text("trainer: {max_steps: 60000}\n")
    recipe = check_arguments(["--config", "good.yaml", "--config=more.yaml", "--seed", "7", "--cool_down", "100 steps"])
    assert (recipe.data["trainer"]["max_steps"], recipe.data["seed"]) == (60000, 7)
    bad = [
        [],
        ["good.yaml"],
        ["good.yaml", "--config", "good.yaml"],
        ["--config"],
        ["--config=good.yaml", "--cool_down=1"],
    ]
    for words in bad:
        with pytest.raises(UserError):
            check_arguments(words)


def test_every_section_stands_for_a_class_that_exists():
    sources = Sources()
    found = [name for name, path in SECTION_CLASSES.items() if sources.find(path) is not None]
    assert found == ["trainer", "checkpoint", "logging", "samples", "stop", "stability"]

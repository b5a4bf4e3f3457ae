"""What is counted on fake tensors, against what is known and what is measured."""

from __future__ import annotations

import json
import os
import sys
from dataclasses import replace
from pathlib import Path

import pytest
from helpers import REPOSITORY, cli, write_recipe

from benchmarks.planned_memory import INSTEAD, TOLERANCE, command_of, estimated, measured, prepare
from llmrecipes.errors import UserError
from llmrecipes.plan.activations import Step, count_activations, count_moments
from llmrecipes.plan.estimate import make_plan
from llmrecipes.plan.hardware import parse_gpus
from llmrecipes.plan.job import read_job
from llmrecipes.plan.layout import assumed_layout, read_layout
from llmrecipes.plan.memory import Moments, memory_of
from llmrecipes.plan.sizes import Trained, model_sizes
from llmrecipes.recipe import ModelConfig, MoEConfig

sys.path.insert(0, str(Path(__file__).parents[1] / "data"))

from chat_tokenizers import byte_level

DENSE = ModelConfig(vocab_size=64, dim=32, num_layers=10, num_heads=2, ffn_dim=48)
EXPERTS = replace(DENSE, ffn_dim=None, num_layers=2, moe=MoEConfig(num_experts=4, ffn_dim=16))
STEP = Step(rows=2, length=64, accumulates=True)


def test_sizes_add_up():
    for config in (DENSE, EXPERTS, replace(DENSE, tie_embeddings=True)):
        assert model_sizes(config).total == config.num_params
    sizes = model_sizes(EXPERTS)
    assert sizes.experts == 2 * 4 * 3 * 32 * 16
    assert model_sizes(DENSE, Trained(("lm_head",))).trainable == 64 * 32


def test_depth_is_extrapolated():
    """Ten layers from three and five, against ten that are run (a window beyond the row's end makes them unlike)."""
    unlike = replace(DENSE, sliding_window=64, window_layers=[0])
    assert count_activations(DENSE, STEP) == count_activations(unlike, STEP)


def test_checkpointing_and_rows():
    sizes = {how: count_activations(DENSE, replace(STEP, recompute=how)) for how in ("none", "selective", "full")}
    assert sizes["full"] < sizes["selective"] < sizes["none"]
    # What grows with a layer under full checkpointing is its input, [2, 64, 32] fp32, and the bf16 copies of its
    # weights (without norms) that autocast keeps until the loss is there.
    whole = count_activations(replace(DENSE, num_layers=20), replace(STEP, recompute="full"))
    copies = 2 * (model_sizes(DENSE).blocks[0] - 2 * 32)
    assert whole - sizes["full"] == pytest.approx(10 * (2 * 64 * 32 * 4 + copies), rel=0.02)
    # Where weights come in bf16 and are looked at through views: they are counted elsewhere.
    halves = replace(STEP, recompute="full", gathered_half=True)
    for config in (DENSE, replace(EXPERTS, num_layers=10)):
        deeper = count_activations(replace(config, num_layers=20), halves) - count_activations(config, halves)
        assert deeper == pytest.approx(10 * 2 * 64 * 32 * 4, rel=0.02)
    small, large = (count_activations(EXPERTS, replace(STEP, rows=rows)) for rows in (2, 8))
    assert 2 < large / small < 4.5
    whole = replace(STEP, loss_chunk=128, on_gpu=True)
    wide = replace(DENSE, num_layers=1, vocab_size=50_000)
    assert count_activations(wide, whole) > 2 * count_activations(wide, replace(whole, loss_chunk=16, on_gpu=False))


@pytest.fixture
def job(recipe, tmp_path):
    return read_job([write_recipe(tmp_path, recipe())])


def test_strategies(job):
    model = model_sizes(DENSE)
    job = replace(job, config=DENSE, sharded=True, per_node=8, nodes=2, mode="full_shard")
    whole = memory_of(job, model, Moments(), "no_shard")
    states = {
        mode: memory_of(job, model, Moments(last_block=1e6), mode)
        for mode in ("full_shard", "shard_grad_op", "hybrid_shard")
    }
    assert whole.weights + whole.gradients + whole.optimizer == 16 * model.total
    assert states["full_shard"].optimizer == states["shard_grad_op"].optimizer == whole.optimizer / 16
    assert states["hybrid_shard"].optimizer == whole.optimizer / 8
    assert states["shard_grad_op"].gathered > states["full_shard"].gathered
    offloaded = memory_of(job, model, Moments(last_block=100), "full_shard", cpu_offload=True)
    assert offloaded.device == offloaded.gathered + 100


def test_the_command(recipe, tmp_path, capsys, monkeypatch):
    path = write_recipe(tmp_path, recipe(moe=True))
    assert cli("plan", path, "--gpus", "RTX3090", "--json", "--stages", 2, "--failures_per_week", 0) == 0
    said = json.loads(capsys.readouterr().out)
    assert said["fits"] is True and said["advice"] == [] and len(said["stages"]) == 2
    assert said["tokens"] == said["tokens_per_step"] * said["steps"]
    assert said["seconds"] == pytest.approx(said["flops"] / (71e12 * 0.35))
    assert said["checkpoint_bytes"] == 12 * said["params"]["total"]
    run = tmp_path / "run"
    run.mkdir()
    (run / "metrics.jsonl").write_text('{"step": 1, "tokens_per_second": 1000.0, "memory_gib": 2}\n')
    assert cli("plan", path, "--run", run) == 0
    shown = capsys.readouterr().out
    assert "1,000" in shown and "measured in" in shown and "together" in shown
    monkeypatch.setattr("llmrecipes.plan.estimate.usable", lambda gpus: said["memory"]["device"] - 1)
    assert cli("plan", path, "--gpus", "RTX3090", "--price", 1) == 0
    shown = capsys.readouterr().out
    assert "DOES NOT FIT" in shown and "change  micro_batch: " in shown


def test_slips(recipe, tmp_path, capsys):
    path = write_recipe(tmp_path, recipe())
    with pytest.raises(UserError, match="not divisible"):
        read_job([path], [], parse_gpus("7xH100"))
    for words in (
        ["plan", path, "--gpus", "9xH1000"],
        ["plan", path, "--run", tmp_path],
        ["plan", path, "--stages", 99],
        ["plan", path, "--trainer.max_step", 3],
        ["budget", "--gpus", "H100", "--params", "1B", "--days", 1],
        ["budget", "--days", 1],
        ["budget", "--gpus", "H100", "--days", 1, "--mfu", "0.4"],
    ):
        assert cli(*words) == 2, words
        assert "Traceback" not in capsys.readouterr().err


def test_moments_of_sharded_training(job):
    """In the loss no block is gathered and no gradient is there: what a sum of every part's most would count too."""
    model = model_sizes(DENSE)
    job = replace(job, config=DENSE, sharded=True, per_node=2, mode="full_shard", global_batch=4, micro_batch=2)
    assert job.micro_batches == 1 and job.precision == "32-true"
    moments = Moments(forward=5e5, loss=1e6, last_block=9e5, between=8e5, first_block=1e5, embedding=1e5)
    small, large = (memory_of(job, model, replace(moments, loss=loss)) for loss in (1e6, 9e6))
    states = 8 * model.total + 4 * model.rest  # half of weights and moments each, and the root, which stays
    assert large.device == pytest.approx(states - 2 * model.total + 9e6)
    block = max(model.blocks)
    assert (
        small.gathered == (2 * block + model.rest) * 4 + block * 8 + 64 * 32 * 4
        and small.device > states - 2 * model.total + 1e6
    )
    # more micro-batches: the gradients of the earlier ones are there in the loss too
    assert memory_of(replace(job, global_batch=8), model, replace(moments, loss=9e6)).device == pytest.approx(
        states + 9e6
    )
    # each is reached, in a step that is counted, and the worst is what the whole pass has
    counted = count_moments(DENSE, STEP)
    assert min(vars(counted).values()) > 0 and counted.worst == count_activations(DENSE, STEP) == counted.loss


def test_rows_are_those_of_the_data(recipe, tmp_path, capsys):
    """Documents of shards, shared prompts and labels of pairs; without the data, an assumption that is said."""
    path = write_recipe(tmp_path, recipe())
    layout = read_layout([path], [], read_job([path]))
    assert len(layout.rows) == 2 and not layout.assumed and not layout.masked and layout.prefixes is None
    assert all(sum(row.documents) == 32 for row in layout.rows) and layout.share > 0.9
    assert max(len(row.documents) for row in layout.rows) > 1
    missing = [f"--data.init_args.train={{{tmp_path / 'nowhere'}: 1.0}}"]
    layout = read_layout([path], missing, read_job([path], missing))
    assert layout.assumed == f"{tmp_path / 'nowhere'}.bin is not here"
    assert layout.rows[0].documents == (31, 1) and layout.share == 1.0
    whole = [*missing, "--data.document_mask=false"]
    assert read_layout([path], whole, read_job([path], whole)).rows[0].documents == (32,)
    assert cli("plan", path, *missing) == 0
    assert "2.0 documents, 100% of the tokens with a label  (assumed: " in capsys.readouterr().out
    assert cli("plan", path, "--answers", "0.25") == 0
    assert "25% of the tokens with a label  (as the recipe's data begin)" in capsys.readouterr().out


def test_rows_of_pairs(recipe, tmp_path):
    byte_level(tmp_path / "tokenizer")
    pairs = [{"prompt": f"{n} + 1 ?", "chosen": "yes " * (1 + n % 4), "rejected": "no"} for n in range(40)]
    (tmp_path / "pairs.jsonl").write_text("\n".join(map(json.dumps, pairs)))
    made = recipe()
    made["model"]["class_path"] = "llmrecipes.modules.PreferenceModule"
    made["model"]["init_args"] |= {"init_from": "elsewhere"}
    made["data"] = {
        "class_path": "llmrecipes.data.PreferencePairs",
        "init_args": {"train": {str(tmp_path / "pairs.jsonl"): 1.0}, "tokenizer": str(tmp_path / "tokenizer")}
        | {"seq_len": 256, "micro_batch": 2, "global_batch": 2, "template": "chatml", "split": "80,20"}
        | {"cache": str(tmp_path / "cache")},
    }
    made["model"]["init_args"]["config"]["vocab_size"] = 400
    path = write_recipe(tmp_path, made)
    job = read_job([path])
    layout = read_layout([path], [], job)
    assert not layout.assumed and layout.masked and layout.prefixes is not None and 0 < layout.share < 0.5
    assert not (tmp_path / "cache").exists(), "a look at the data leaves nothing behind"
    few = make_plan(replace(job, layout=layout)).memory.activations
    assert few < 0.9 * make_plan(replace(job, layout=layout.labelled(1.0))).memory.activations
    (tmp_path / "pairs.jsonl").write_text("{}\n")
    assert "pairs.jsonl:1" in read_layout([path], [], job).assumed


@pytest.mark.slow
@pytest.mark.parametrize("moe", [False, True])
def test_estimated_against_measured(recipe, tmp_path, moe):
    """Peak of torch's allocator over real steps: within 10 %; without what activations take (the mutant), far off."""
    path = write_recipe(tmp_path, recipe(moe=moe, seq_len=256, micro_batch=8, global_batch=8))
    # With dropout a CPU's attention holds whole scores, of each document.
    overrides = ["--model.init_args.config.dim", "64"]
    guess, (truth,) = estimated(path, overrides), measured(path, overrides)
    assert abs(guess / truth - 1) < TOLERANCE, (guess, truth)
    assert model_sizes(read_job([path], overrides).config).total * 16 < 0.5 * truth


@pytest.fixture(scope="module")
def demo(tmp_path_factory):
    """The demo's data and models to begin with; only for the whole matrix."""
    folder = tmp_path_factory.mktemp("demo")
    before = Path.cwd()
    try:
        prepare(folder)
    finally:
        os.chdir(before)
    return folder


CPU = sorted(path.name for path in (REPOSITORY / "recipes" / "cpu").glob("*.yaml"))


@pytest.mark.slow
def test_every_cpu_recipe(request, stride, monkeypatch):
    """All of recipes/cpu, each by the command in its header; `make test` leaves it to `make test-all`."""
    assert len(CPU) == 12
    if stride(2) == 2:
        pytest.skip("make test-all measures every recipe of recipes/cpu")
    monkeypatch.chdir(request.getfixturevalue("demo"))
    for name in CPU:
        configs, overrides = command_of(Path("recipes/cpu", name))
        overrides += INSTEAD.get(Path(name).stem, [])
        guess, truth = estimated(configs, overrides), measured(configs, overrides)
        assert len(truth) == 1 + (name == "two_processes.yaml")
        assert abs(guess / max(truth) - 1) < TOLERANCE, (name, guess, truth)


def test_answers_are_a_part_of_a_conversation():
    """Fewer labels take fewer logits."""
    step = replace(STEP, rows=8, preference=True, loss_chunk=1024)
    rows = assumed_layout(64, True, "")
    wide = replace(DENSE, num_layers=2, vocab_size=5000)
    few, all_tokens = (count_activations(wide, replace(step, layout=rows.labelled(share))) for share in (0.25, 1.0))
    assert few < 0.5 * all_tokens

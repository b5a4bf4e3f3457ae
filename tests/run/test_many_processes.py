"""``fit`` on many processes: saved on some, resumed on others, the losses go on as if nothing had happened."""

from __future__ import annotations

import copy
import os
import tempfile
from contextlib import redirect_stderr, redirect_stdout
from pathlib import Path

import pytest
from helpers import cli, llmrecipes, trajectory, write_recipe
from jobs import Job
from ranks import run_ranks

STEPS = 12
SHARDED = "llmrecipes.distributed.ShardedStrategy"


@pytest.fixture(scope="module")
def fp64_recipe(recipe):
    """The MoE with its balance loss and dropout in fp64, where differences are mistakes and not rounding."""
    config = recipe(moe=True, steps=STEPS, global_batch=8)
    config["name"] = "run"
    config["model"]["class_path"] = "fp64_module.Fp64Module"
    config["model"]["init_args"]["schedule"]["init_args"]["decay"] = f"{STEPS} steps"
    return config


def fit(path, root, nodes, per_node, steps, mode=None, **options):
    """``fit`` on every rank, as torchrun starts it; returns exit codes and what each said."""
    words = ["fit", "--config", path, "--run_root", root, "--trainer.max_steps", steps]
    if mode is not None:
        words += [f"--trainer.devices={per_node}", f"--trainer.num_nodes={nodes}"]
        words += [f"--trainer.strategy={SHARDED}", f"--trainer.strategy.init_args.mode={mode}"]
        words += [f"--trainer.strategy.init_args.{key}={value}" for key, value in options.items()]
    return on_ranks(nodes * per_node, words, nodes)


def on_ranks(ranks, words, nodes=1):
    """The command on every rank; returns exit codes and what each said."""
    folder = Path(tempfile.mkdtemp())
    try:
        codes = run_ranks(ranks, _fit, words, folder, nodes=nodes)
    except AssertionError as error:  # a process that ends at once returns nothing, but has spoken
        said = "\n".join(f"--- {path.name}\n{path.read_text()}" for path in sorted(folder.iterdir()))
        raise AssertionError(f"{error}\n{said}") from None
    return [(code, (folder / f"rank-{rank}").read_text()) for rank, code in enumerate(codes)]


def _fit(words, folder):
    with (
        (folder / f"rank-{os.environ['RANK']}").open("w", buffering=1) as out,
        redirect_stdout(out),
        redirect_stderr(out),
    ):
        try:
            return cli(*words)
        except SystemExit as end:  # rank 0 has said it
            return end.code


def worst(records, expected):
    """The largest difference of any figure; texts, such as the batch's digest, must be equal."""
    assert [r.keys() for r in records] == [r.keys() for r in expected]
    largest = 0.0

    def gap(left, right):
        nonlocal largest
        if isinstance(left, list):
            for a, b in zip(left, right, strict=True):
                gap(a, b)
        elif isinstance(left, str):
            assert left == right
        else:
            largest = max(largest, abs(left - right))

    for record, other in zip(records, expected, strict=True):
        for name, value in record.items():
            gap(value, other[name])
    return largest


WAYS = {
    "1": (1, 1, None, {}),
    "2 full_shard": (1, 2, "full_shard", {}),
    "4 full_shard, experts divided": (1, 4, "full_shard", {"expert_parallel": 2}),
    "4 as 2 x 2 hybrid": (2, 2, "hybrid_shard", {}),
    "4 no_shard": (1, 4, "no_shard", {}),
}


# In make test; tests/checkpoint/test_reshard.py has what every layout saves and loads.
QUICK = ("1", "4 full_shard, experts divided")


@pytest.fixture(scope="module")
def single(tmp_path_factory, fp64_recipe):
    """The uninterrupted run of one process."""
    folder = tmp_path_factory.mktemp("single")
    ((code, said),) = fit(write_recipe(folder, fp64_recipe), folder, 1, 1, STEPS)
    assert code == 0, said
    return trajectory(folder / "run")


@pytest.mark.slow
@pytest.mark.parametrize(
    "before",
    [pytest.param(way, marks=[pytest.mark.release] * (way not in QUICK)) for way in WAYS],
)
def test_saved_on_some_resumed_on_others(tmp_path, fp64_recipe, single, before, stride):
    path = write_recipe(tmp_path, fp64_recipe)
    nodes, per_node, mode, options = WAYS[before]
    names, resumed = list(WAYS), 0
    # One of five; before a release, all.
    after = names if stride(5) == 1 else [names[(names.index(before) + 2) % len(names)]]
    for name in after:
        nodes_after, per_node_after, mode_after, options_after = WAYS[name]
        root = tmp_path / name.replace(" ", "-")
        for code, said in fit(path, root, nodes, per_node, 7, mode, **options):
            assert code == 0, said
        results = fit(path, root, nodes_after, per_node_after, STEPS, mode_after, **options_after)
        assert [code for code, _ in results] == [0] * (nodes_after * per_node_after), results
        assert "step=000007: 7 steps" in results[0][1]
        records = [r for r in trajectory(root / "run") if not ("val_loss" in r and r["step"] == 7)]
        assert [r["step"] for r in records if "loss" in r] == list(range(1, STEPS + 1))
        assert worst(records, single) < 1e-10, name
        resumed += 1
    assert resumed == (5 if stride(5) == 1 else 1) and len(WAYS) == 5


@pytest.mark.release
def test_pr_moe_saved_on_four_resumed_on_one(tmp_path, fp64_recipe):
    """Layers of different sizes, a coefficient of two rows for four processes, drops drawn anew after a resume."""
    recipe = copy.deepcopy(fp64_recipe)
    config = recipe["model"]["init_args"]["config"]
    config["ffn_dim"] = 32
    config["moe"] = {"ffn_dim": 32, "top_k": 1, "renormalize": False, "residual": True, "capacity_factor": 1.0}
    config["moe"] |= {"experts_per_layer": [2, *[6] * (config["num_layers"] - 1)], "min_capacity": 1}
    path = write_recipe(tmp_path, recipe)
    ((code, said),) = fit(path, tmp_path / "whole", 1, 1, STEPS)
    assert code == 0, said
    whole = trajectory(tmp_path / "whole" / "run")
    assert all(max(r["dropped_fraction"]) > 0 for r in whole if "loss" in r)
    for code, said in fit(path, tmp_path, 1, 4, 7, "full_shard", expert_parallel=2):
        assert code == 0, said
    ((code, said),) = fit(path, tmp_path, 1, 1, STEPS)
    assert code == 0 and "step=000007: 7 steps" in said, said
    records = [r for r in trajectory(tmp_path / "run") if not ("val_loss" in r and r["step"] == 7)]
    assert worst(records, whole) < 1e-10
    recipe["data"]["init_args"]["micro_batch"] //= 2
    ((code, said),) = fit(write_recipe(tmp_path, recipe), tmp_path, 1, 1, STEPS + 1)
    assert code == 2 and "data.micro_batch" in said, said


def test_rank_0_speaks_for_all(tmp_path, fp64_recipe):
    path = write_recipe(tmp_path, fp64_recipe)
    (_, first), (_, second) = fit(path, tmp_path, 1, 2, STEPS, "full_shard")
    assert "full_shard: 1 x 2 (copies x processes that share one)" in first
    assert "step: 8 sequences x 32 = 256 tokens, 2 micro-batches of 2 per process" in first
    assert second.strip() == ""
    assert (tmp_path / "run" / "DONE").exists()
    # Nothing to do: said once, and nobody waits for anybody.
    results = fit(path, tmp_path, 1, 2, STEPS, "full_shard")
    assert [code for code, _ in results] == [0, 0]
    assert "nothing to do" in results[0][1] and results[1][1].strip() == ""


def test_a_mistake_that_only_rank_0_sees_ends_all(tmp_path, fp64_recipe):
    path = write_recipe(tmp_path, fp64_recipe)
    words = ["fit", "--config", path, "--run_root", tmp_path, "--resume", "required", "--trainer.devices=2"]
    words += [f"--trainer.strategy={SHARDED}", "--trainer.strategy.init_args.mode=full_shard"]
    results = on_ranks(2, words)
    assert [code for code, _ in results] == [2, 2], results
    assert "nothing to resume from" in results[0][1]


@pytest.mark.release
def test_the_launcher_starts_the_other_processes(tmp_path, recipe):
    config = recipe(steps=4, global_batch=8)
    config["trainer"] |= {"devices": 2, "strategy": {"class_path": SHARDED, "init_args": {"mode": "hybrid_shard"}}}
    path = write_recipe(tmp_path, config)
    with Job(tmp_path / "output", ["fit", "--config", path, "--run_root", tmp_path], ranks=1) as refused:
        assert refused.wait() == [2]
        assert "there is one node (1 node x 2 processes = 2)" in refused.text("err", 0)
    config["trainer"]["strategy"]["init_args"] = {"mode": "zero3"}
    path = write_recipe(tmp_path, config)
    done = llmrecipes("fit", "--config", path, "--run_root", tmp_path, cwd=tmp_path)
    assert "done: 4 steps" in done.stdout
    assert done.stdout.count("step 4/4") == 1
    assert len(trajectory(tmp_path / "dense")) == 5

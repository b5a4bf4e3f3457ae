"""A rollback on two processes that share the parameters: together, and as one process would."""

from __future__ import annotations

import pytest
from helpers import cli, trajectory, write_recipe
from ranks import run_ranks
from test_stability import QUICK, STEPS, die_after, records

from llmrecipes.checkpoint import read_tensors

SPIKE = {"action": "rollback", "patience": 3}


def write(tmp_path, recipe, name, devices, **stability):
    config = recipe(steps=STEPS)
    config["name"] = name
    config["model"]["class_path"] = "poison.Poisoned"
    config["model"]["init_args"] |= {"steps": [14, 15, 16]}
    config["stability"] = QUICK | stability
    config["checkpoint"] = {"every": "3 steps", "keep_last": 3}
    if devices > 1:
        strategy = {"class_path": "llmrecipes.distributed.ShardedStrategy", "init_args": {"mode": "full_shard"}}
        config["trainer"] |= {"devices": devices, "strategy": strategy}
    return write_recipe(tmp_path, config, f"{name}.yaml")


def fit(path, root, die_at):
    with pytest.MonkeyPatch.context() as patch:
        if die_at:
            die_after(patch, die_at)
        return cli("fit", "--config", path, "--run_root", root)


def on_two(path, root, die_at=None):
    assert run_ranks(2, fit, path, root, die_at, timeout=200) == [0, 0]


def model(folder):
    return read_tensors(folder / "checkpoints" / f"step={STEPS:06d}", "model")


@pytest.mark.parametrize(
    "point", [*(pytest.param(p, marks=pytest.mark.release) for p in (None, "write_rollbacks")), "go_back"]
)
def test_rollback_on_two_ranks_is_the_clean_run_that_skipped(tmp_path, recipe, point):
    path = write(tmp_path, recipe, "run", 2, **SPIKE)
    if point:
        with pytest.raises(AssertionError, match=r"died with \[9"):
            on_two(path, tmp_path, point)
    on_two(path, tmp_path)
    on_two(write(tmp_path, recipe, "clean", 2, skip_steps=[[13, 16]]), tmp_path)
    run, clean = tmp_path / "run", tmp_path / "clean"
    assert records(run) == records(clean)
    expected = model(clean)
    assert expected
    assert all(tensor.equal(expected[name]) for name, tensor in model(run).items())
    # One process decides the same from the same figures, to rounding.
    assert cli("fit", "--config", write(tmp_path, recipe, "alone", 1, **SPIKE), "--run_root", tmp_path) == 0
    losses = [[r["loss"] for r in trajectory(folder) if "loss" in r] for folder in (run, tmp_path / "alone")]
    assert losses[0] == pytest.approx(losses[1], rel=1e-3)
    assert [r["step"] for r in records(tmp_path / "alone") if "skipped" in r] == [13, 14, 15, 16]

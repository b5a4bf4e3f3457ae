"""A little recipe whose runs are broken here, and the same runs whole."""

from __future__ import annotations

from pathlib import Path

import pytest
from broken_runs import fit
from helpers import write_recipe

STEPS = 12


@pytest.fixture(scope="session")
def little(recipe):
    """``little(ranks=2)``: a recipe of one block, a checkpoint and a validation every 3 of 12 steps, all logged."""

    def make(ranks: int = 1, steps: int = STEPS, timeout: float = 30) -> dict:
        config = recipe(steps=steps, micro_batch=1, valid_batches=1)
        config["model"]["init_args"]["config"] |= {"dim": 16, "num_layers": 1, "ffn_dim": 24}
        config["trainer"]["val_check_interval"] = 3
        config["name"] = "run"
        if ranks > 1:
            strategy = {"mode": "full_shard", "timeout": timeout, "start_timeout": 20}
            config["trainer"] |= {
                "devices": ranks,
                "strategy": {"class_path": "llmrecipes.distributed.ShardedStrategy", "init_args": strategy},
            }
        return config

    return make


@pytest.fixture(scope="session")
def whole(tmp_path_factory, little):
    """``whole(ranks)``: run folder of the uninterrupted run, made once. Read only."""
    made: dict[int, Path] = {}

    def make(ranks: int = 1) -> Path:
        if ranks not in made:
            folder = tmp_path_factory.mktemp(f"whole-{ranks}")
            write_recipe(folder, little(ranks))
            fit(folder, ranks=ranks)
            made[ranks] = folder / "run"
        return made[ranks]

    return make

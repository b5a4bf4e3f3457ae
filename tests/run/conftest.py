"""Finished and stopped runs, made once and copied by the tests that go on from them."""

from __future__ import annotations

import json
import shutil
from pathlib import Path

import pytest
from helpers import cli, write_recipe

from llmrecipes.callbacks import loss_curve
from llmrecipes.run import fit as fit_module


@pytest.fixture(autouse=True)
def no_picture(monkeypatch):
    """tests/callbacks draws pictures; here each would cost as much as the run."""
    for module in (loss_curve, fit_module):
        monkeypatch.setattr(module, "draw_loss_curve", lambda metrics, picture: False)


def steps_12(recipe, **data):
    """The recipe of all runs here: 12 steps, with a decay that does not depend on the run's length."""
    config = recipe(steps=12, **data)
    config["model"]["init_args"]["schedule"]["init_args"]["decay"] = "12 steps"
    return config


@pytest.fixture
def path(tmp_path, recipe) -> Path:
    """The recipe's file."""
    return write_recipe(tmp_path, steps_12(recipe))


@pytest.fixture
def fit(tmp_path, path):
    """``fit("--seed", 3)``: runs the recipe with ``tmp_path`` as run root and returns the exit code."""

    def run(*words, config=path):
        return cli("fit", "--config", config, "--run_root", tmp_path, *words)

    return run


@pytest.fixture(scope="session")
def finished(tmp_path_factory, recipe) -> Path:
    """Run folder of 12 steps in one go. Read only."""
    folder = tmp_path_factory.mktemp("finished")
    path = write_recipe(folder, steps_12(recipe))
    assert cli("fit", "--config", path, "--run_root", folder) == 0
    return folder / "dense"


@pytest.fixture(scope="session")
def stopped(tmp_path_factory, finished) -> Path:
    """Run folder as ``kill -9`` leaves it while step 11 is logged: checkpoints of steps 8 and 9. Read only."""
    run = shutil.copytree(finished, tmp_path_factory.mktemp("stopped") / "dense", symlinks=True)
    shutil.rmtree(run / "checkpoints" / "step=000012")
    (run / "checkpoints" / "latest").unlink()
    (run / "checkpoints" / "latest").symlink_to("step=000009")
    (run / "DONE").unlink()
    lines = (run / "metrics.jsonl").read_text().splitlines(keepends=True)
    (eleventh,) = [i for i, line in enumerate(lines) if '"step": 11' in line]
    (run / "metrics.jsonl").write_text("".join(lines[:eleventh]) + lines[eleventh][:40])
    best = next(r["val_loss"] for r in map(json.loads, lines) if r["step"] == 8 and "val_loss" in r)
    (run / "checkpoints" / "validated.json").write_text(json.dumps({"step": 8, "best_step": 8, "best_loss": best}))
    return run


@pytest.fixture
def go_on(tmp_path, stopped) -> Path:
    """A copy of ``stopped`` where ``fit`` finds it."""
    return shutil.copytree(stopped, tmp_path / "dense", symlinks=True)


@pytest.fixture
def over(tmp_path, finished) -> Path:
    """A copy of ``finished`` where ``fit`` finds it."""
    return shutil.copytree(finished, tmp_path / "dense", symlinks=True)

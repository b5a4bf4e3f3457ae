"""The resume oracle: a killed and resumed run is the uninterrupted one, bit for bit."""

from __future__ import annotations

import os
import random
import signal
import subprocess
import sys
import time
from contextlib import redirect_stderr, redirect_stdout

import pytest
from helpers import cli, llmrecipes, saved_tensors, trajectory, write_recipe
from jobs import Job

from llmrecipes.run import fit as fit_module
from llmrecipes.run.recipe_cli import RecipeCLI


def fit(folder, path):
    """In a process of its own; what it said."""
    return llmrecipes("fit", "--config", path, "--run_root", folder, cwd=folder).stdout


def cli_output(folder, path):
    """In this process; what it said."""
    with (folder / "said.txt").open("w") as said, redirect_stdout(said), redirect_stderr(said):
        assert cli("fit", "--config", path, "--run_root", folder) == 0
    return (folder / "said.txt").read_text()


def kill_at_step(folder, path, run, step):
    """Start a fit, kill it with SIGKILL as soon as ``step`` is logged, and see that it died of it."""
    command = [sys.executable, "-m", "llmrecipes", "fit", "--config", path, "--run_root", folder]
    process = subprocess.Popen(command, cwd=folder, stdout=subprocess.DEVNULL, stderr=subprocess.DEVNULL)
    metrics, end = run / "metrics.jsonl", time.time() + 120
    while not (metrics.exists() and any(r["step"] >= step for r in trajectory(run))):
        assert process.poll() is None, "finished before it could be killed"
        assert time.time() < end, "too slow"
        time.sleep(0.002)
    process.kill()
    assert process.wait() == -signal.SIGKILL


def kill_job_at_step(folder, path, run, step):
    """The same in a forked process."""
    with Job(folder / "output", ["fit", "--config", path, "--run_root", folder], ranks=1) as job:
        job.until(lambda: (run / "metrics.jsonl").exists() and any(r["step"] >= step for r in trajectory(run)))
        job.send(signal.SIGKILL)
        assert job.wait() == [-signal.SIGKILL]


@pytest.mark.parametrize(
    ("moe", "kill", "again"),
    [
        pytest.param(False, kill_job_at_step, cli_output, id="dense"),
        pytest.param(True, kill_at_step, fit, id="moe, as a user starts it"),
    ],
)
def test_killed_and_resumed_equals_uninterrupted(tmp_path, recipe, moe, kill, again):
    whole, broken = tmp_path / "whole", tmp_path / "broken"
    broken.mkdir()
    config = recipe(moe=moe, steps=24)
    # Dropout is on in the fixture, so that the random generators matter.
    assert config["model"]["init_args"]["config"]["dropout"] > 0
    path = write_recipe(tmp_path, config)
    name = config["name"]
    assert cli("fit", "--config", path, "--run_root", whole) == 0
    kill(broken, path, broken / name, step=11)
    assert "resuming from" in again(broken, path)
    records = trajectory(whole / name)
    assert trajectory(broken / name) == records
    steps = [r for r in records if "loss" in r]
    assert [r["step"] for r in steps] == list(range(1, 25))
    assert [r["step"] for r in records if "val_loss" in r] == [4, 8, 12, 16, 20, 24]
    assert {"loss", "grad_norm", "lr", "batch"} <= set(steps[0])
    assert saved_tensors(whole / name, 24) == saved_tensors(broken / name, 24)


def test_mutant_with_generators_that_do_not_follow_the_step_differs(tmp_path, recipe, monkeypatch):
    """The oracle has teeth: dropout from generators that are neither restored nor seeded by the step is another run."""
    from llmrecipes.checkpoint import callback
    from llmrecipes.cli import main
    from llmrecipes.modules import StepModule

    config = recipe(steps=12)
    config["model"]["init_args"]["schedule"]["init_args"]["decay"] = "12 steps"
    config["trainer"]["val_check_interval"] = 6
    path = write_recipe(tmp_path, config)
    words = ["fit", "--config", str(path), "--run_root"]

    def twice(root):
        assert main([*words, str(tmp_path / root), "--trainer.max_steps", "6"]) == 0
        assert main([*words, str(tmp_path / root)]) == 0
        return trajectory(tmp_path / root / "dense")

    assert main([*words, str(tmp_path / "whole")]) == 0
    assert twice("good") == trajectory(tmp_path / "whole" / "dense")
    # Without the seed of each micro-batch the generators run on; restored from the checkpoint they are still exact.
    monkeypatch.setattr(StepModule, "seed_micro_batch", lambda self, step, index: None)
    assert main([*words, str(tmp_path / "running")]) == 0
    running = trajectory(tmp_path / "running" / "dense")
    assert running != trajectory(tmp_path / "whole" / "dense")
    assert twice("restored") == running
    monkeypatch.setattr(callback, "set_rng_state", lambda state: None)
    assert twice("mutant") != running


def forked(recipe: RecipeCLI) -> int:
    """``fit`` of a recipe that is parsed already, in a process of its own; silent."""
    pid = os.fork()
    if pid == 0:
        code = 1
        try:
            sys.stdout = sys.stderr = open(os.devnull, "w")  # noqa: SIM115
            fit_module.RecipeCLI = lambda subcommand, words: recipe
            code = cli(*recipe.words)
        finally:
            os._exit(code)
    return pid


def ended(pid: int) -> int:
    return os.waitstatus_to_exitcode(os.waitpid(pid, 0)[1])


def test_twenty_kills_at_random_instants_lose_nothing(tmp_path, recipe):
    kills, steps, chance = 20, 120, random.Random(3)
    config = recipe(moe=True, steps=steps)
    config["checkpoint"]["every"] = "5 steps"
    config["trainer"]["val_check_interval"] = 40
    path = write_recipe(tmp_path, config)

    def parsed(root):
        words = ["fit", "--config", str(path), "--run_root", str(tmp_path / root)]
        made = RecipeCLI(words[0], words[1:])
        made.words = words
        return made

    killed, metrics = parsed("killed"), tmp_path / "killed" / "moe" / "metrics.jsonl"

    def logged():
        return metrics.read_bytes().count(b'"loss"') if metrics.exists() else 0

    for kill in range(kills):
        pid = forked(killed)
        if kill % 4 == 3:
            time.sleep(chance.uniform(0.0, 0.6))  # while it starts, reads the checkpoint, takes its first steps
        else:
            target = max(logged(), steps * kill // (kills + 2)) + chance.randrange(1, 6)
            while logged() < target and os.waitpid(pid, os.WNOHANG) == (0, 0):
                time.sleep(0.001)
            time.sleep(chance.uniform(0.0, 0.06))  # somewhere in the next steps or in the writing of a checkpoint
        os.kill(pid, signal.SIGKILL)
        assert ended(pid) == -signal.SIGKILL
    assert ended(forked(killed)) == 0
    assert ended(forked(parsed("whole"))) == 0
    found, whole = (trajectory(tmp_path / root / "moe") for root in ("killed", "whole"))
    assert len([r for r in whole if "loss" in r]) == steps
    assert found == whole
    log = (tmp_path / "killed" / "moe" / "log.txt").read_text(encoding="utf-8")
    assert log.count("resuming from") >= kills // 2


def test_sigterm_saves_at_a_step_boundary_and_exits_75(tmp_path, recipe):
    path, run = write_recipe(tmp_path, recipe(steps=400)), tmp_path / "dense"
    with Job(tmp_path / "output", ["fit", "--config", path, "--run_root", tmp_path], ranks=1) as job:
        job.until_step(run, 4)
        job.send(signal.SIGTERM)
        assert job.wait() == [75], job.errors()
        output = job.text("out", 0)
    last = trajectory(run)[-1]["step"]
    assert f"SIGTERM: stopped after step {last}" in output
    assert (run / "checkpoints" / f"step={last:06d}" / "manifest.json").exists()

"""The resume oracle: a killed and resumed run is the uninterrupted one, bit for bit."""

from __future__ import annotations

import os
import signal
import subprocess
import sys
import time

import pytest
from helpers import llmrecipes, saved_tensors, trajectory, write_recipe


def fit(folder, path, *words, **options):
    return llmrecipes("fit", "--config", path, "--run_root", folder, *words, cwd=folder, **options)


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


@pytest.mark.parametrize("moe", [False, True], ids=["dense", "moe"])
def test_killed_and_resumed_equals_uninterrupted(tmp_path, recipe, moe):
    whole, broken = tmp_path / "whole", tmp_path / "broken"
    whole.mkdir()
    broken.mkdir()
    config = recipe(moe=moe, steps=24)
    # Dropout is on in the fixture, so that the random generators matter.
    assert config["model"]["init_args"]["config"]["dropout"] > 0
    path = write_recipe(tmp_path, config)
    name = config["name"]
    fit(whole, path)
    kill_at_step(broken, path, broken / name, step=11)
    resumed = fit(broken, path)
    assert "resuming from" in resumed.stdout
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


KILL_LOOP = """
import os, random, signal, sys, time
from pathlib import Path
import llmrecipes.run.fit  # imported once; the children are forked and start in a moment
from llmrecipes.cli import main

kills, steps, metrics, words = int(sys.argv[1]), int(sys.argv[2]), Path(sys.argv[3]), sys.argv[4:]
random.seed(3)


def start():
    pid = os.fork()
    if pid == 0:
        sys.stdout = sys.stderr = open(os.devnull, "w")
        os._exit(main(words))
    return pid


def logged():
    return metrics.read_bytes().count(b'"loss"') if metrics.exists() else 0


for kill in range(kills):
    pid = start()
    if kill % 4 == 3:
        time.sleep(random.uniform(0.0, 0.6))  # while it starts, reads the checkpoint, takes its first steps
    else:
        target = max(logged(), steps * kill // (kills + 2)) + random.randrange(1, 12)
        while logged() < target and os.waitpid(pid, os.WNOHANG) == (0, 0):
            time.sleep(0.001)
        time.sleep(random.uniform(0.0, 0.06))  # somewhere in the next steps or in the writing of a checkpoint
    os.kill(pid, signal.SIGKILL)
    assert os.waitstatus_to_exitcode(os.waitpid(pid, 0)[1]) == -signal.SIGKILL
_, status = os.waitpid(start(), 0)
print("killed", kills, "then", os.waitstatus_to_exitcode(status))
"""


def test_twenty_kills_at_random_instants_lose_nothing(tmp_path, recipe, stride):
    kills, steps = 20 // stride(2), 240 // stride(2)
    config = recipe(moe=True, steps=steps)
    config["checkpoint"]["every"] = "5 steps"
    config["trainer"]["val_check_interval"] = 40
    path = write_recipe(tmp_path, config)

    def run(kills, root):
        words = ["fit", "--config", path, "--run_root", tmp_path / root]
        loop = [sys.executable, "-c", KILL_LOOP, kills, steps, tmp_path / root / "moe" / "metrics.jsonl", *words]
        done = subprocess.run([str(word) for word in loop], capture_output=True, text=True, timeout=400)
        assert done.stdout.strip() == f"killed {kills} then 0", done.stdout + done.stderr
        return trajectory(tmp_path / root / "moe")

    killed, whole = run(kills, "killed"), run(0, "whole")
    assert len([r for r in whole if "loss" in r]) == steps
    assert killed == whole
    log = (tmp_path / "killed" / "moe" / "log.txt").read_text(encoding="utf-8")
    assert log.count("resuming from") >= kills // 2


def test_sigterm_saves_at_a_step_boundary_and_exits_75(tmp_path, recipe):
    path = write_recipe(tmp_path, recipe(steps=400))
    command = [sys.executable, "-m", "llmrecipes", "fit", "--config", path, "--run_root", tmp_path]
    process = subprocess.Popen(command, cwd=tmp_path, stdout=subprocess.PIPE, text=True, env=os.environ)
    run, end = tmp_path / "dense", time.time() + 120
    while not (run / "metrics.jsonl").exists() or len(trajectory(run)) < 4:
        assert time.time() < end
        time.sleep(0.01)
    process.send_signal(signal.SIGTERM)
    output, _ = process.communicate(timeout=60)
    assert process.returncode == 75, output
    last = trajectory(run)[-1]["step"]
    assert f"SIGTERM: stopped after step {last}" in output
    assert (run / "checkpoints" / f"step={last:06d}" / "manifest.json").exists()

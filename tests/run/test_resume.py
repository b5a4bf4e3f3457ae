"""The resume oracle: a killed and resumed run is the uninterrupted one, bit for bit."""

from __future__ import annotations

import os
import signal
import subprocess
import sys
import time

import pytest
from conftest import llmrecipes, trajectory, write_recipe


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
    for part in ("model", "optimizer", "rng-00000"):
        file = f"checkpoints/step=000024/{part}.safetensors"
        assert (whole / name / file).read_bytes() == (broken / name / file).read_bytes(), part


def test_mutant_without_rng_differs(tmp_path, recipe, monkeypatch, capsys):
    """The oracle has teeth: when the random generators are not restored, the trajectory is another one."""
    from llmrecipes.checkpoint import callback
    from llmrecipes.cli import main

    config = recipe(steps=12)
    config["model"]["init_args"]["schedule"]["init_args"]["decay"] = "12 steps"
    path = write_recipe(tmp_path, config)
    words = ["fit", "--config", str(path), "--run_root"]
    assert main([*words, str(tmp_path / "whole")]) == 0
    for root in ("good", "mutant"):
        assert main([*words, str(tmp_path / root), "--trainer.max_steps", "6"]) == 0
        if root == "mutant":
            monkeypatch.setattr(callback, "set_rng_state", lambda state: None)
        assert main([*words, str(tmp_path / root)]) == 0
    expected = trajectory(tmp_path / "whole" / "dense")
    assert trajectory(tmp_path / "good" / "dense") == expected
    assert trajectory(tmp_path / "mutant" / "dense") != expected


KILL_LOOP = """
import os, random, signal, sys, time
import llmrecipes.run.fit  # imported once; the children are forked and start in a moment
from llmrecipes.cli import main
words, kills = sys.argv[2:], int(sys.argv[1])
random.seed(3)
def start():
    pid = os.fork()
    if pid == 0:
        sys.stdout = sys.stderr = open(os.devnull, "w")
        os._exit(main(words))
    return pid
done = 0
while done < kills:
    pid = start()
    time.sleep(random.uniform(0.15, 1.6))
    finished, status = os.waitpid(pid, os.WNOHANG)
    if finished:
        sys.exit(f"finished after {done} kills with status {status}: make the run longer")
    os.kill(pid, signal.SIGKILL)
    os.waitpid(pid, 0)
    done += 1
_, status = os.waitpid(start(), 0)
print("killed", done, "then", os.waitstatus_to_exitcode(status))
"""


def test_twenty_random_kills_lose_nothing(tmp_path, recipe):
    config = recipe(moe=True, steps=4000)
    config["checkpoint"]["every"] = "5 steps"
    config["trainer"]["val_check_interval"] = 50
    config["model"]["init_args"]["schedule"]["init_args"]["decay"] = "4000 steps"
    path = write_recipe(tmp_path, config)
    words = ["fit", "--config", str(path), "--run_root", str(tmp_path / "killed")]
    loop = [sys.executable, "-c", KILL_LOOP]
    killed = subprocess.run([*loop, "20", *words, "--trainer.max_steps", "4000"], capture_output=True, text=True, timeout=400)
    assert killed.stdout.strip() == "killed 20 then 0", killed.stdout + killed.stderr
    whole = subprocess.run(
        [*loop, "0", *words[:-1], str(tmp_path / "whole"), "--trainer.max_steps", "4000"], capture_output=True, text=True, timeout=400
    )
    assert whole.stdout.strip() == "killed 0 then 0", whole.stderr
    assert trajectory(tmp_path / "killed" / "moe") == trajectory(tmp_path / "whole" / "moe")


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

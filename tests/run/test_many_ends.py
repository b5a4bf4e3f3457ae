"""How jobs of several ranks end: agreed stops, dead, hung and disagreeing ranks. Nothing hangs; all is named."""

from __future__ import annotations

import contextlib
import os
import random
import re
import shutil
import signal
import subprocess
import sys
import time
from pathlib import Path

import pytest
from helpers import trajectory, write_recipe
from jobs import Job, SelfStarted, losses, many

from llmrecipes.data import PackedShards

# From a fault to the end of the last rank, with a timeout of 8 s; generous, since the machine is shared.
FOUND_WITHIN = 45.0


@pytest.fixture
def job(tmp_path, recipe):
    """``job(steps=..., words=...)``: starts a job of two ranks on the recipe, in ``tmp_path/dense``."""
    started = []

    def start(steps=400, ranks=2, words=(), config=None, root=tmp_path, **options) -> Job:
        config = config or many(long_recipe(recipe, steps), ranks)
        path = write_recipe(tmp_path, config)
        base = ["fit", "--config", path, "--run_root", root]
        more = words if callable(words) else lambda rank: list(words)
        started.append(Job(tmp_path / "output", lambda rank: base + more(rank), ranks, **options))
        return started[-1]

    yield start
    for one in started:
        one.kill()


def long_recipe(recipe, steps):
    """Seldom saved and validated, so that a stop is what saves."""
    config = recipe(steps=steps)
    config["trainer"]["val_check_interval"] = 1000
    config["checkpoint"]["every"] = "1000 steps"
    config["model"]["init_args"]["schedule"]["init_args"]["decay"] = f"{steps} steps"
    return config


def saved_steps(run):
    return sorted(int(path.name[5:]) for path in (run / "checkpoints").glob("step=*"))


# ---- agreed stops


@pytest.mark.parametrize("to", [(0,), (1,), ()], ids=["rank 0", "rank 1", "all"])
def test_one_signal_to_anybody_stops_all_at_one_step(tmp_path, job, to):
    running = job()
    running.until_step(tmp_path / "dense", 5)
    running.send(signal.SIGUSR1, *to)
    assert running.wait() == [75, 75], running.errors()
    (step,) = saved_steps(tmp_path / "dense")
    assert losses(tmp_path / "dense")[-1]["step"] == step >= 5
    named = to[0] if to else "[01]"  # of all, whoever saw it before the others
    assert re.search(f"SIGUSR1 on rank {named}: stopped after step {step}, saved", running.text("out", 0))
    assert "self-check: 2 ranks agree on" in running.text("out", 0)
    assert "self-check: the first gradients are the same on all ranks" in running.text("out", 0)
    assert running.text("out", 1) == "" == running.text("err", 0) == running.text("err", 1)


def test_a_stop_file_and_a_time_limit(tmp_path, job):
    run = tmp_path / "dense"
    running = job()
    running.until_step(run, 3)
    (run / "STOP").touch()
    assert running.wait() == [75, 75], running.errors()
    assert f"{run}/STOP exists: stopped after step" in running.text("out", 0)
    assert not (run / "STOP").exists()
    (first,) = saved_steps(run)
    running = job(words=["--stop.time_limit", "8s"], before=slowly)
    assert running.wait() == [75, 75], running.errors()
    assert "time limit 8s: stopped after step" in running.text("out", 0)
    assert max(saved_steps(run)) > first


@pytest.mark.slow
def test_signals_at_many_instants_to_anybody_lose_nothing(tmp_path, recipe, job, stride):
    """While it starts, in a step, while it saves, while it ends; to one rank, to all, to one after the other."""
    whole, broken = tmp_path / "whole" / "dense", tmp_path / "broken" / "dense"
    steps, choose = 160 // stride(2), random.Random(5)
    config = many(long_recipe(recipe, steps))
    assert job(config=config, root=whole.parent).wait() == [0, 0]
    stops = 0
    while stops < 20 // stride(5):
        running = job(config=config, root=broken.parent)
        if stops % 4 == 3:
            time.sleep(choose.uniform(0.0, 2.0))  # anywhere in its start
        else:
            done = len(losses(broken)) if (broken / "metrics.jsonl").exists() else 0
            running.until_step(broken, done + choose.randrange(1, 7))
            time.sleep(choose.uniform(0.0, 0.05))
        number = choose.choice([signal.SIGTERM, signal.SIGUSR1, signal.SIGINT])
        for rank in choose.choice([(0,), (1,), (0, 1), (1, 0)]):
            running.send(number, rank)
            time.sleep(choose.choice([0.0, choose.uniform(0.0, 0.2)]))
            running.poll()
        assert running.wait() == [75, 75], running.errors()
        assert running.text("err", 1) == "", running.errors()
        assert len(re.findall("stopped after step", running.text("out", 0))) == 1
        stops += 1
    assert len(losses(broken)) < steps, "it was over before the last signal"
    assert job(config=config, root=broken.parent).wait() == [0, 0]
    assert trajectory(broken) == trajectory(whole)
    assert [record["step"] for record in losses(broken)] == list(range(1, steps + 1))


# ---- dead and hung ranks


def ends(running, *ranks):
    """Exit codes of these ranks, found in time; the lines of rank 0's standard error, or of the first of them."""
    started = time.monotonic()
    codes = running.wait(*ranks)
    assert time.monotonic() - started < FOUND_WITHIN
    return codes, running.text("err", ranks[0] if ranks else 0).splitlines()


@pytest.mark.parametrize(
    ("victim", "number"),
    [
        pytest.param(0, signal.SIGSTOP, id="0-STOP"),
        pytest.param(1, signal.SIGKILL, id="1-KILL"),
        # tests/faults has these two in make test.
        pytest.param(0, signal.SIGKILL, id="0-KILL", marks=pytest.mark.release),
        pytest.param(1, signal.SIGSTOP, id="1-STOP", marks=pytest.mark.release),
    ],
)
def test_a_dead_or_stopped_rank_is_named(tmp_path, job, number, victim):
    running = job()
    running.until_step(tmp_path / "dense", 5)
    running.send(number, victim)
    other = 1 - victim
    codes, lines = ends(running, other)
    assert codes == [1]
    (line,) = (line for line in lines if line.startswith(("error", "[rank 1] error")))  # torch's C++ has more to say
    assert f"rank {victim} (pid {running.pids[victim]} on {os.uname().nodename})" in line, line
    assert "is dead or stopped" in line or "closed the connection" in line
    assert line.endswith("no checkpoint was written yet")


def slowly(rank):
    """Steps that take time and no work."""
    read = PackedShards.step_batch

    def slow(self, number):
        time.sleep(0.2)
        return read(self, number)

    PackedShards.step_batch = slow


def stall(rank, step):
    """In rank ``rank``: reading the data of ``step`` never ends."""

    def before(mine):
        if mine == rank:
            read = PackedShards.step_batch

            def slow(self, number):
                if number == step - 1:
                    time.sleep(1000)
                return read(self, number)

            PackedShards.step_batch = slow

    return before


@pytest.mark.parametrize("rank", [0, pytest.param(1, marks=pytest.mark.release)])
def test_a_rank_that_hangs_in_reading_is_named_and_not_those_that_wait(job, rank):
    running = job(before=stall(rank, step=6))
    codes, lines = ends(running)
    assert codes == [1, 1], running.errors()
    (line,) = lines
    assert f"no progress for 8 s (trainer.strategy timeout): rank {rank} (pid {running.pids[rank]}" in line
    assert "at step 5: reading data (run/test_many_ends.py:" in line  # one batch is read ahead
    assert "in slow); the other ranks wait; no checkpoint was written yet" in line
    assert f"rank {1 - rank}" not in line


def test_a_rank_that_raises_is_named_and_the_others_end(job):
    def before(rank):
        if rank == 1:
            PackedShards.step_batch = lambda self, number: {}[number]

    running = job(before=before)
    codes, lines = ends(running)
    assert codes == [1, 1], running.errors()
    (line,) = lines
    assert f"rank 1 (pid {running.pids[1]} on {os.uname().nodename}) failed: KeyError: 0" in line
    assert running.text("err", 1).count("Traceback") == 1


def test_what_all_ranks_raise_is_said_once(job):
    def before(rank):
        def broken(self, number):
            raise OSError(28, "No space left on device", "/data")

        PackedShards.step_batch = broken

    running = job(before=before)
    codes, lines = ends(running)
    assert codes == [1, 1], running.errors()
    assert lines == ["stopped: no space left on the disk (/data); free some and repeat the command"]
    assert running.text("err", 1) == ""


def test_ranks_with_other_settings_are_named(job):
    running = job(words=lambda rank: ["--data.seed", str(rank)])
    codes, lines = ends(running)
    assert codes == [2, 2], running.errors()
    assert lines[0].startswith(
        f"error: rank 1 on {os.uname().nodename} differs in recipe.data.init_args.seed: 1; rank 0"
    )
    assert running.text("err", 1) == ""


# ---- the launcher; tests/distributed/test_launcher.py has the rest


class Fit:
    """:class:`SelfStarted` as a user starts it: every rank imports everything, which takes most of the time."""

    starts_in = 1.0

    def __init__(self, folder, path) -> None:
        command = [sys.executable, "-m", "llmrecipes", "fit", "--config", str(path), "--run_root", str(folder)]
        self.process = subprocess.Popen(
            command, cwd=folder, stdout=subprocess.PIPE, stderr=subprocess.PIPE, text=True, start_new_session=True
        )
        self.pid, self.send = self.process.pid, self.process.send_signal

    def child(self) -> int:
        """The id of the other rank."""
        file = Path(f"/proc/{self.process.pid}/task/{self.process.pid}/children")
        end = time.monotonic() + 60
        while time.monotonic() < end and self.process.poll() is None:
            for pid in file.read_text().split():
                with contextlib.suppress(OSError):  # git, which is gone already
                    if b"LLMRECIPES_LAUNCHER=" in Path(f"/proc/{pid}/environ").read_bytes():
                        return int(pid)
            time.sleep(0.02)
        raise AssertionError(self.end())

    def until_step(self, run, step) -> None:
        end = time.monotonic() + 120
        while not (run / "metrics.jsonl").exists() or len(losses(run)) < step:
            assert time.monotonic() < end and self.process.poll() is None, self.end()
            time.sleep(0.01)

    def end(self) -> tuple[int, str, str]:
        try:
            out, err = self.process.communicate(timeout=90)
        finally:
            with contextlib.suppress(ProcessLookupError):
                os.killpg(self.process.pid, signal.SIGKILL)
        return self.process.returncode, out, err


def alive(pid: int) -> bool:
    try:
        return Path(f"/proc/{pid}/stat").read_text().rpartition(")")[2].split()[0] != "Z"
    except FileNotFoundError:
        return False


@pytest.fixture(
    params=[
        pytest.param(SelfStarted, id="forked"),
        pytest.param(Fit, id="started", marks=[pytest.mark.release, pytest.mark.slow]),
    ]
)
def start(request):
    """``start(folder, recipe)``: ``fit`` on two ranks, of which the second is started by the first."""
    return request.param


def test_ranks_that_the_command_starts_itself(tmp_path, recipe, start):
    """A dead child, Ctrl-C while they start, a signal to the child alone: each launch goes on from the one before."""
    run, path = tmp_path / "dense", write_recipe(tmp_path, many(long_recipe(recipe, 400)))
    fit = start(tmp_path, path)
    child = fit.child()
    fit.until_step(run, 5)
    os.kill(child, signal.SIGKILL)
    code, _, err = fit.end()
    assert (code, err) == (
        1,
        f"error: rank 1 (pid {child} on {os.uname().nodename}) was killed by SIGKILL; no checkpoint was written yet\n",
    )

    fit = start(tmp_path, path)
    child = fit.child()
    time.sleep(fit.starts_in)
    os.killpg(fit.pid, signal.SIGINT)
    code, out, err = fit.end()
    assert code == 75, out + err
    assert "SIGINT on rank 0: stopped after step 0, nothing was saved" in out
    assert err == "Ctrl-C: stopping after this step; once more to stop at once\n"
    assert not alive(child)

    fit = start(tmp_path, path)
    child = fit.child()
    fit.until_step(run, 5)
    os.kill(child, signal.SIGTERM)
    code, out, err = fit.end()
    assert (code, err) == (75, ""), out + err
    assert f"SIGTERM on rank 1: stopped after step {saved_steps(run)[-1]}, saved" in out


def test_nobody_survives_the_command(tmp_path, recipe, start):
    """Ctrl-C twice while a child is stopped; then the same with SIGKILL."""
    run, path = tmp_path / "dense", write_recipe(tmp_path, many(long_recipe(recipe, 400), timeout=60))
    for number in (signal.SIGINT, signal.SIGKILL):
        fit = start(tmp_path, path)
        child = fit.child()
        fit.until_step(run, 3)
        os.kill(child, signal.SIGSTOP)
        time.sleep(0.5)  # rank 0 waits in a collective that never ends
        fit.send(number)
        time.sleep(0.5)
        fit.send(number)
        code, _, _ = fit.end()
        assert code == {signal.SIGINT: 130, signal.SIGKILL: -9}[number]
        end = time.monotonic() + 10
        while alive(child):
            assert time.monotonic() < end
            time.sleep(0.01)
        shutil.rmtree(run)

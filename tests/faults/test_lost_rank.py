"""A rank that is killed, stopped or stuck: the job ends, the rank is named, and nothing but time is lost."""

from __future__ import annotations

import os
import re
import signal
import time

import pytest
from broken_runs import Job, assert_same, fit, launched, steps_to_repeat
from helpers import trajectory, write_recipe
from report import Case

from llmrecipes.data import PackedShards
from llmrecipes.distributed.watchdog import Watchdog
from llmrecipes.modules import PretrainModule

TIMEOUT = 5.0
RELEASE = pytest.mark.release


def slow(seconds: float):
    """Steps that last, so that a fault comes within one."""

    def inject(rank: int) -> None:
        real = PackedShards.step_batch

        def step_batch(self, step):
            time.sleep(seconds)
            return real(self, step)

        PackedShards.step_batch = step_batch

    return inject


def end_of(job: Job, survivor: int, limit: float) -> tuple[str, float]:
    """What the survivor says before it ends with a failure, and after how many seconds."""
    started = time.monotonic()
    job.until(lambda: survivor in job.ended, limit)
    assert job.ended[survivor] == 1, job.output()
    return job.output(survivor), time.monotonic() - started


@pytest.mark.parametrize(("victim", "step"), [(1, 2), pytest.param(1, 8, marks=RELEASE), (0, 5)])
def test_a_killed_rank(tmp_path, little, whole, victim, step):
    case = Case(4, "one rank killed", 2)
    write_recipe(tmp_path, little(ranks=2, timeout=TIMEOUT))
    with launched(tmp_path, ranks=2, inject=slow(0.05)) as job:
        job.until_step(tmp_path / "run", step)
        os.kill(job.pids[victim], signal.SIGKILL)
        text, seconds = end_of(job, 1 - victim, limit=20)
    assert re.search(rf"rank {victim} \(pid {job.pids[victim]} on \S+\)", text), text
    assert "Traceback" not in text, text
    case.add(steps_to_repeat(tmp_path / "run"), seconds)
    fit(tmp_path, ranks=2)
    assert_same(tmp_path / "run", whole(2), ranks=2)
    case.write()


def test_a_stopped_rank(tmp_path, little, whole):
    """SIGSTOP: the process is there, and silent."""
    case = Case(5, "one rank stopped (SIGSTOP)", 2)
    write_recipe(tmp_path, little(ranks=2, timeout=TIMEOUT))
    with launched(tmp_path, ranks=2, inject=slow(0.05)) as job:
        job.until_step(tmp_path / "run", 4)
        os.kill(job.pids[1], signal.SIGSTOP)
        text, seconds = end_of(job, 0, limit=4 * TIMEOUT)
    assert re.search(rf"rank 1 \(pid {job.pids[1]} on \S+\)", text), text
    case.add(steps_to_repeat(tmp_path / "run"), seconds)
    fit(tmp_path, ranks=2)
    assert_same(tmp_path / "run", whole(2), ranks=2)
    case.write()


# tests/run/test_many_ends.py has rank 0 in make test.
@pytest.mark.parametrize("victim", [pytest.param(0, marks=RELEASE), 1])
def test_a_rank_stuck_in_reading_data(tmp_path, little, whole, victim):
    """A file system that does not answer: every thread of the process is well, the training is not."""
    case = Case(5, "one rank stuck in reading data", 2)
    write_recipe(tmp_path, little(ranks=2, timeout=TIMEOUT))

    def stuck(rank: int) -> None:
        real = PackedShards.step_batch

        def step_batch(self, step):
            if rank == victim and step == 5:  # from 0; read ahead of step 5
                time.sleep(100)
            return real(self, step)

        PackedShards.step_batch = step_batch

    with launched(tmp_path, ranks=2, inject=stuck) as job:
        job.until_step(tmp_path / "run", 4)
        text, seconds = end_of(job, 0, limit=4 * TIMEOUT)
        job.until(lambda: len(job.ended) == 2, 10)
    assert job.ended == {0: 1, 1: 1}
    (said,) = [line for line in text.splitlines() if "no progress for 5 s" in line]
    assert re.search(
        rf"rank {victim} \(pid {job.pids[victim]} on \S+\) at step 5: reading data \(\S+ in step_batch\)", said
    )
    assert f"rank {1 - victim} (" not in said
    case.add(steps_to_repeat(tmp_path / "run"), seconds)
    fit(tmp_path, ranks=2)
    assert_same(tmp_path / "run", whole(2), ranks=2)
    case.write()


def fp64(rank: int) -> None:
    """Parameters in double precision: sums over another number of ranks then agree to 1e-10."""
    real = PretrainModule.build_model
    PretrainModule.build_model = lambda module: real(module).double()


@pytest.mark.parametrize("ranks", [1, 4])
def test_killed_on_two_and_resumed_on_another_number(tmp_path, little, ranks):
    case = Case(4, f"one rank killed, resumed by {ranks}", 2)
    for name in ("whole", "run"):
        (tmp_path / name).mkdir()
        write_recipe(tmp_path / name, little(ranks=2))
    fit(tmp_path / "whole", ranks=2, inject=fp64)
    with launched(tmp_path / "run", ranks=2, inject=fp64) as job:
        job.until_step(tmp_path / "run" / "run", 7)
        os.kill(job.pids[1], signal.SIGKILL)
    case.add(steps_to_repeat(tmp_path / "run" / "run"))
    write_recipe(tmp_path / "run", little(ranks=ranks))
    fit(tmp_path / "run", ranks=ranks, inject=fp64)
    resumed, expected = (trajectory(tmp_path / name / "run") for name in ("run", "whole"))
    assert len(resumed) == len(expected)
    for one, two in zip(resumed, expected, strict=True):
        assert one.keys() == two.keys()
        assert one.get("batch") == two.get("batch")  # the same samples, none twice, none left out
        for name in one.keys() - {"batch"}:
            assert one[name] == pytest.approx(two[name], rel=1e-10), name
    case.write()


def test_a_rank_that_leaves_between_two_beats_is_not_missed(tmp_path, little):
    """Its last words must be that it left, whatever its thread was doing then: seen once in 40 launches under load."""
    write_recipe(tmp_path, little(ranks=2, steps=3, timeout=TIMEOUT))

    def inject(rank: int) -> None:
        real = Watchdog._publish

        def publish(self, store):
            told = real(self, store)
            end = time.monotonic() + 4
            while rank == 1 and self._beat.state == "running" and time.monotonic() < end:
                time.sleep(0.01)
            return told

        Watchdog._publish = publish

    fit(tmp_path, ranks=2, inject=inject)

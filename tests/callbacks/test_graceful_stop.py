"""Requests are acted on at the step boundary, by all ranks. (tests/run/test_many_ends.py stops real jobs.)"""

from __future__ import annotations

import os
import signal
import subprocess
import sys
from types import SimpleNamespace

import pytest
import torch.distributed as dist
from helpers import REPOSITORY
from ranks import run_ranks

from llmrecipes.callbacks import GracefulStop, graceful_stop
from llmrecipes.callbacks.graceful_stop import EXIT_RESUMABLE
from llmrecipes.process import SIGNALS, StopSignals


class Run:
    """A run of ten steps that has done four, with the callback in it."""

    def __init__(self, root, stop: GracefulStop, rank=0, ranks=1) -> None:
        self.saved, self.stop = [], stop
        stop.save = lambda trainer, module: self.saved.append(trainer.global_step) or f"step={trainer.global_step:06d}"
        self.trainer = SimpleNamespace(
            global_step=4, max_steps=10, should_stop=False, limit_val_batches=1.0, default_root_dir=str(root),
            is_global_zero=rank == 0, global_rank=rank, world_size=ranks, strategy=SimpleNamespace(),
        )  # fmt: skip
        stop.on_train_start(self.trainer, None)

    def begin(self) -> None:
        self.stop.on_train_batch_start(self.trainer, None, None, 0)

    def end(self) -> None:
        self.trainer.global_step += 1
        self.stop.on_train_batch_end(self.trainer, None, None, None, 0)

    def step(self) -> None:
        self.begin()
        self.end()


@pytest.fixture
def signals():
    before = [signal.getsignal(number) for number in SIGNALS]
    with StopSignals() as signals:
        yield signals
    assert [signal.getsignal(number) for number in SIGNALS] == before


@pytest.fixture
def run(tmp_path, signals):
    stop = GracefulStop()
    stop.requests = signals
    return Run(tmp_path, stop)


@pytest.mark.parametrize("number", SIGNALS)
def test_the_step_is_finished_and_saved_once(run, number, capsys):
    run.step()
    assert not run.trainer.should_stop
    os.kill(os.getpid(), number)
    assert run.saved == []  # nothing happens inside the handler
    run.step()
    assert run.saved == [6]
    assert run.trainer.should_stop and run.stop.stopped
    assert run.trainer.limit_val_batches == 0
    for again in SIGNALS:
        os.kill(os.getpid(), again)  # changes nothing any more
    run.step()
    assert run.saved == [6]
    assert EXIT_RESUMABLE == 75


def test_a_signal_in_a_step_waits_for_the_next_one(run):
    """What was agreed at its beginning holds: another rank may be past the question."""
    run.begin()
    os.kill(os.getpid(), signal.SIGUSR1)
    run.end()
    assert run.saved == []
    run.step()
    assert run.saved == [6]


def test_repeated_requests_of_a_scheduler_are_one(run):
    for number in (signal.SIGUSR1, signal.SIGTERM, signal.SIGTERM, signal.SIGINT):
        os.kill(os.getpid(), number)
    run.step()
    assert run.saved == [5]


def test_a_signal_before_the_first_step_stops_before_it(tmp_path, signals):
    os.kill(os.getpid(), signal.SIGTERM)
    stop = GracefulStop()
    stop.requests = signals
    run = Run(tmp_path, stop)
    assert run.trainer.should_stop and stop.stopped and run.saved == []


def test_a_run_at_its_end_is_done_and_not_stopped(run):
    run.trainer.global_step = 9
    os.kill(os.getpid(), signal.SIGTERM)
    run.step()
    assert not run.stop.stopped and run.saved == []


def test_the_stop_file_is_removed(tmp_path):
    run = Run(tmp_path, GracefulStop(file="HALT"))
    run.stop._looked = -graceful_stop.LOOK_EVERY
    (tmp_path / "HALT").touch()
    run.step()
    assert run.saved == [5] and not (tmp_path / "HALT").exists()
    run = Run(tmp_path, GracefulStop(file=None))
    (tmp_path / "STOP").touch()
    run.step()
    assert run.saved == []


def test_the_time_limit_counts_from_the_start_of_the_command(tmp_path, signals):
    stop = GracefulStop(time_limit="2m")
    stop.requests = signals
    run = Run(tmp_path, stop)
    signals.started -= 119
    run.step()
    assert run.saved == []
    signals.started -= 1
    run.step()
    assert run.saved == [6]


def test_a_second_ctrl_c_does_not_wait(tmp_path):
    """Not even for a main thread that is stuck in C code, as in a collective that never ends."""
    code = """
import ctypes, os, signal, threading, time
from llmrecipes.process import StopSignals
mutex = ctypes.create_string_buffer(64)
with StopSignals():
    def interrupt():
        for _ in range(2):
            time.sleep(0.3)
            os.kill(os.getpid(), signal.SIGINT)
    threading.Thread(target=interrupt, daemon=True).start()
    for _ in range(2):
        ctypes.CDLL(None).pthread_mutex_lock(mutex)  # the second time for ever; no signal interrupts it
"""
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, cwd=REPOSITORY, timeout=30)
    assert done.returncode == 130
    assert done.stderr == "Ctrl-C: stopping after this step; once more to stop at once\n"


# ---- several ranks


def agree(root, wishes: dict[int, int], mutant: bool):
    """Steps until all stop; the step each rank stopped at, and what it said of it."""
    dist.init_process_group("gloo")
    rank, ranks = dist.get_rank(), dist.get_world_size()
    stop = GracefulStop()
    stop.requests = SimpleNamespace(started=0.0, received=None, ignore=lambda: None)
    run = Run(root, stop, rank, ranks)
    if mutant:  # asks nobody
        stop._agreement._group = None
    words = []
    stop._words = lambda trainer, *asked: words.append(asked) or "asked"
    for step in range(5):
        if wishes.get(rank) == step:
            stop.requests.received = signal.SIGUSR1
        run.step()
        if stop.stopped:
            break
    return run.saved, words


@pytest.mark.parametrize("wishes", [{0: 1}, {2: 1}, {0: 1, 1: 1, 2: 1}, {1: 1, 0: 3}], ids=str)
def test_all_ranks_stop_at_the_same_step(tmp_path, wishes):
    results = run_ranks(3, agree, tmp_path, wishes, False)
    first = min(rank for rank, step in wishes.items() if step == 1)
    assert results == [([6], [(signal.SIGUSR1, first)])] * 3


def test_mutant_without_agreement_stops_one_rank_alone(tmp_path):
    results = run_ranks(3, agree, tmp_path, {2: 1}, True)
    assert [saved for saved, _ in results] == [[], [], [6]]

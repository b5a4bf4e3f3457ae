"""Signals set a flag; the step boundary acts on it. (tests/run/test_resume.py stops a real process.)"""

from __future__ import annotations

import os
import signal
from types import SimpleNamespace

import pytest

from llmrecipes.callbacks import GracefulStop
from llmrecipes.callbacks.graceful_stop import EXIT_RESUMABLE, SIGNALS


@pytest.fixture
def stop():
    """A GracefulStop in a run that has begun, and what it saved."""
    saved = []

    def save(trainer, module):
        saved.append(trainer.global_step)
        return f"step={trainer.global_step:06d}"

    callback = GracefulStop(save)
    trainer = SimpleNamespace(global_step=4, should_stop=False, limit_val_batches=1.0)
    before = [signal.getsignal(number) for number in SIGNALS]
    callback.on_train_start(trainer, None)
    yield SimpleNamespace(callback=callback, trainer=trainer, saved=saved, before=before)
    for number, handler in zip(SIGNALS, before, strict=True):
        signal.signal(number, handler)


def end_of_step(stop):
    stop.trainer.global_step += 1
    stop.callback.on_train_batch_end(stop.trainer, None, None, None, 0)


@pytest.mark.parametrize("number", SIGNALS)
def test_the_step_is_finished_and_saved_once(stop, number):
    end_of_step(stop)
    assert not stop.trainer.should_stop
    os.kill(os.getpid(), number)
    assert stop.saved == []  # nothing happens inside the handler
    assert not stop.callback.stopped
    end_of_step(stop)
    assert stop.saved == [6]
    assert stop.trainer.should_stop and stop.callback.stopped
    assert stop.trainer.limit_val_batches == 0
    end_of_step(stop)
    assert stop.saved == [6]
    assert EXIT_RESUMABLE == 75


def test_repeated_requests_of_a_scheduler_are_one(stop):
    for number in (signal.SIGUSR1, signal.SIGTERM, signal.SIGTERM, signal.SIGINT):
        os.kill(os.getpid(), number)
    end_of_step(stop)
    assert stop.saved == [5]


def test_a_second_ctrl_c_does_not_wait(stop):
    os.kill(os.getpid(), signal.SIGINT)
    with pytest.raises(KeyboardInterrupt):
        os.kill(os.getpid(), signal.SIGINT)


@pytest.mark.parametrize("end", ["teardown", "on_exception"])
def test_handlers_are_put_back(stop, end):
    assert all(signal.getsignal(number) == stop.callback._on_signal for number in SIGNALS)
    getattr(stop.callback, end)(stop.trainer, None, "fit")
    assert [signal.getsignal(number) for number in SIGNALS] == stop.before
    stop.callback.teardown(stop.trainer, None, "fit")  # and again does no harm
    assert [signal.getsignal(number) for number in SIGNALS] == stop.before

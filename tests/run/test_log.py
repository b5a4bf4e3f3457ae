"""The log: what one process does to another that prints too."""

from __future__ import annotations

import multiprocessing
import os
import signal

import pytest
from tqdm import tqdm
from tqdm.std import TqdmDefaultWriteLock

from llmrecipes.run import log as log_module
from llmrecipes.run.log import log, start_log

FORK = multiprocessing.get_context("fork")


def killed_while_printing() -> None:
    tqdm.get_lock().acquire()
    os.kill(os.getpid(), signal.SIGKILL)


def prints(line: str) -> None:
    start_log()
    log.info(line)


@pytest.fixture
def shared_lock():
    """tqdm's lock as a process has it that has drawn a bar."""
    before = tqdm.get_lock()
    tqdm.set_lock(TqdmDefaultWriteLock())
    yield
    tqdm.set_lock(before)


def says_something() -> bool:
    """Whether a process can print after another one was killed while it printed."""
    for target, arguments in ((killed_while_printing, ()), (prints, ("the other one is dead",))):
        process = FORK.Process(target=target, args=arguments)
        process.start()
        process.join(5)
        heard = process.exitcode == 0
        process.kill()
        process.join()
    return heard


def test_a_process_killed_while_it_prints_silences_nobody(shared_lock, monkeypatch):
    assert says_something()
    monkeypatch.setattr(log_module.tqdm, "set_lock", lambda lock: None)
    assert not says_something(), "mutant: with the lock of all processes"

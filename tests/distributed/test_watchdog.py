"""The parts of a watchdog, and three at one store; whole jobs are in tests/run/test_many_ends.py."""

from __future__ import annotations

import subprocess
import sys
import threading
import time

import pytest
from ranks import free_port
from torch.distributed import DistNetworkError

from llmrecipes.checkpoint import CheckpointError
from llmrecipes.distributed.rendezvous import Rendezvous, Report
from llmrecipes.distributed.watchdog import Watchdog, is_broken_connection, position_of

REPORTS = [Report(rank, 3, 3, 1, f"n{rank}", 100 + rank) for rank in range(3)]


class SlowNames(Rendezvous):
    """A store whose server stands still for a while with each connection of rank 1: it waits for a name server."""

    lookup = 0.0

    def client(self):
        time.sleep(self.lookup)
        return super().client()


def ends(lookup: float, seconds: float = 3.5) -> list[int]:
    """The exit codes with which watchdogs of three healthy ranks, which all leave after ``seconds``, end the job."""
    codes: list[int] = []
    port = free_port()
    meetings = [SlowNames(report, "127.0.0.1", port, timeout=20.0) for report in REPORTS]
    meetings[1].lookup = lookup

    def rank(rendezvous: Rendezvous) -> None:
        watchdog = Watchdog(rendezvous, REPORTS, timeout=2.0, end=codes.append)
        watchdog.start()
        for _ in range(int(10 * seconds)):
            watchdog.tick()
            time.sleep(0.1)
        watchdog.leave()

    meetings[0]._store = meetings[0]._open(is_master=True)
    threads = [threading.Thread(target=rank, args=[meeting], daemon=True) for meeting in meetings]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join(30)
    assert not any(thread.is_alive() for thread in threads)
    return codes


def test_no_clock_runs_while_a_rank_still_connects():
    """Torch's store asks for the name of every client before it serves anybody else."""
    assert ends(lookup=1.5) == []


def test_mutant_that_starts_at_once_ends_a_healthy_job(monkeypatch):
    monkeypatch.setattr(Watchdog, "_await_count", lambda self, name, end: None)
    assert ends(lookup=1.5) != []


def test_a_rank_that_watches_connects_no_more(monkeypatch):
    """A verdict must not wait for a name server either."""
    connections: list[int] = []
    monkeypatch.setattr(
        SlowNames, "client", lambda self: (connections.append(self.me.rank), Rendezvous.client(self))[1]
    )
    port = free_port()
    told: list[int] = []
    meetings = [SlowNames(report, "127.0.0.1", port, timeout=20.0) for report in REPORTS[:2]]
    meetings[0]._store = meetings[0]._open(is_master=True)
    watchdogs = [Watchdog(meeting, REPORTS[:2], timeout=5.0, end=told.append) for meeting in meetings]
    threads = [threading.Thread(target=watchdog.start) for watchdog in watchdogs]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join(20)
    assert sorted(connections) == [0, 0, 1, 1]
    watchdogs[1].report_death("rank 1 was killed", 3)
    end = time.monotonic() + 10
    while sorted(told) != [3, 3] and time.monotonic() < end:
        time.sleep(0.05)
    assert told == [3, 3]
    assert sorted(connections) == [0, 0, 1, 1]


def test_errors_that_are_another_ranks_fault():
    gloo = RuntimeError(
        "[/pytorch/third_party/gloo/gloo/transport/tcp/pair.cc:553] Connection closed by peer [127.0.0.1]"
    )
    assert is_broken_connection(gloo)
    assert is_broken_connection(DistNetworkError("x"))
    try:
        raise CheckpointError("writing failed") from gloo
    except CheckpointError as error:
        assert is_broken_connection(error)
    assert not is_broken_connection(ValueError("shape"))
    assert not is_broken_connection(RuntimeError("mat1 and mat2 shapes cannot be multiplied"))
    assert not is_broken_connection(CheckpointError("no space"))


def test_the_line_a_thread_is_at():
    def waits_for_nobody():
        time.sleep(30)

    thread = threading.Thread(target=waits_for_nobody, daemon=True)
    thread.start()
    end = time.monotonic() + 10
    while "waits_for_nobody" not in position_of(thread.ident)[0] and time.monotonic() < end:
        time.sleep(0.01)
    line, waits = position_of(thread.ident)
    assert line.startswith("distributed/test_watchdog.py:") and line.endswith("in waits_for_nobody")
    assert not waits
    assert position_of(None) == ("", False)


LOOK_WHILE_COLLECTING = """
import gc, sys, threading
from llmrecipes.distributed import watchdog
look = {look}
gc.set_threshold(1)
for _ in range(2000):
    cycle = [threading.local()]
    cycle[0].value = 1
    cycle.append(cycle)
    del cycle
    look()
print(gc.isenabled())
"""


def looks_while_collecting(look: str, timeout: float) -> str:
    """What a process prints that looks where its threads are while garbage with thread-local values is freed."""
    code = LOOK_WHILE_COLLECTING.format(look=look)
    return subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, timeout=timeout).stdout


def test_looking_where_a_thread_is_never_waits_for_ever():
    assert looks_while_collecting("lambda: watchdog.position_of(threading.get_ident())", 120) == "True\n"


@pytest.mark.skipif(sys.version_info >= (3, 12), reason="Python 3.12 collects garbage at other moments")
def test_python_3_11_by_itself_waits_for_ever():
    """The mutant; what it is about: python/cpython#106883."""
    with pytest.raises(subprocess.TimeoutExpired):
        looks_while_collecting("lambda: sys._current_frames()", 15)

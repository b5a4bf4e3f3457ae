"""Who is missing, misplaced or doubled at the start is named, within the stated time."""

from __future__ import annotations

import os
import socket
import time

import pytest
from ranks import free_port, run_ranks

from llmrecipes.distributed.rendezvous import Rendezvous, Report
from llmrecipes.errors import RankFailure, UserError

HOST = socket.gethostname()


def meet(present: dict[int, tuple], port: int, timeout: float, address: str = "127.0.0.1"):
    """In process i: be what ``present[i]`` says (rank, world size, nodes, processes); what came of it, and when."""
    started = time.monotonic()
    me = Report.of_this_process(*present[int(os.environ["RANK"])])
    try:
        reports = Rendezvous(me, address, port, timeout).meet()
        outcome = [(report.rank, report.pid == os.getpid()) for report in reports]
    except SystemExit as error:
        outcome = error.code
    except (UserError, RankFailure) as error:
        outcome = type(error).__name__, str(error)
    return outcome, time.monotonic() - started


def rendezvous(*present, timeout=3.0, **options):
    """The outcome of each process, the slowest one's seconds, and the port."""
    port = free_port()
    results = run_ranks(len(present), meet, dict(enumerate(present)), port, timeout, *options.values(), timeout=60)
    return [outcome for outcome, _ in results], max(seconds for _, seconds in results), port


def test_all_there():
    outcomes, seconds, _ = rendezvous((0, 3, 1, 3), (1, 3, 1, 3), (2, 3, 1, 3), timeout=20.0)
    for rank, outcome in enumerate(outcomes):
        assert outcome == [(other, other == rank) for other in range(3)]
    assert seconds < 15


def test_a_missing_rank_is_named_in_time():
    outcomes, seconds, port = rendezvous((0, 4, 2, 2), (1, 4, 2, 2), (3, 4, 2, 2))
    kind, message = outcomes[0]
    assert kind == "RankFailure"
    assert f"rank 2 of 4 did not come to 127.0.0.1:{port} (MASTER_ADDR, MASTER_PORT) within 3 s" in message
    assert "node 1 of the job" in message and "rank 3 (pid " in message and HOST in message
    assert outcomes[1:] == [1, 1]  # rank 0 says it
    assert 3 <= seconds < 20


def test_rank_0_missing():
    outcomes, seconds, port = rendezvous((1, 2, 1, 2))
    kind, message = outcomes[0]
    assert kind == "RankFailure"
    assert message.startswith("rank 1 (pid ") and f"waited 3 s for rank 0 at 127.0.0.1:{port}" in message
    assert "Connection refused" in message
    assert 3 <= seconds < 15


def test_another_world_size_is_named_at_once():
    outcomes, seconds, _ = rendezvous((0, 2, 1, 2), (1, 4, 2, 2), timeout=30.0)
    for kind, message in outcomes:  # also the one that is wrong
        assert kind == "UserError"
        assert "rank 1 (pid " in message and "believes in 4 ranks, 2 nodes x 2 processes" in message
        assert "trainer.num_nodes" in message
    assert seconds < 20


def test_two_of_a_rank_are_named_at_once():
    outcomes, seconds, _ = rendezvous((0, 3, 3, 1), (1, 3, 3, 1), (1, 3, 3, 1), timeout=30.0)
    kind, message = outcomes[0]
    assert kind == "UserError"
    assert message.startswith("rank 1 came 2 times to ") and "NODE_RANK" in message
    assert seconds < 20


def test_a_size_that_was_not_started():
    me = Report.of_this_process(0, 4, 1, 2)
    with pytest.raises(UserError, match=r"one of 4, but trainer.num_nodes x trainer.devices = 1 x 2 = 2"):
        Rendezvous(me, "127.0.0.1", free_port(), 3).meet()


def test_a_name_that_does_not_resolve_fails_at_once():
    started = time.monotonic()
    for rank in (0, 1):
        with pytest.raises(UserError, match=r"MASTER_ADDR is 'no-such-node.invalid', a name that this machine"):
            Rendezvous(Report.of_this_process(rank, 2, 2, 1), "no-such-node.invalid", 1, 60).meet()
    assert time.monotonic() - started < 30


def test_a_port_that_is_taken():
    with socket.socket() as taken:
        taken.bind(("", 0))
        taken.listen()
        port = taken.getsockname()[1]
        with pytest.raises(UserError, match=f"another process of this machine has port {port}"):
            Rendezvous(Report.of_this_process(0, 2, 1, 2), "127.0.0.1", port, 3).meet()


def test_a_third_process_at_a_complete_job():
    """Another job with the same port, or a rank started twice."""
    outcomes, _, _ = rendezvous((0, 2, 1, 2), (1, 2, 1, 2), (1, 2, 1, 2), timeout=20.0)
    late = [message for kind, message in outcomes if kind == "UserError"]
    assert late, outcomes
    assert all("rank 1" in message for message in late)


def test_mutant_without_the_check_of_sizes_hangs_or_mistakes(monkeypatch):
    from llmrecipes.distributed import rendezvous as module

    monkeypatch.setattr(module, "_mistakes", lambda judge, reports, where: iter(()))
    outcomes, _, _ = rendezvous((0, 2, 1, 2), (1, 4, 2, 2))
    assert outcomes == [[(0, True), (1, False)], [(0, False), (1, True)]]  # two that believe in different jobs

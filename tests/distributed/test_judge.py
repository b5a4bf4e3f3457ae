"""The judge with a clock of its own."""

from __future__ import annotations

import pytest

from llmrecipes.distributed.judge import Beat, Judge, Phase
from llmrecipes.distributed.rendezvous import Report

REPORTS = [Report(rank, 3, 3, 1, f"n{rank}", 100 + rank) for rank in range(3)]


class Ranks:
    """Three ranks that beat and make progress every second unless told otherwise."""

    def __init__(self, timeout=30.0, silence=10.0) -> None:
        self.judge = Judge(REPORTS, timeout, silence, now=0.0)
        self.beats = [Beat(step=4, phase=Phase.COMPUTE) for _ in REPORTS]
        self.now = 0.0

    def second(self, silent=(), stuck=()):
        self.now += 1.0
        for rank, beat in enumerate(self.beats):
            beat.count += rank not in silent
            beat.progress += rank not in silent and rank not in stuck
        return self.judge.look([Beat(**vars(beat)) for beat in self.beats], self.now)

    def seconds(self, limit, **options):
        """The verdict and when it came."""
        start = self.now
        while self.now < start + limit:
            if verdict := self.second(**options):
                return verdict, self.now - start
        return None, limit


def test_a_job_that_runs_is_left_alone():
    assert Ranks().seconds(1000) == (None, 1000)


def test_a_silent_rank_is_dead():
    ranks = Ranks()
    ranks.seconds(50)
    verdict, seconds = ranks.seconds(100, silent=[1])
    assert verdict.message == (
        "rank 1 (pid 101 on n1), last at step 4: computing, has not been heard of for 11 s: it is dead or stopped"
    )
    assert (verdict.code, seconds) == (1, 11)


def test_after_a_broken_connection_less_patience_is_needed():
    ranks = Ranks(silence=60.0)
    ranks.seconds(50)
    ranks.beats[0].state, ranks.beats[0].message = "cut off", "Connection closed by peer"
    verdict, seconds = ranks.seconds(100, silent=[2], stuck=[0])
    assert verdict.message.startswith("rank 2 (pid 102 on n2), last at") and seconds == 7


def test_a_broken_connection_between_living_ranks():
    ranks = Ranks()
    ranks.beats[0].state, ranks.beats[0].message = "cut off", "RuntimeError: Connection reset"
    verdict, seconds = ranks.seconds(100, stuck=[0, 1, 2])
    assert "rank 0 (pid 100 on n0) lost the connection to another rank at step 4: computing" in verdict.message
    assert seconds < 15


@pytest.mark.parametrize("culprit", range(3))
def test_who_waits_is_no_culprit(culprit):
    """All stand still; one at the same place, or before it, waits for nobody."""
    for position in ((4, Phase.COMPUTE), (4, Phase.READ)):
        ranks = Ranks()
        for rank, beat in enumerate(ranks.beats):
            beat.waits = rank != culprit
        ranks.beats[culprit].step, ranks.beats[culprit].phase = position
        ranks.beats[culprit].line = "shards.py:7 in rows"
        ranks.seconds(20)
        verdict, seconds = ranks.seconds(100, stuck=[0, 1, 2])
        assert verdict.message == (
            f"no progress for 30 s (trainer.strategy timeout): rank {culprit} (pid 10{culprit} on n{culprit}) at "
            f"step 4: {position[1]} (shards.py:7 in rows); the other ranks wait"
        )
        assert seconds == 30


def test_where_all_wait_the_one_behind_is_named():
    ranks = Ranks()
    for beat in ranks.beats:
        beat.waits = True
    ranks.beats[2].step = 3
    verdict, _ = ranks.seconds(100, stuck=[0, 1, 2])
    assert "rank 2 (pid 102 on n2) at step 3" in verdict.message and "rank 0" not in verdict.message


def test_slow_work_that_gets_on_is_no_stall():
    """An hour of saving on rank 0 while the others wait: its marks are progress."""
    ranks = Ranks(timeout=30)
    assert ranks.seconds(3600, stuck=[1, 2]) == (None, 3600)


def test_a_failure_is_told_after_rank_0_had_its_chance():
    ranks = Ranks()
    ranks.beats[1].state, ranks.beats[1].message, ranks.beats[1].code = "failed", "KeyError: 0", 2
    verdict, seconds = ranks.seconds(100, silent=[1], stuck=[0, 2])
    assert (verdict.message, verdict.code) == ("rank 1 (pid 101 on n1) failed: KeyError: 0", 2)
    assert 3 <= seconds <= 5


def test_those_that_left_are_not_missed():
    ranks = Ranks()
    ranks.beats[1].state = ranks.beats[2].state = "left"
    assert ranks.seconds(1000, silent=[1, 2]) == (None, 1000)


def test_a_silent_rank_no_longer_matters_when_rank_0_has_done_its_work():
    """No rank gets to the end without the others: the run is complete, whatever became of the one that is not heard."""
    ranks = Ranks()
    ranks.seconds(50, silent=[1])
    assert ranks.judge.unheard == []
    ranks = Ranks()
    ranks.beats[0].state = "left"
    assert ranks.seconds(1000, silent=[1]) == (None, 1000)
    assert ranks.judge.unheard == [1]
    ranks.beats[2].state, ranks.beats[2].message = "failed", "KeyError: 0"
    assert ranks.seconds(100, silent=[1])[0].message.startswith("rank 2 (pid 102 on n2) failed")


def test_silence_after_rank_0_left_is_not_taken_for_a_stall():
    """Where both limits are the same, as with a timeout below 60 s."""
    ranks = Ranks(timeout=30, silence=30)
    ranks.beats[0].state = ranks.beats[2].state = "left"
    assert ranks.seconds(100, silent=[1]) == (None, 100)
    assert ranks.judge.unheard == [1]


def test_time_in_which_the_judge_slept_does_not_count():
    """Ctrl-Z and fg of the whole job: nobody beat, nobody is dead."""
    ranks = Ranks()
    ranks.seconds(5)
    ranks.now += 10_000
    assert ranks.second(silent=[1, 2], stuck=[0]) is None
    assert ranks.seconds(100) == (None, 100)


def test_mutant_that_does_not_forgive_its_own_sleep(monkeypatch):
    monkeypatch.setattr(Judge, "_forgive", lambda self, now: None)
    ranks = Ranks()
    ranks.seconds(5)
    ranks.now += 10_000
    assert ranks.second(silent=[1, 2], stuck=[0]) is not None

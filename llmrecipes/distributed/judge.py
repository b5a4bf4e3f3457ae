"""What the ranks say of themselves, and the verdict on it: arithmetic on one clock, without threads or stores."""

from __future__ import annotations

from dataclasses import dataclass
from enum import IntEnum

from llmrecipes.distributed.rendezvous import Report

INTERVAL = 1.0
# A rank is dead or stopped when its thread is silent for so long; less where a connection broke, since somebody is.
SILENCE = 60.0
SILENCE_AFTER_BREAK = 6.0
DELAY_OF_FAILURES = 3.0


class Phase(IntEnum):
    """What the main thread is doing, in the order within a step."""

    SET_UP = 0
    READ = 1
    COMPUTE = 2
    FINISH = 3
    VALIDATE = 4

    def __str__(self) -> str:
        return ("setting up", "reading data", "computing", "logging or saving", "validating")[self]


@dataclass
class Beat:
    """What a rank says once a second.

    Attributes:
        count: of beats. progress: of marks. step, phase: where the main thread is.
        line: the line of code it is at. waits: whether that line waits for other ranks.
        state: ``running``, ``cut off`` (a collective failed), ``failed`` (of itself) or ``left``.
        message, code: of a failure.
    """

    count: int = 0
    progress: int = 0
    step: int = 0
    phase: int = 0
    line: str = ""
    waits: bool = False
    state: str = "running"
    message: str = ""
    code: int = 1

    @property
    def position(self) -> tuple[int, int]:
        """Comparable between ranks, which do the same in the same order."""
        return self.step, self.phase

    @property
    def place(self) -> str:
        """In words."""
        at = f" ({self.line})" if self.line else ""
        return f"{f'step {self.step}: ' if self.step else ''}{Phase(self.phase)}{at}"


@dataclass(frozen=True)
class Verdict:
    """Why the job ends, and with which exit code."""

    message: str
    code: int = 1


class Judge:
    """Decides from what all ranks say, by one clock, whether the job can go on.

    Args:
        reports: who the ranks are.
        timeout: seconds without any progress on any rank.
        silence: seconds without a beat.
        now: the clock.
    """

    def __init__(self, reports: list[Report], timeout: float, silence: float, now: float) -> None:
        self.reports, self.timeout, self.silence = reports, timeout, silence
        self._beats = [Beat() for _ in reports]
        self._heard = [now] * len(reports)
        self._progressed = [now] * len(reports)
        self._broken: float | None = None
        self._failed_at: float | None = None
        self._last_look = now
        # Silent ranks that rank 0 no longer needs: it has done all its work, which no rank can do without the others.
        self.unheard: list[int] = []

    def look(self, beats: list[Beat], now: float) -> Verdict | None:
        """The verdict on what the ranks say now, in their order; None = go on."""
        self._forgive(now)
        for rank, (beat, before) in enumerate(zip(beats, self._beats, strict=True)):
            if beat.count != before.count:
                self._heard[rank] = now
            if beat.progress != before.progress:
                self._progressed[rank] = now
        self._beats = beats
        gone = ("left", "failed")
        active = [rank for rank, beat in enumerate(beats) if beat.state not in gone and rank not in self.unheard]
        return (
            self._failed(now) or self._silent(active, now) or self._cut_off(active, now) or self._stalled(active, now)
        )

    def _forgive(self, now: float) -> None:
        """If this process itself was stopped or starved for a while, that time says nothing about others."""
        gap = now - self._last_look
        self._last_look = now
        if gap > 5 * INTERVAL:
            self._heard = [moment + gap for moment in self._heard]
            self._progressed = [moment + gap for moment in self._progressed]

    def _failed(self, now: float) -> Verdict | None:
        """Not at once: rank 0 may be about to say the same, with more words."""
        failed = [rank for rank, beat in enumerate(self._beats) if beat.state == "failed"]
        if not failed:
            return None
        self._failed_at = self._failed_at or now
        if now - self._failed_at < DELAY_OF_FAILURES:
            return None
        beat = self._beats[failed[0]]
        return Verdict(f"{self.reports[failed[0]]} failed: {beat.message}", beat.code)

    def _silent(self, active: list[int], now: float) -> Verdict | None:
        over = self._beats[0].state == "left"
        broken = any(self._beats[rank].state == "cut off" for rank in active)
        limit = min(self.silence, SILENCE_AFTER_BREAK) if broken or over else self.silence
        silent = [rank for rank in active if now - self._heard[rank] > limit]
        if not silent:
            return None
        if over:
            self.unheard += silent
            return None
        first = max(now - self._heard[rank] for rank in silent)
        names = " and ".join(f"{self.reports[rank]}, last at {self._beats[rank].place}," for rank in silent[:8])
        more = f" and {len(silent) - 8} more" if len(silent) > 8 else ""
        plural = len(silent) > 1
        return Verdict(
            f"{names}{more} {'have' if plural else 'has'} not been heard of for {first:.0f} s: "
            f"{'they are' if plural else 'it is'} dead or stopped"
        )

    def _cut_off(self, active: list[int], now: float) -> Verdict | None:
        """A connection broke, and all are well: say what is known."""
        broken = [rank for rank in active if self._beats[rank].state == "cut off"]
        if not broken:
            return None
        self._broken = self._broken or now
        if now - self._broken < SILENCE_AFTER_BREAK + 4 * INTERVAL:
            return None
        beat = self._beats[broken[0]]
        return Verdict(f"{self.reports[broken[0]]} lost the connection to another rank at {beat.place}: {beat.message}")

    def _stalled(self, active: list[int], now: float) -> Verdict | None:
        if not active or now - max(self._progressed[rank] for rank in active) < self.timeout:
            return None
        culprits = self._culprits(active)
        names = " and ".join(f"{self.reports[rank]} at {self._beats[rank].place}" for rank in culprits[:8])
        more = f" and {len(culprits) - 8} more" if len(culprits) > 8 else ""
        others = "; the other ranks wait" if len(culprits) < len(active) else ""
        return Verdict(f"no progress for {self.timeout:g} s (trainer.strategy timeout): {names}{more}{others}")

    def _culprits(self, active: list[int]) -> list[int]:
        """Those that wait for nobody, and of these the ones furthest behind; where all wait, those furthest behind."""
        busy = [rank for rank in active if not self._beats[rank].waits] or active
        behind = min(self._beats[rank].position for rank in busy)
        return [rank for rank in busy if self._beats[rank].position == behind]

"""A dead or hung rank ends the job, with one line that names it.

Every rank has a thread that tells a store once a second that it lives and how far the main thread has come. Rank 0
reads what all say and gives the verdict; the others watch rank 0. It needs no parent process, no signal and no help of
the main thread, which may be stuck in a collective: it works with any launcher and over nodes.
"""

from __future__ import annotations

import json
import linecache
import logging
import os
import re
import sys
import threading
import time
from collections.abc import Callable
from dataclasses import asdict, dataclass
from enum import IntEnum
from pathlib import Path
from types import FrameType

from torch.distributed import DistError, TCPStore

from llmrecipes.distributed.rendezvous import Rendezvous, Report

log = logging.getLogger("llmrecipes")

INTERVAL = 1.0
# A rank is dead or stopped when its thread is silent for so long; less where a connection broke, since somebody is.
SILENCE = 60.0
SILENCE_AFTER_BREAK = 6.0
# How long the others get to hear a verdict before the store ends with rank 0.
ACKNOWLEDGE = 3.0
DELAY_OF_FAILURES = 3.0

_BROKEN = re.compile(
    r"connection (closed|reset|refused|was)|broken pipe|timed out (waiting|after)|gloo|nccl|socket|does not answer",
    re.I,
)


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
        broken = any(self._beats[rank].state == "cut off" for rank in active)
        limit = min(self.silence, SILENCE_AFTER_BREAK) if broken else self.silence
        silent = [rank for rank in active if now - self._heard[rank] > limit]
        if not silent:
            return None
        if self._beats[0].state == "left":
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


class Watchdog:
    """This rank's part: it says how it is, and ends the process when the job cannot go on.

    Args:
        rendezvous: where the ranks met.
        reports: who they are.
        timeout: seconds without progress on any rank after which the job ends.
        advice: what to do next, for the end of the message.
        end: called with the exit code; does not return.

    Attributes:
        observe: called once a second on rank 0 with the names of the ranks and their beats; set before the start.
    """

    def __init__(
        self,
        rendezvous: Rendezvous,
        reports: list[Report],
        timeout: float,
        advice: Callable[[], str] = lambda: "",
        end: Callable[[int], object] = os._exit,
    ) -> None:
        self.me, self.reports, self.timeout, self.advice = rendezvous.me, reports, timeout, advice
        self.silence = min(timeout, SILENCE)
        self._rendezvous = rendezvous
        self._end = end
        self.observe: Callable[[list[str], list[Beat]], object] = lambda _names, _beats: None
        self._beat = Beat()
        self._main = threading.main_thread().ident
        self._wake = threading.Event()
        self._done = threading.Event()
        self._told = ""
        self._heard = time.monotonic()
        self._count_of_rank_0 = 0
        self._lock = threading.Lock()
        self._threads = [threading.Thread(target=self._run, daemon=True, name="watchdog")]
        if self.me.rank != 0:
            self._threads.append(threading.Thread(target=self._watch_rank_0, daemon=True, name="watchdog-store"))

    def start(self) -> None:
        """Begin to watch."""
        for thread in self._threads:
            thread.start()

    # ---- what the main thread says

    def mark(self, step: int, phase: Phase) -> None:
        """The main thread begins with a phase of a step (from 1)."""
        self._beat.step, self._beat.phase = step, int(phase)
        self._beat.progress += 1

    def tick(self) -> None:
        """The main thread gets on within its phase."""
        self._beat.progress += 1

    def fail(self, error: BaseException, code: int = 1) -> bool:
        """The main thread ends with an error: tell the others, and stop watching.

        Where the error is a broken connection, another rank is the reason: then this waits for the verdict, which ends
        the process.

        Returns:
            Whether rank 0 ends with the same error, so that this rank need not repeat it.
        """
        self._beat.message, self._beat.code = _in_one_line(error), code
        broken = is_broken_connection(error)
        self._beat.state = "cut off" if broken else "failed"
        self._wake.set()
        if broken:
            self._done.wait(self.silence + 4 * SILENCE_AFTER_BREAK)
        if self.me.rank == 0:
            self._tell(Verdict(f"{self.me} failed: {self._beat.message}", code))
            self._await_acknowledgements()
        else:
            self._done.wait(2 * DELAY_OF_FAILURES)
        self._stop()
        return self._told == f"{self.reports[0]} failed: {self._beat.message}"

    def report_death(self, message: str, code: int = 1) -> None:
        """A process of this machine is known to be dead: end the job with this message."""
        verdict = Verdict(message, code)
        if self.me.rank == 0:
            self._end_job(verdict)
        else:
            self._rendezvous.client().set(self._key("death"), json.dumps(asdict(verdict)))

    def leave(self) -> None:
        """This rank is done. Rank 0 stays until all are, or until one that is not is found out."""
        self._beat.state = "left"
        self.tick()
        self._wake.set()
        self._done.wait(None if self.me.rank == 0 else self.silence)
        self._stop()

    def _stop(self) -> None:
        self._done.set()
        self._wake.set()
        for thread in self._threads:
            thread.join(2 * INTERVAL)

    # ---- the threads

    def _key(self, name: str) -> str:
        return f"{self._rendezvous.prefix}/{name}"

    def _run(self) -> None:
        try:
            store = self._rendezvous.client()
            judge = Judge(self.reports, self.timeout, self.silence, time.monotonic())
            while not self._done.is_set():
                told = self._publish(store)
                if self.me.rank == 0:
                    self._preside(store, judge)
                else:
                    self._listen(store, told)
                self._wake.wait(INTERVAL)
                self._wake.clear()
        except DistError:
            self._store_is_gone()

    def _publish(self, store: TCPStore) -> str:
        """Say how this rank is; returns the state that was told, which the main thread may change meanwhile."""
        beat = self._beat
        beat.count += 1
        beat.line, beat.waits = position_of(self._main)
        told = asdict(beat)
        store.set(self._key(f"beat/{self.me.rank}"), json.dumps(told))
        return told["state"]

    def _preside(self, store: TCPStore, judge: Judge) -> None:
        """Rank 0: look at everybody."""
        if self._beat.state == "failed":
            return  # its main thread speaks for itself
        beats = self._beats(store)
        self.observe([str(report) for report in self.reports], beats)
        if all(beat.state == "left" for beat in beats):
            self._done.set()
            return
        death = self._told_in(store, "death")
        verdict = death or judge.look(beats, time.monotonic())
        if verdict is not None:
            self._end_job(verdict)
        elif judge.unheard and all(beat.state == "left" or rank in judge.unheard for rank, beat in enumerate(beats)):
            names = " and ".join(str(self.reports[rank]) for rank in judge.unheard[:8])
            self._say(f"the run is complete, but {names} never said so", log.warning)
            self._done.set()

    def _beats(self, store: TCPStore) -> list[Beat]:
        keys = [self._key(f"beat/{rank}") for rank in range(len(self.reports))]
        if store.check(keys):
            return [Beat(**json.loads(value)) for value in store.multi_get(keys)]
        return [Beat(**json.loads(store.get(key))) if store.check([key]) else Beat() for key in keys]

    def _told_in(self, store: TCPStore, name: str) -> Verdict | None:
        key = self._key(name)
        return Verdict(**json.loads(store.get(key))) if store.check([key]) else None

    def _listen(self, store: TCPStore, told: str) -> None:
        """Another rank: obey the verdict, see that rank 0 beats; done once the others were told that it left."""
        if told == "left":
            self._done.set()
            return
        key = self._key("beat/0")
        count = json.loads(store.get(key))["count"] if store.check([key]) else 0
        if count != self._count_of_rank_0:
            self._count_of_rank_0, self._heard = count, time.monotonic()
        verdict = self._told_in(store, "told")
        if verdict is None:
            return
        self._told = verdict.message
        store.add(self._key("acknowledged"), 1)
        if self._beat.state == "failed":
            self._done.set()  # its main thread is on its way out, with a message of its own
        else:
            self._leave_with(verdict.code)

    def _watch_rank_0(self) -> None:
        """Another rank: its first thread may wait for a store that never answers again."""
        before = time.monotonic()
        while not self._done.wait(INTERVAL):
            now = time.monotonic()
            if now - before > 5 * INTERVAL:
                self._heard += now - before  # this process itself was stopped
            before = now
            limit = self.silence if self._beat.state == "running" else min(self.silence, SILENCE_AFTER_BREAK)
            if now - self._heard > limit:
                if self._beat.state == "left":  # both are done, and rank 0 was quicker
                    self._done.set()
                    return
                seconds = f"{now - self._heard:.0f} s"
                self._say(f"{self.reports[0]} has not been heard of for {seconds}: it is dead or stopped")
                self._leave_with(1)

    def _store_is_gone(self) -> None:
        if not self._done.is_set() and self._beat.state != "left":
            self._say(f"{self.reports[0]} is gone: {self._rendezvous.where} closed the connection")
            self._leave_with(1)
        self._done.set()

    # ---- the verdict

    def _end_job(self, verdict: Verdict) -> None:
        """Rank 0: say it, tell the others, end this process."""
        with self._lock:
            self._say(verdict.message)
            self._tell(verdict)
            self._await_acknowledgements()
            self._leave_with(verdict.code)

    def _tell(self, verdict: Verdict) -> None:
        self._rendezvous.client().set(self._key("told"), json.dumps(asdict(verdict)))

    def _await_acknowledgements(self) -> None:
        store, end = self._rendezvous.client(), time.monotonic() + ACKNOWLEDGE
        while store.add(self._key("acknowledged"), 0) < len(self.reports) - 1 and time.monotonic() < end:
            time.sleep(0.1)

    def _say(self, message: str, tell: Callable[[str], None] = log.error) -> None:
        """In a thread of its own: the main thread may hold the log's lock for ever."""
        advice = self.advice() if tell == log.error else ""
        text = f"{message}; {advice}" if advice else message
        thread = threading.Thread(target=tell, args=(text,), daemon=True)
        thread.start()
        thread.join(3)

    def _leave_with(self, code: int) -> None:
        self._done.set()
        self._end(code)


def is_broken_connection(error: BaseException | None) -> bool:
    """Whether an error says no more than that another rank went away or does not answer."""
    while error is not None:
        if isinstance(error, DistError):
            return True
        if isinstance(error, RuntimeError) and _BROKEN.search(str(error)):
            return True
        error = error.__cause__ or error.__context__
    return False


def position_of(thread: int | None) -> tuple[str, bool]:
    """The line a thread is at, of this project's or the user's code, and whether it waits there for other ranks."""
    frame = sys._current_frames().get(thread) if thread is not None else None
    waits = _waits(frame)
    while frame is not None and _is_library(frame.f_code.co_filename):
        frame = frame.f_back
    if frame is None:
        return "", waits
    path = Path(frame.f_code.co_filename)
    return f"{path.parent.name}/{path.name}:{frame.f_lineno} in {frame.f_code.co_name}", waits


def _waits(frame: FrameType | None) -> bool:
    while frame is not None and re.search(r"torch/(_ops|utils/_contextlib|_dynamo|_library)", frame.f_code.co_filename):
        frame = frame.f_back
    if frame is None:
        return False
    path, line = frame.f_code.co_filename, linecache.getline(frame.f_code.co_filename, frame.f_lineno)
    return "torch/distributed/" in path or "all_reduce(" in line or bool(re.search(r"\b_?(work|handle)\.wait\(", line))


def _is_library(path: str) -> bool:
    return "site-packages" in path or path.startswith("<") or f"{os.sep}lib{os.sep}python" in path


def _in_one_line(error: BaseException) -> str:
    return f"{type(error).__name__}: {(str(error).splitlines() or [''])[0]}"

"""A dead or hung rank ends the job, with one line that names it.

Every rank has a thread that tells a store once a second that it lives and how far the main thread has come. Rank 0
reads what all say and gives the verdict; the others watch rank 0. It needs no parent process, no signal and no help of
the main thread, which may be stuck in a collective: it works with any launcher and over nodes.

Whoever connects to torch's store is looked up at the name server, by the one thread that serves everybody: where that
takes 20 seconds, nobody is heard for 20 seconds. All connections are made before the first clock runs, and none later.
"""

from __future__ import annotations

import gc
import json
import linecache
import logging
import os
import re
import sys
import threading
import time
from collections.abc import Callable
from dataclasses import asdict
from pathlib import Path
from types import FrameType

from torch.distributed import DistError, TCPStore

from llmrecipes.distributed.judge import (
    DELAY_OF_FAILURES,
    INTERVAL,
    SILENCE,
    SILENCE_AFTER_BREAK,
    Beat,
    Judge,
    Phase,
    Verdict,
)
from llmrecipes.distributed.rendezvous import Rendezvous, Report
from llmrecipes.errors import RankFailure

log = logging.getLogger("llmrecipes")

# How long the others get to hear a verdict before the store ends with rank 0.
ACKNOWLEDGE = 3.0

_BROKEN = re.compile(
    r"connection (closed|reset|refused|was)|broken pipe|timed out (waiting|after)|gloo|nccl|socket|does not answer",
    re.I,
)


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
        self._stores: list[TCPStore] = []  # of the thread that beats, and of all others
        self._threads = [threading.Thread(target=self._run, daemon=True, name="watchdog")]
        if self.me.rank != 0:
            self._threads.append(threading.Thread(target=self._watch_rank_0, daemon=True, name="watchdog-store"))

    def start(self) -> None:
        """Connect, wait until all ranks have, and begin to watch; whoever does not come will be missed.

        Raises:
            RankFailure: rank 0 is gone.
        """
        try:
            self._stores = [self._rendezvous.client(), self._rendezvous.client()]
            self._await_count("watching", time.monotonic() + self._rendezvous.timeout)
        except DistError as error:
            raise RankFailure(
                f"{self.me}: the store at {self._rendezvous.where} is gone, and rank 0 with it"
            ) from error
        self._heard = time.monotonic()
        for thread in self._threads:
            thread.start()

    def _await_count(self, name: str, end: float) -> None:
        """Count this rank, and wait until all are counted or time is up."""
        store = self._stores[1]
        count = store.add(self._key(name), 1)
        while count < len(self.reports) and time.monotonic() < end:
            time.sleep(0.1)
            count = store.add(self._key(name), 0)

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
            self._stores[1].set(self._key("death"), json.dumps(asdict(verdict)))

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
            store = self._stores[0]
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
        self._stores[1].set(self._key("told"), json.dumps(asdict(verdict)))

    def _await_acknowledgements(self) -> None:
        self._await_count("acknowledged", time.monotonic() + ACKNOWLEDGE)

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
    frame = _current_frames().get(thread) if thread is not None else None
    waits = _waits(frame)
    while frame is not None and _is_library(frame.f_code.co_filename):
        frame = frame.f_back
    if frame is None:
        return "", waits
    path = Path(frame.f_code.co_filename)
    return f"{path.parent.name}/{path.name}:{frame.f_lineno} in {frame.f_code.co_name}", waits


def _current_frames() -> dict[int, FrameType]:
    """Where every thread is.

    Before Python 3.12, a garbage collection in the midst of this call that frees a `threading.local` waits for a lock
    that the call holds: for ever (python/cpython#106883). This rank would never be heard of again.
    """
    if sys.version_info >= (3, 12) or not gc.isenabled():
        return sys._current_frames()
    gc.disable()
    try:
        return sys._current_frames()
    finally:
        gc.enable()


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

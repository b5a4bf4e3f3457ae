"""What a process does before its heavy imports: outlive no launcher, lose no signal."""

from __future__ import annotations

import ctypes
import os
import signal
import socket
import sys
import threading
import time
from types import FrameType
from typing import Any

SIGNALS = (signal.SIGINT, signal.SIGTERM, signal.SIGUSR1)
# Set by llmrecipes.distributed.launcher: the process id of whoever started this one.
LAUNCHER_VARIABLE = "LLMRECIPES_LAUNCHER"
_PR_SET_PDEATHSIG = 1


def rank_name() -> str:
    """``rank 3``, or nothing on the first process of a job and where there is one; from what launchers set."""
    if "RANK" in os.environ:
        rank = os.environ["RANK"]
    elif int(os.environ.get("SLURM_NTASKS", "1")) > 1 and "SLURM_STEP_ID" in os.environ:
        rank = os.environ.get("SLURM_PROCID", "0")
    else:
        node = os.environ.get("NODE_RANK", "0")
        return "" if node == "0" else f"node {node}"
    return "" if rank == "0" else f"rank {rank}"


def start_as_child() -> None:
    """A process that was started by rank 0 of its machine dies with it, even when it is stopped or stuck."""
    launcher = os.environ.pop(LAUNCHER_VARIABLE, None)
    if launcher is None:
        return
    if sys.platform == "linux":
        ctypes.CDLL(None).prctl(_PR_SET_PDEATHSIG, signal.SIGKILL)
    if os.getppid() != int(launcher):  # it died before the line above
        os._exit(1)


class StopSignals:
    """Handlers that only remember; :class:`llmrecipes.callbacks.GracefulStop` acts on it at a step boundary.

    A second Ctrl-C ends the process at once. Signals are read from a pipe by a thread, because Python runs handlers in
    the main thread alone, and that may be waiting for a collective that never ends.

    Args:
        process_ends: the process ends after this: signals are ignored from then on, since they would change its exit
            code; otherwise the handlers before are put back.
    """

    def __init__(self, process_ends: bool = False) -> None:
        self._process_ends = process_ends
        self.started = time.monotonic()
        self.received: signal.Signals | None = None
        self._interrupts = 0
        self._before: dict[signal.Signals, Any] = {}
        self._pipe: tuple[socket.socket, socket.socket] | None = None

    def __enter__(self) -> StopSignals:
        if threading.current_thread() is not threading.main_thread():
            return self  # only tests do that: handlers belong to the main thread
        self._pipe = reader, writer = socket.socketpair()
        writer.setblocking(False)
        signal.set_wakeup_fd(writer.fileno(), warn_on_full_buffer=False)
        threading.Thread(target=self._read, args=(reader,), daemon=True, name="signals").start()
        self._before = {number: signal.signal(number, self._remember) for number in SIGNALS}
        release_signals()
        return self

    def __exit__(self, *_: object) -> None:
        if self._process_ends:
            self.ignore()
            return
        for number, handler in self._before.items():
            signal.signal(number, handler)
        self._before = {}
        if self._pipe is not None:
            signal.set_wakeup_fd(-1)
            for end in self._pipe:
                end.close()
            self._pipe = None

    def ignore(self) -> None:
        """From now on, signals change nothing: neither what is done nor the exit code."""
        if self._before:
            for number in SIGNALS:
                signal.signal(number, signal.SIG_IGN)

    def _remember(self, number: int, frame: FrameType | None) -> None:  # noqa: ARG002
        self.received = self.received or signal.Signals(number)

    def _read(self, reader: socket.socket) -> None:
        while True:
            try:
                numbers = reader.recv(64)
            except OSError:
                return
            if not numbers:
                return
            for number in numbers:
                if number in SIGNALS:
                    self._remember(number, None)
                if number == signal.SIGINT:
                    self._interrupt()

    def _interrupt(self) -> None:
        self._interrupts += 1
        if self._interrupts == 1:
            if not rank_name():
                print("Ctrl-C: stopping after this step; once more to stop at once", file=sys.stderr, flush=True)
            return
        os._exit(128 + signal.SIGINT)


def release_signals() -> None:
    """A launcher blocks signals while it starts children; now they may come."""
    signal.pthread_sigmask(signal.SIG_UNBLOCK, SIGNALS)

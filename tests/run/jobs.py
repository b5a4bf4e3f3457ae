"""Whole jobs of several ranks in forked processes: what they wrote, how they ended, signals to any of them."""

from __future__ import annotations

import contextlib
import faulthandler
import os
import pickle
import signal
import subprocess
import sys
import threading
import time
import traceback
from collections.abc import Callable
from pathlib import Path
from types import SimpleNamespace
from typing import NoReturn

import torch
from helpers import trajectory
from ranks import free_port, rank_environment

from llmrecipes import cli
from llmrecipes.distributed import launcher
from llmrecipes.process import SIGNALS
from llmrecipes.run import fit  # noqa: F401 - imported once: the ranks are forked and start in a moment

STRATEGY = {
    "class_path": "llmrecipes.distributed.ShardedStrategy",
    "init_args": {"mode": "full_shard", "timeout": 8, "start_timeout": 20},
}


def many(recipe: dict, ranks: int = 2, **options) -> dict:
    """The recipe for several processes."""
    strategy = {**STRATEGY, "init_args": STRATEGY["init_args"] | options}
    return recipe | {"trainer": recipe["trainer"] | {"devices": ranks, "strategy": strategy}}


def become(words: list[object], out: Path, err: Path, before: Callable[[], object] = lambda: None) -> NoReturn:
    """This forked process is ``llmrecipes WORDS`` from here on, writes to these files, and ends with its exit code."""
    code = 99
    try:
        for stream, path in ((1, out), (2, err)):
            os.dup2(os.open(path, os.O_CREAT | os.O_WRONLY | os.O_APPEND), stream)
        sys.stdout, sys.stderr = (open(i, "w", closefd=False) for i in (1, 2))  # noqa: SIM115
        faulthandler.register(signal.SIGUSR2)  # where it hangs
        sys.argv = ["llmrecipes", *map(str, words)]
        before()
        code = cli.main()
    except SystemExit as error:
        code = error.code
    except BaseException:
        traceback.print_exc()
        code = 1
    finally:
        sys.stdout.flush()
        sys.stderr.flush()
        os._exit(code)


class Job:
    """``llmrecipes WORDS`` on ``ranks`` forked processes, as torchrun would start them.

    Args:
        folder: for their output.
        words: of the command; a callable gets the rank.
        ranks: how many; 1 = without any environment of a launcher.
        before: called in each rank first, with its number.
        environment: rank -> variables that differ from torchrun's.
    """

    def __init__(
        self,
        folder: Path,
        words: list[object] | Callable[[int], list[object]],
        ranks: int = 2,
        before: Callable[[int], None] | None = None,
        environment: dict[int, dict[str, str]] | None = None,
        start: tuple[int, ...] | None = None,
    ) -> None:
        torch.set_num_threads(1)
        folder.mkdir(exist_ok=True)
        self.folder, self.port = folder, free_port()
        self.codes: dict[int, int] = {}
        signal.pthread_sigmask(signal.SIG_BLOCK, SIGNALS)  # as the launcher does: they must find the rank's handlers
        try:
            self.pids = {
                rank: self._fork(rank, ranks, words, before, (environment or {}).get(rank, {}))
                for rank in start or range(ranks)
            }
        finally:
            signal.pthread_sigmask(signal.SIG_UNBLOCK, SIGNALS)

    def _fork(self, rank, ranks, words, before, environment) -> int:
        pid = os.fork()
        if pid:
            return pid
        for name in ("out", "err"):
            (self.folder / f"{name}{rank}.txt").unlink(missing_ok=True)
        if ranks > 1:
            os.environ.update(rank_environment(rank, ranks, self.port) | environment)
        words = words(rank) if callable(words) else words
        become(words, *(self.folder / f"{name}{rank}.txt" for name in ("out", "err")), lambda: before and before(rank))

    def send(self, number: int, *ranks: int) -> None:
        for rank in ranks or self.pids:
            if rank not in self.codes:
                os.kill(self.pids[rank], number)

    def until(self, condition: Callable[[], bool], timeout: float = 60) -> None:
        end = time.monotonic() + timeout
        while not condition():
            assert self.poll() == {}, f"ended early: {self.codes}\n{self.errors()}"
            assert time.monotonic() < end, f"too slow\n{self.errors()}"
            time.sleep(0.002)

    def until_step(self, run: Path, step: int) -> None:
        """Until a step is logged; the last line may be half written."""

        def logged() -> bool:
            file = run / "metrics.jsonl"
            return file.exists() and file.read_text().count('"loss"') >= step

        self.until(logged)

    def poll(self) -> dict[int, int]:
        for rank, pid in self.pids.items():
            if rank not in self.codes:
                done, status = os.waitpid(pid, os.WNOHANG)
                if done:
                    self.codes[rank] = os.waitstatus_to_exitcode(status)
        return self.codes

    def wait(self, *ranks: int, timeout: float = 90) -> list[int]:
        """The exit codes of these ranks, or of all; everything is killed when it takes too long."""
        wanted, end = ranks or tuple(self.pids), time.monotonic() + timeout
        try:
            while not set(wanted) <= set(self.poll()):
                if time.monotonic() > end:
                    self.send(signal.SIGUSR2)
                    time.sleep(1)
                    raise AssertionError(f"only {self.codes} after {timeout} s\n{self.errors()}")
                time.sleep(0.01)
        except AssertionError:
            self.kill()
            raise
        return [self.codes[rank] for rank in wanted]

    def kill(self) -> None:
        self.send(signal.SIGKILL)
        self.wait()

    def text(self, name: str, rank: int) -> str:
        file = self.folder / f"{name}{rank}.txt"
        return file.read_text() if file.exists() else ""

    def errors(self) -> str:
        return "\n".join(
            f"--- rank {rank}\n{self.text('out', rank)[-1500:]}{self.text('err', rank)}" for rank in self.pids
        )

    def __enter__(self) -> Job:
        return self

    def __exit__(self, *_: object) -> None:
        self.kill()


class Waiting:
    """A child that waits to become what ``Popen`` would start; has of Popen what the launcher uses."""

    def __init__(self, words: list[object], out: Path, err: Path) -> None:
        reader, self._writer = os.pipe()
        self.returncode: int | None = None
        self._lock = threading.Lock()
        self.pid = os.fork()
        if self.pid == 0:
            os.close(self._writer)
            with os.fdopen(reader, "rb") as pipe:
                sent = pipe.read()
            if not sent:
                os._exit(98)  # whoever it waited for has ended
            os.environ.clear()
            os.environ.update(pickle.loads(sent))
            become(words, out, err)

    def begin(self, environment: dict[str, str]) -> None:
        os.write(self._writer, pickle.dumps(environment))
        os.close(self._writer)

    def poll(self) -> int | None:
        with self._lock:
            if self.returncode is None:
                done, status = os.waitpid(self.pid, os.WNOHANG)
                if done:
                    self.returncode = os.waitstatus_to_exitcode(status)
        return self.returncode

    def wait(self, timeout: float) -> int:
        end = time.monotonic() + timeout
        while self.poll() is None:
            if time.monotonic() > end:
                raise subprocess.TimeoutExpired("a forked rank", timeout)
            time.sleep(0.01)
        return self.returncode

    def kill(self) -> None:
        os.kill(self.pid, signal.SIGKILL)


class SelfStarted:
    """``llmrecipes fit`` that starts its other rank itself, in a process group of its own, without new interpreters.

    Rank 0 is forked from here, and the child that its launcher is to start from rank 0, before that has done anything.
    """

    starts_in = 0.2

    def __init__(self, folder: Path, path: Path) -> None:
        words = ["fit", "--config", path, "--run_root", folder]
        self.output, self._child = (folder / "out.txt", folder / "err.txt"), folder / "child.txt"
        for file in (*self.output, self._child):
            file.unlink(missing_ok=True)
        signal.pthread_sigmask(signal.SIG_BLOCK, SIGNALS)  # of the child too, as the launcher does
        try:
            self.pid = os.fork()
            if self.pid == 0:
                os.setsid()
                waiting = Waiting(words, *self.output)
                become(words, *self.output, lambda: self._launches(waiting))
        finally:
            signal.pthread_sigmask(signal.SIG_UNBLOCK, SIGNALS)
        self.code: int | None = None

    def _launches(self, waiting: Waiting) -> None:
        def popen(command: list[str], env: dict[str, str]) -> Waiting:
            waiting.begin(env)
            self._child.with_suffix(".new").write_text(str(waiting.pid))
            self._child.with_suffix(".new").rename(self._child)
            return waiting

        launcher.subprocess = SimpleNamespace(Popen=popen, TimeoutExpired=subprocess.TimeoutExpired)

    def child(self) -> int:
        """The id of the other rank, once it is launched."""
        self._until(self._child.exists)
        return int(self._child.read_text())

    def until_step(self, run: Path, step: int) -> None:
        self._until(lambda: (run / "metrics.jsonl").exists() and len(losses(run)) >= step)

    def _until(self, condition: Callable[[], bool], timeout: float = 60) -> None:
        end = time.monotonic() + timeout
        while not condition():
            assert time.monotonic() < end and not self._ended(), self.end()
            time.sleep(0.01)

    def send(self, number: int) -> None:
        os.kill(self.pid, number)

    def _ended(self) -> bool:
        if self.code is None:
            done, status = os.waitpid(self.pid, os.WNOHANG)
            if done:
                self.code = os.waitstatus_to_exitcode(status)
        return self.code is not None

    def end(self) -> tuple[int | None, str, str]:
        """Exit code, and what both ranks said; what has not ended by itself is killed."""
        end = time.monotonic() + 60
        while not self._ended() and time.monotonic() < end:
            time.sleep(0.01)
        with contextlib.suppress(ProcessLookupError):
            os.killpg(self.pid, signal.SIGKILL)
        if self.code is None:
            os.waitpid(self.pid, 0)
        out, err = (file.read_text() if file.exists() else "" for file in self.output)
        return self.code, out, err


def losses(run: Path) -> list[dict]:
    """The training records of a run."""
    return [record for record in trajectory(run) if "loss" in record]

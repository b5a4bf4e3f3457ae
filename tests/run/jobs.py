"""Whole jobs of several ranks in forked processes: what they wrote, how they ended, signals to any of them."""

from __future__ import annotations

import os
import signal
import sys
import time
import traceback
from collections.abc import Callable
from pathlib import Path

import torch
from helpers import trajectory
from ranks import free_port, rank_environment

from llmrecipes import cli
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


class Job:
    """``llmrecipes WORDS`` on ``ranks`` forked processes, as torchrun would start them.

    Args:
        folder: for their output.
        words: of the command; a callable gets the rank.
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
        code = 99
        try:
            for stream, name in ((1, "out"), (2, "err")):
                file = os.open(self.folder / f"{name}{rank}.txt", os.O_CREAT | os.O_WRONLY | os.O_TRUNC)
                os.dup2(file, stream)
            sys.stdout, sys.stderr = (open(i, "w", closefd=False) for i in (1, 2))  # noqa: SIM115
            os.environ.update(rank_environment(rank, ranks, self.port) | environment)
            sys.argv = ["llmrecipes", *map(str, words(rank) if callable(words) else words)]
            if before is not None:
                before(rank)
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
                assert time.monotonic() < end, f"only {self.codes} after {timeout} s\n{self.errors()}"
                time.sleep(0.01)
        except AssertionError:
            self.kill()
            raise
        return [self.codes[rank] for rank in wanted]

    def kill(self) -> None:
        self.send(signal.SIGKILL)
        self.wait()

    def text(self, name: str, rank: int) -> str:
        return (self.folder / f"{name}{rank}.txt").read_text()

    def errors(self) -> str:
        return "\n".join(
            f"--- rank {rank}\n{self.text('out', rank)[-1500:]}{self.text('err', rank)}" for rank in self.pids
        )

    def __enter__(self) -> Job:
        return self

    def __exit__(self, *_: object) -> None:
        self.kill()


def losses(run: Path) -> list[dict]:
    """The training records of a run."""
    return [record for record in trajectory(run) if "loss" in record]

"""Signals, a time limit, a stop file: all ranks finish the same step, save, and leave with one exit code."""

from __future__ import annotations

import logging
import signal
import time
from collections.abc import Callable
from pathlib import Path
from typing import Any

import lightning.pytorch as L
import torch
import torch.distributed as dist

from llmrecipes.process import StopSignals
from llmrecipes.recipe import TimeSpan

log = logging.getLogger("llmrecipes")

EXIT_RESUMABLE = 75
# What a rank asks for, as a number that can be compared over ranks; signals are their own numbers.
TIME_LIMIT, STOP_FILE = 100, 101
MAX_RANKS = 2**20
# A stop file may be on a slow shared disk.
LOOK_EVERY = 1.0


class GracefulStop(L.Callback):
    """Stops a run at a step boundary when some rank is asked to: SIGTERM, SIGINT, SIGUSR1, a time limit, a stop file.

    A signal may reach one rank, or all at different moments. Before each step the ranks take the maximum of what they
    were asked; after it they act on that: the same step for all.

    Args:
        time_limit: save and stop after this time, such as ``3h50m``; ``null`` = none. Counted from the command's start.
        file: stop when a file of this name appears in the run folder; it is removed then. ``null`` = no such file.
    """

    def __init__(self, time_limit: TimeSpan | None = None, file: str | None = "STOP") -> None:
        self.time_limit = None if time_limit is None else TimeSpan.parse(time_limit)
        self.file = file
        self.requests: StopSignals | None = None
        self.save: Callable[[L.Trainer, Any], Any] | None = None
        self.stopped: str | None = None  # why: a signal's name, time_limit or file
        self._agreement: _Agreement | None = None
        self._started = time.monotonic()
        self._looked = -LOOK_EVERY

    def on_train_start(self, trainer: L.Trainer, pl_module: Any) -> None:
        self._agreement = _Agreement(trainer)
        self._agreement.propose(self._asked(trainer))
        if (asked := self._agreement.result()) and trainer.global_step < trainer.max_steps:
            self._stop(trainer, asked, "nothing was saved: no step was done")

    def on_train_batch_start(self, trainer: L.Trainer, pl_module: Any, batch: Any, batch_idx: int) -> None:
        assert self._agreement is not None
        self._agreement.propose(self._asked(trainer))

    def on_train_batch_end(self, trainer: L.Trainer, pl_module: Any, outputs: Any, batch: Any, batch_idx: int) -> None:
        assert self._agreement is not None
        asked = self._agreement.result()
        if asked and self.stopped is None and trainer.global_step < trainer.max_steps:
            assert self.save is not None
            self._stop(trainer, asked, f"saved {self.save(trainer, pl_module)}")

    def _asked(self, trainer: L.Trainer) -> int:
        """What this rank is asked for; 0 = nothing. The clock and the file are rank 0's business."""
        if self.requests is not None and self.requests.received is not None:
            return int(self.requests.received)
        if not trainer.is_global_zero:
            return 0
        now = time.monotonic()
        started = self._started if self.requests is None else self.requests.started
        if self.time_limit is not None and now - started >= self.time_limit.seconds:
            return TIME_LIMIT
        if self.file is not None and now - self._looked >= LOOK_EVERY:
            self._looked = now
            if self._path(trainer).exists():
                return STOP_FILE
        return 0

    def _path(self, trainer: L.Trainer) -> Path:
        return Path(trainer.default_root_dir) / (self.file or "")

    def _stop(self, trainer: L.Trainer, asked: tuple[int, int], saved: str) -> None:
        if self.requests is not None:
            self.requests.ignore()  # a second one while the process leaves would change its exit code
        what = self._words(trainer, *asked)
        if trainer.is_global_zero and asked[0] == STOP_FILE:
            self._path(trainer).unlink(missing_ok=True)
        log.info(f"{what}: stopped after step {trainer.global_step}, {saved}; the same command goes on from here")
        self.stopped = {TIME_LIMIT: "time_limit", STOP_FILE: "file"}.get(asked[0]) or signal.Signals(asked[0]).name
        trainer.should_stop = True
        # Lightning would validate once more on its way out, while the scheduler's patience runs out.
        trainer.limit_val_batches = 0

    def _words(self, trainer: L.Trainer, kind: int, rank: int) -> str:
        if kind == TIME_LIMIT:
            return f"time limit {self.time_limit}"
        if kind == STOP_FILE:
            return f"{self._path(trainer)} exists"
        name = signal.Signals(kind).name
        return f"{name} on rank {rank}" if trainer.world_size > 1 else name

    def teardown(self, trainer: L.Trainer, pl_module: L.LightningModule, stage: str) -> None:
        self._agreement = None


class _Agreement:
    """The maximum over ranks, found while a step is made.

    On the CPU and in a group of its own, so that the device is not waited for and other traffic is not disturbed.

    Args:
        trainer: whose ranks must agree.
    """

    def __init__(self, trainer: L.Trainer) -> None:
        self._rank = trainer.global_rank
        self._group = None
        if trainer.world_size > 1 and dist.is_available() and dist.is_initialized():
            timeout = getattr(trainer.strategy, "collective_timeout", None)
            self._group = dist.new_group(backend="gloo", timeout=timeout)
        self._value = torch.zeros((), dtype=torch.int64)
        self._work: Any = None

    def propose(self, kind: int) -> None:
        """What this rank wants; begins to tell the others. Collective."""
        # Of equal requests the lowest rank's is named.
        self._value = torch.tensor(kind * MAX_RANKS + (MAX_RANKS - 1 - self._rank if kind else 0))
        if self._group is not None:
            self._work = dist.all_reduce(self._value, dist.ReduceOp.MAX, group=self._group, async_op=True)

    def result(self) -> tuple[int, int] | None:
        """The request and the rank it came to; None = nobody wants anything."""
        if self._work is not None:
            self._work.wait()
            self._work = None
        kind, rank = divmod(int(self._value), MAX_RANKS)
        return (kind, MAX_RANKS - 1 - rank) if kind else None

"""Small training states and a way to make writing them fail, for the tests of checkpoints."""

from __future__ import annotations

import errno
import os
import signal
from collections.abc import Callable
from pathlib import Path
from typing import Any

import torch

from llmrecipes.checkpoint import TrainingState, durable
from llmrecipes.checkpoint.state import rng_state


def small_state(step: int = 3) -> TrainingState:
    """One tensor of every kind that a run stores."""
    generator = torch.Generator().manual_seed(step)
    weight = torch.randn(4, 3, generator=generator)
    return TrainingState(
        step=step,
        model={
            "fp32": weight,
            "bf16": weight.bfloat16(),
            "fp64": weight.double(),
            "transposed": weight.clone().T,
            "counts": torch.tensor([1, 2, 3]),
            "empty": torch.zeros(0, 5),
            "name.with.dots": torch.ones(1),
        },
        optimizer={"fp32.step": torch.tensor(7.0), "fp32.exp_avg": weight.square(), "fp32.exp_avg_sq": weight.abs()},
        rng=rng_state(),
        info={"progress": {"step": step, "consumed_tokens": 10**13, "名": "あ", "cool_down": None}},
    )


# Everything through which a checkpoint reaches the disk, and through which it is read back.
WRITES = [
    (durable, "put"),
    (os, "fsync"),
    (Path, "mkdir"),
    (Path, "open"),
    (Path, "rename"),
]


class Saboteur:
    """Counts the writes of a checkpoint and does something at the ``at``-th one, after half of it was written.

    Args:
        at: which call, from 1; 0 = none, only count.
        act: what happens then.
        watched: the functions that count.
    """

    def __init__(
        self, monkeypatch: Any, at: int, act: Callable[[], None], watched: list[tuple[Any, str]] = WRITES
    ) -> None:
        self.count, self.at, self.act, self.calls = 0, at, act, []
        for owner, name in watched:
            monkeypatch.setattr(owner, name, self._wrap(name, getattr(owner, name)))

    def _wrap(self, name: str, original: Callable[..., Any]) -> Callable[..., Any]:
        def call(*args: Any, **kwargs: Any) -> Any:
            self.count += 1
            self.calls.append(name)
            if self.count == self.at:
                if name == "put":
                    args[0].write(memoryview(args[1])[: len(args[1]) // 2])
                    args[0].flush()
                self.act()
            return original(*args, **kwargs)

        return call


def kill_9() -> None:
    os.kill(os.getpid(), signal.SIGKILL)


def disk_full() -> None:
    raise OSError(errno.ENOSPC, os.strerror(errno.ENOSPC))

"""Saving while training goes on: a copy of the state is taken, a thread writes it."""

from __future__ import annotations

import threading
from collections.abc import Callable, Mapping
from dataclasses import replace

import torch
import torch.distributed as dist
from torch import Tensor

from llmrecipes.checkpoint.ranks import ranks
from llmrecipes.checkpoint.shards import local
from llmrecipes.checkpoint.state import TrainingState

Write = Callable[[TrainingState, dist.ProcessGroup | None], None]


class BackgroundSave:
    """At most one save in flight, on a thread of each rank.

    The threads talk over a gloo group of their own, so they meet no collective of the training. Whatever fails on one
    rank is known to all threads before they end; :meth:`poll` and :meth:`finish`, called by all ranks at the same step,
    raise it on all of them.
    """

    def __init__(self) -> None:
        self._buffers: dict[str, Tensor] = {}
        self._thread: threading.Thread | None = None
        self._error: BaseException | None = None
        self._writers: dist.ProcessGroup | None = None
        self._pollers: dist.ProcessGroup | None = None

    @property
    def in_flight(self) -> bool:
        """A save was started and not yet finished; the same on all ranks."""
        return self._thread is not None

    def start(self, state: TrainingState, write: Write) -> None:
        """Copy ``state`` to the host and let ``write(copy, group)`` run. Collective; waits for the save before it.

        Args:
            state: may change as soon as this returns.
            write: ends with the same outcome on all ranks.
        """
        self.finish()
        if self._writers is None and ranks() > 1:
            self._writers, self._pollers = dist.new_group(backend="gloo"), dist.new_group(backend="gloo")
        copy = replace(
            state, model=self._copy("model", state.model), optimizer=self._copy("optimizer", state.optimizer)
        )
        if torch.cuda.is_available():
            torch.cuda.synchronize()  # copies to pinned memory run on
        self._thread = threading.Thread(target=self._run, args=(write, copy), name="checkpoint", daemon=True)
        self._thread.start()

    def _run(self, write: Write, state: TrainingState) -> None:
        try:
            write(state, self._writers)
        except BaseException as error:  # it is raised where the thread is waited for
            self._error = error

    def _copy(self, part: str, tensors: Mapping[str, Tensor]) -> dict[str, Tensor]:
        """The slices of this rank in buffers that are reused from save to save: new memory costs more than copying."""
        copies = {}
        for name, tensor in tensors.items():
            buffer = self._buffers.get(key := f"{part}/{name}")
            if buffer is None or not _alike(buffer, tensor):
                pin = tensor.device.type == "cuda"
                buffer = self._buffers[key] = torch.empty_like(tensor.detach(), device="cpu", pin_memory=pin)
            local(buffer).copy_(local(tensor), non_blocking=True)
            copies[name] = buffer
        return copies

    def poll(self) -> None:
        """Finish the save if it is done on every rank; costs a tiny exchange, and nothing when none is in flight.

        Raises:
            CheckpointError: it failed.
        """
        if self._thread is None:
            return
        running = torch.tensor(int(self._thread.is_alive()))
        if self._pollers is not None:
            dist.all_reduce(running, dist.ReduceOp.MAX, group=self._pollers)
        if not running:
            self.finish()

    def finish(self) -> None:
        """Wait for the save in flight, if any.

        Raises:
            CheckpointError: it failed.
        """
        if self._thread is None:
            return
        self._thread.join()
        self._thread, error, self._error = None, self._error, None
        if error is not None:
            raise error

    def abandon(self, seconds: float) -> None:
        """Give the save in flight that long to end by itself, and forget how; for a process that fails anyway."""
        if self._thread is not None:
            self._thread.join(seconds)
            self._thread, self._error = None, None


def _alike(a: Tensor, b: Tensor) -> bool:
    same = a.shape == b.shape and a.dtype == b.dtype and local(a).shape == local(b).shape and type(a) is type(b)
    return same and getattr(a, "placements", None) == getattr(b, "placements", None)

"""Ctrl-C, SIGTERM and SIGUSR1: finish the step, save, leave with an exit code a scheduler understands."""

from __future__ import annotations

import logging
import signal
from collections.abc import Callable
from types import FrameType
from typing import Any

import lightning.pytorch as L

log = logging.getLogger("llmrecipes")

EXIT_RESUMABLE = 75
SIGNALS = (signal.SIGINT, signal.SIGTERM, signal.SIGUSR1)


class GracefulStop(L.Callback):
    """A signal sets a flag; the save happens at the step boundary. A second Ctrl-C kills at once.

    Args:
        save: writes a checkpoint of the present step, given the trainer and the module.
    """

    def __init__(self, save: Callable[[L.Trainer, Any], Any]) -> None:
        self._save = save
        self._received: signal.Signals | None = None
        self._before: dict[signal.Signals, Any] = {}
        self.stopped = False

    def on_train_start(self, trainer: L.Trainer, pl_module: L.LightningModule) -> None:
        # Here and not earlier: Lightning installs handlers of its own just before, which save in the middle of a step.
        self._before = {number: signal.signal(number, self._on_signal) for number in SIGNALS}

    def _on_signal(self, number: int, frame: FrameType | None) -> None:
        if self._received == signal.SIGINT == number:
            raise KeyboardInterrupt
        self._received = signal.Signals(number)

    def on_train_batch_end(self, trainer: L.Trainer, pl_module: Any, outputs: Any, batch: Any, batch_idx: int) -> None:
        if self._received is not None and not self.stopped:
            path = self._save(trainer, pl_module)
            log.info(
                f"{self._received.name}: stopped after step {trainer.global_step}, saved {path}; "
                "the same command goes on from here"
            )
            self.stopped = trainer.should_stop = True
            # Lightning would validate once more on its way out, while the scheduler's patience runs out.
            trainer.limit_val_batches = 0

    def teardown(self, trainer: L.Trainer, pl_module: L.LightningModule, stage: str) -> None:
        self._restore_handlers()

    def on_exception(self, trainer: L.Trainer, pl_module: L.LightningModule, exception: BaseException) -> None:
        self._restore_handlers()  # Lightning does not call teardown after an exception

    def _restore_handlers(self) -> None:
        for number, handler in self._before.items():
            signal.signal(number, handler)
        self._before = {}

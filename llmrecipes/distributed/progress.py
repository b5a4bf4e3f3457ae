"""How far a rank has come, for the watchdog: callbacks around all others."""

from __future__ import annotations

from typing import Any

import lightning.pytorch as L

from llmrecipes.distributed.judge import Phase
from llmrecipes.distributed.watchdog import Watchdog


def watchdog_of(trainer: L.Trainer) -> Watchdog | None:
    """The watchdog of a job of several processes."""
    return getattr(trainer.strategy, "watchdog", None)


class StepMarks(L.Callback):
    """Marks the phases of a step; the first of all callbacks."""

    def _mark(self, trainer: L.Trainer, step: int, phase: Phase) -> None:
        if (watchdog := watchdog_of(trainer)) is not None:
            watchdog.mark(step, phase)

    def setup(self, trainer: L.Trainer, pl_module: L.LightningModule, stage: str) -> None:
        self._mark(trainer, 0, Phase.SET_UP)

    def on_train_start(self, trainer: L.Trainer, pl_module: L.LightningModule) -> None:
        self._mark(trainer, trainer.global_step, Phase.SET_UP)

    def on_train_batch_start(self, trainer: L.Trainer, pl_module: Any, batch: Any, batch_idx: int) -> None:
        self._mark(trainer, trainer.global_step + 1, Phase.COMPUTE)

    def on_train_batch_end(self, trainer: L.Trainer, pl_module: Any, outputs: Any, batch: Any, batch_idx: int) -> None:
        self._mark(trainer, trainer.global_step, Phase.FINISH)

    def on_validation_batch_start(
        self, trainer: L.Trainer, pl_module: Any, batch: Any, batch_idx: int, dataloader_idx: int = 0
    ) -> None:
        self._mark(trainer, trainer.global_step, Phase.VALIDATE)

    def on_train_end(self, trainer: L.Trainer, pl_module: L.LightningModule) -> None:
        self._mark(trainer, trainer.global_step, Phase.FINISH)


class ReadMark(L.Callback):
    """Marks that the next thing is reading data; the last of all callbacks."""

    def on_train_start(self, trainer: L.Trainer, pl_module: L.LightningModule) -> None:
        self._mark(trainer)

    def on_train_batch_end(self, trainer: L.Trainer, pl_module: Any, outputs: Any, batch: Any, batch_idx: int) -> None:
        self._mark(trainer)

    def on_validation_end(self, trainer: L.Trainer, pl_module: L.LightningModule) -> None:
        if trainer.state.fn == "fit":
            self._mark(trainer)

    def _mark(self, trainer: L.Trainer) -> None:
        if (watchdog := watchdog_of(trainer)) is not None:
            watchdog.mark(trainer.global_step + 1, Phase.READ)

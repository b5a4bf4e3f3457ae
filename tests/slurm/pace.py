"""A training that takes as long as a test needs."""

from __future__ import annotations

import time
from pathlib import Path

import lightning.pytorch as L

from llmrecipes.callbacks import GracefulStop


class Pace(L.Callback):
    """Waits ``seconds`` before each step; after ``hold`` steps until the file ``release`` exists, or for a signal."""

    def __init__(self, seconds: float = 0.0, hold: int | None = None, release: str | None = None) -> None:
        self.seconds, self.hold, self.release = seconds, hold, release

    def on_train_batch_start(self, trainer, pl_module, batch, batch_idx):
        time.sleep(self.seconds)
        while trainer.global_step == self.hold and not self.released(trainer):
            time.sleep(0.05)

    def released(self, trainer) -> bool:
        if self.release is not None:
            return Path(self.release).exists()
        (stop,) = (callback for callback in trainer.callbacks if isinstance(callback, GracefulStop))
        return stop.requests is not None and stop.requests.received is not None

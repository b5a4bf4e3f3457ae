"""A training that takes as long as a test needs."""

from __future__ import annotations

import time
from pathlib import Path

import lightning.pytorch as L


class Pace(L.Callback):
    """Waits ``seconds`` before each step; after ``hold`` steps until the file ``release`` exists."""

    def __init__(self, seconds: float, hold: int | None = None, release: str = "") -> None:
        self.seconds, self.hold, self.release = seconds, hold, Path(release)

    def on_train_batch_start(self, trainer, pl_module, batch, batch_idx):
        time.sleep(self.seconds)
        while trainer.global_step == self.hold and not self.release.exists():
            time.sleep(0.05)

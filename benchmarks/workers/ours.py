"""Our side of the step cases is the program itself, ``llmrecipes fit``, with this callback in its recipe."""

from __future__ import annotations

import statistics
from typing import Any

import lightning.pytorch as L

from benchmarks.meter import Meter, matmul_rate, write_record
from llmrecipes.data.preference_data import PreferenceBatch


class StepTimes(L.Callback):
    """Marks the end of each optimizer step and writes the record after the last one, before its checkpoint."""

    def __init__(self) -> None:
        self._meter = Meter()
        self._work: list[float] = []

    def on_train_batch_end(self, trainer: L.Trainer, module: Any, _: object, batch: Any, *__: object) -> None:
        """Lightning calls it after a step with all that belongs to it: batch, update, learning rate."""
        self._meter.mark(float(module.last_step.losses["loss"]))
        if isinstance(batch, PreferenceBatch):
            self._work.append(len(batch.pair_numbers))
        elif batch.token_mask is not None:
            self._work.append(float(batch.token_mask.sum()))
        if trainer.global_step == trainer.max_steps:
            record = self._meter.record()
            record |= {"work": statistics.mean(self._work)} if self._work else {}
            dtype = "bf16" if trainer.precision == "bf16-mixed" else "fp32"
            write_record(record | {"matmul_gflop_per_cpu_s": matmul_rate(dtype)})

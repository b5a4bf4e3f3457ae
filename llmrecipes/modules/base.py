"""The one optimizer step that every stage shares, and the only division of a loss.

One batch of the Trainer is one optimizer step: this rank's whole share of the global batch. It is split into
micro-batches here; every loss is a sum, divided by the count of the whole step over all micro-batches and data ranks.
Gradients are therefore the same for every split (Lightning's ``accumulate_grad_batches`` averages means instead).
"""

from __future__ import annotations

import math
from pathlib import Path
from typing import Any

import lightning.pytorch as L
import torch
from torch import Tensor

from llmrecipes.checkpoint import checkpoints
from llmrecipes.data.batch import Batch
from llmrecipes.distributed import clip_grad_norm
from llmrecipes.modules.loss_terms import LossTerm
from llmrecipes.modules.step_record import StepRecord
from llmrecipes.optim import AdamW, CoolDown, RunLength, Schedule
from llmrecipes.recipe import Duration


class TrainingStopped(Exception):
    """Training cannot go on; the state on disk is safe. Says what happened and where to go on from."""


class StepModule(L.LightningModule):
    """Base of all stages: subclasses give ``model`` and :meth:`loss_terms`.

    Args:
        optimizer: how parameters are updated.
        schedule: the learning rate over the run.
        clip_norm: largest global gradient norm; ``null`` measures without clipping.
    """

    model: Any

    def __init__(self, optimizer: AdamW, schedule: Schedule, clip_norm: float | None) -> None:
        super().__init__()
        self.automatic_optimization = False
        self.optimizer_recipe = optimizer
        self.schedule = schedule
        self.clip_norm = clip_norm
        self.last_step: StepRecord | None = None
        self.validation_loss: float | None = None
        self.validation_metrics: dict[str, float] = {}
        self._validation: dict[int, tuple[float, int]] = {}
        # Set by whoever launches the run: what decides its trajectory, and a fall of the rate to its end.
        self.trajectory: dict[str, Any] | None = None
        self.start_cool_down: tuple[int, Duration] | None = None
        self._run_length: RunLength | None = None

    # ---- what a stage defines

    def loss_terms(self, batch: Batch) -> dict[str, LossTerm]:
        """The parts of one micro-batch's loss, as sums with gradients; ``loss`` is the one to report and validate."""
        raise NotImplementedError  # pragma: no cover - abstract

    def before_micro_batches(self, micro_batches: list[Batch], counts: dict[str, int]) -> None:
        """Called once per step before the first forward."""

    def after_step(self, record: StepRecord) -> None:
        """Called once per step after the parameters moved; adds the stage's own figures to the record."""

    # ---- the step

    def configure_optimizers(self) -> torch.optim.Optimizer:
        return self.optimizer_recipe.build(self.model.named_parameters())

    def training_step(self, batch: Batch, batch_idx: int) -> None:
        optimizer: Any = self.optimizers()
        step = self.trainer.global_step
        counts = {"targets": batch.num_targets, "tokens": batch.num_tokens}
        micro_batches = batch.split(self.micro_batch)
        self.before_micro_batches(micro_batches, counts)
        sums: dict[str, Tensor] = {}
        for micro_batch in micro_batches:
            terms = self.loss_terms(micro_batch)
            self._backward(terms, counts)
            for name, term in terms.items():
                sums[name] = sums.get(name, 0.0) + term.sum.detach() / max(1, counts[term.per])
        norm = clip_grad_norm(self.model.parameters(), self.clip_norm)
        self._refuse_non_finite(step, sums, norm)
        learning_rate = self.set_learning_rate(optimizer.optimizer, step)
        optimizer.step()
        optimizer.zero_grad(set_to_none=True)
        self.last_step = StepRecord(
            step=step + 1,
            tokens=(step + 1) * self.tokens_per_step,
            losses=sums,
            grad_norm=norm,
            lr=learning_rate,
            batch=batch,
        )
        self.after_step(self.last_step)

    def _backward(self, terms: dict[str, LossTerm], counts: dict[str, int]) -> None:
        parts = [term.sum * (term.weight / max(1, counts[term.per])) for term in terms.values() if term.weight]
        # The forward runs under autocast; its backward repeats the forward's types and must not be cast again.
        with torch.autocast(self.device.type, enabled=False):
            self.manual_backward(torch.stack([part.to(parts[0].dtype) for part in parts]).sum())

    def _refuse_non_finite(self, step: int, losses: dict[str, Tensor], norm: Tensor) -> None:
        """Stop before the update is applied: the parameters on the device are still the last good ones."""
        figures = {"gradient norm": float(norm), **{name: float(value) for name, value in losses.items()}}
        bad = [f"{name} is {value}" for name, value in figures.items() if not math.isfinite(value)]
        if bad:
            root = Path(self.trainer.default_root_dir) / "checkpoints"
            saved = checkpoints(root)
            good = f"The last good checkpoint is {saved[-1]}." if saved else f"{root} holds no checkpoint yet."
            raise TrainingStopped(f"step {step + 1}: {', '.join(bad)}; the step was not applied. {good}")

    def set_learning_rate(self, optimizer: torch.optim.Optimizer, step: int) -> float:
        """Set the rate of optimizer step ``step`` (from 0) and return it."""
        rate = self.optimizer_recipe.lr * self.schedule.factor(step, self.run_length)
        for group in optimizer.param_groups:
            group["lr"] = rate
        return rate

    # ---- lengths and progress

    @property
    def micro_batch(self) -> int:
        return self.trainer.datamodule.micro_batch  # type: ignore[attr-defined]

    @property
    def tokens_per_step(self) -> int:
        """Token slots of one optimizer step: global batch x sequence length."""
        return self.trainer.datamodule.tokens_per_step  # type: ignore[attr-defined]

    @property
    def run_length(self) -> RunLength:
        """The recipe's run: a cool-down that ends it earlier does not bend the schedule it starts from."""
        assert self._run_length is not None, "known from on_fit_start on"
        return self._run_length

    def progress(self) -> dict[str, Any]:
        """What a checkpoint records of the position in the run."""
        step = self.trainer.global_step
        return {
            "step": step,
            "consumed_samples": step * self.trainer.datamodule.global_batch,  # type: ignore[attr-defined]
            "consumed_tokens": step * self.tokens_per_step,
            "trajectory": self.trajectory,
            "cool_down": None
            if self.start_cool_down is None
            else [self.start_cool_down[0], str(self.start_cool_down[1])],
        }

    def on_fit_start(self) -> None:
        self._run_length = RunLength(self.trainer.max_steps, self.tokens_per_step)
        if self.start_cool_down is not None:
            start, duration = self.start_cool_down
            self.schedule = CoolDown(self.schedule, start, duration)
            self.trainer.fit_loop.epoch_loop.max_steps = start + duration.to_steps(self.tokens_per_step)

    # ---- validation

    def on_validation_epoch_start(self) -> None:
        self._validation = {}

    def validation_step(self, batch: Batch, batch_idx: int, dataloader_idx: int = 0) -> None:
        total = self.loss_terms(batch)["loss"].sum
        before, count = self._validation.get(dataloader_idx, (0.0, 0))
        self._validation[dataloader_idx] = (before + float(total), count + batch.num_targets)

    def on_validation_epoch_end(self) -> None:
        """Loss per validation set, and over all their tokens."""
        names = self.trainer.datamodule.valid_names  # type: ignore[attr-defined]
        sums = {names[i]: pair for i, pair in sorted(self._validation.items())}
        total, count = (sum(column) for column in zip(*sums.values(), strict=True)) if sums else (0.0, 0)
        self.validation_metrics = {f"val_loss/{name}": s / c for name, (s, c) in sums.items() if c}
        self.validation_loss = total / count if count else None
        if self.validation_loss is not None:
            self.validation_metrics["val_loss"] = self.validation_loss

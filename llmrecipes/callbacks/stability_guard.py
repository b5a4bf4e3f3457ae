"""Spikes of loss and gradient norm: noticed, left out, or undone."""

from __future__ import annotations

import logging
import math
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path
from typing import Any, Literal

import lightning.pytorch as L
import torch
from torch import Tensor

from llmrecipes.callbacks.events import append_event
from llmrecipes.callbacks.skipped_steps import Rollback, SkippedSteps, read_rollbacks
from llmrecipes.callbacks.spike_detector import SpikeDetector

log = logging.getLogger("llmrecipes")

SpikeAction = Literal["warn", "skip_step", "rollback"]
NonFiniteAction = Literal["stop", "skip_step", "rollback"]


@dataclass(frozen=True)
class Incident:
    """What a rollback has to undo.

    Args:
        step: the last step made.
        first_bad: the first of the bad steps in a row; the state before it is trusted.
        rollback_to: which trusted checkpoint, 1 = the newest.
        reason: what was wrong, in words.
        figures: in numbers.
        rollbacks: made so far.
    """

    step: int
    first_bad: int
    rollback_to: int
    reason: str
    figures: dict[str, float]
    rollbacks: tuple[Rollback, ...]


@dataclass(frozen=True)
class Restored:
    """What a rollback did, and what the guard knew at the checkpoint."""

    rollback: Rollback
    knowledge: dict[str, Any]


class StabilityGuard(L.Callback):
    """Judges each step's loss and gradient norm by the healthy ones before it, and acts on spikes.

    A bad step is never part of what the next ones are judged by. Nothing here waits for the device: limits follow from
    earlier steps, the comparison with them is made on the device, and figures are looked at when they have arrived.

    Args:
        action: on a spike: ``warn``; ``skip_step``: leave the update out; ``rollback``: after ``patience`` bad steps in
            a row, go back to a good checkpoint and pass over the data since then.
        non_finite: on a loss or gradient norm that is not finite, whose update is never made: ``stop``, ``skip_step``
            or, at once, ``rollback``.
        window: healthy steps that are remembered.
        min_history: healthy steps before the first verdict.
        loss_threshold: robust deviations above the usual loss that make a spike.
        grad_threshold: the same of the gradient norm's logarithm.
        patience: bad steps in a row before a rollback; with ``skip_step``, before the run stops.
        rollback_to: 1 = the newest checkpoint from before the spike began, 2 = the one before, ...
        max_rollbacks: the run stops instead of making more.
        skip_steps: ``[[first, last], ...]``: steps whose data is passed over; the schedule and the data order go on.
    """

    def __init__(
        self,
        action: SpikeAction = "warn",
        non_finite: NonFiniteAction = "stop",
        window: int = 128,
        min_history: int = 32,
        loss_threshold: float = 13.0,
        grad_threshold: float = 16.0,
        patience: int = 5,
        rollback_to: int = 1,
        max_rollbacks: int = 3,
        skip_steps: list[list[int]] | None = None,
    ) -> None:
        self.action = action
        self.non_finite = non_finite
        self.window = window
        self.patience = patience
        self.rollback_to = rollback_to
        self.max_rollbacks = max_rollbacks
        self.detector = SpikeDetector(window, min_history, loss_threshold, grad_threshold)
        self.skipped = SkippedSteps(skip_steps or [])
        # Set by whoever launches the run: how to go back, and what the checkpoint it begins with knows.
        self.roll_back: Callable[[L.Trainer, Any, Incident], Restored | None] | None = None
        self.resume_from: dict[str, Any] | None = None
        self._bad: list[int] = []  # steps in a row, the present one last
        self._honoured: list[tuple[int, int]] = []
        self._validation_batches: int | float | None = None
        self._trainer: Any = None
        self._module: Any = None

    # ---- the run

    def on_fit_start(self, trainer: L.Trainer, pl_module: Any) -> None:
        self._trainer, self._module = trainer, pl_module
        pl_module.guard = self
        self.skipped.rollbacks = read_rollbacks(self._folder / "skipped.json")
        if self.resume_from is not None:
            self._know(self.resume_from)

    def on_train_start(self, trainer: L.Trainer, pl_module: Any) -> None:
        done = trainer.global_step
        for first, last in self.skipped.too_late(done, self._honoured):
            rest = f"steps {done + 1} to {last} will be passed over" if last > done else "no effect"
            log.warning(f"stability.skip_steps [{first}, {last}]: {done} steps were trained without it: {rest}")
        self._honoured += [pair for pair in self.skipped.manual if pair[0] > done and pair not in self._honoured]

    def on_train_batch_start(self, trainer: L.Trainer, pl_module: Any, batch: Any, batch_idx: int) -> None:
        self._validate_again(trainer)

    def on_train_batch_end(self, trainer: L.Trainer, pl_module: Any, outputs: Any, batch: Any, batch_idx: int) -> None:
        interval = trainer.val_check_batch
        if isinstance(interval, int) and interval and trainer.global_step % interval == 0:
            pl_module.settle()
        if pl_module.passed_over and self._validation_batches is None:
            # Nothing moved since the last validation; a run that is resumed behind these steps would not repeat it.
            self._validation_batches, trainer.limit_val_batches = trainer.limit_val_batches, 0

    def on_train_end(self, trainer: L.Trainer, pl_module: Any) -> None:
        self._validate_again(trainer)

    def _validate_again(self, trainer: L.Trainer) -> None:
        if self._validation_batches is not None:
            trainer.limit_val_batches, self._validation_batches = self._validation_batches, None

    # ---- what the module asks

    def skip_reason(self, step: int) -> str | None:
        """Why the data of step ``step`` (from 1) is passed over, or None."""
        reason = self.skipped.reason(step)
        if reason is not None and any(step == first for first, _ in self.skipped.manual):
            self._event(step, "passed over", reason)
        return reason

    def refuses(self, step: int, loss: Tensor, grad_norm: Tensor) -> Tensor:
        """Whether the update of ``step`` is to be left out: a boolean scalar on the device, equal on all ranks."""
        if self.action != "skip_step":
            return torch.zeros((), dtype=torch.bool, device=loss.device)
        largest_loss, largest_norm = self.detector.limits()
        return (loss.double() > largest_loss) | (grad_norm.double() > largest_norm)

    def after_step(self, step: int, loss: float, grad_norm: float, refused: bool) -> None:
        """Act on a finished step, before anything of it is saved. All ranks call it with the same figures.

        Raises:
            TrainingStopped: nothing is left to try.
        """
        spike = self.detector.is_spike(loss, grad_norm)
        broken = not (math.isfinite(loss) and math.isfinite(grad_norm)) or (refused and not spike)
        if not spike and not broken:
            self.detector.add(loss, grad_norm)
            self._recovered(step)
            return
        self._bad.append(step)
        figures = self.detector.figures(loss, grad_norm)
        reason = describe(figures, broken)
        action = self.non_finite if broken else self.action
        self._event(step, "not finite" if broken else "spike", reason, in_a_row=len(self._bad), **figures)
        if action == "stop":
            raise self._module.non_finite(step, loss, grad_norm)
        if action == "rollback" and (broken or len(self._bad) >= self.patience):
            self._go_back(step, reason, figures)
        elif refused:
            self._left_out(step, reason)
        else:
            self._warned(step, reason)

    # ---- what follows

    def _recovered(self, step: int) -> None:
        if self._bad:
            steps = "1 bad step" if len(self._bad) == 1 else f"{len(self._bad)} bad steps"
            log.info(f"step {step}: healthy again after {steps} from {self._bad[0]} on")
            self._bad = []

    def _warned(self, step: int, reason: str) -> None:
        count = len(self._bad)
        waiting = f"; rollback after {self.patience} in a row" if self.action == "rollback" else ""
        if count <= self.patience:
            log.warning(f"step {step}: {reason} ({count} in a row{waiting})")
        if count == self.window:
            log.warning(f"step {step}: {count} bad steps in a row: taken as the new level")
            self._event(step, "new level", f"{count} bad steps in a row")
            self.detector.remember([])
            self._bad = []

    def _left_out(self, step: int, reason: str) -> None:
        self._module.mark_refused(step)
        log.warning(f"step {step}: {reason}; its update is left out ({len(self._bad)} in a row)")
        if len(self._bad) >= self.patience:
            what = f"{len(self._bad)} updates in a row were left out (stability.patience)"
            raise self._give_up(step, f"{reason}; {what}: the state is bad, not the data")

    def _go_back(self, step: int, reason: str, figures: dict[str, float]) -> None:
        assert self.roll_back is not None, "set by whoever launches the run"
        if len(self.skipped.rollbacks) >= self.max_rollbacks:
            what = f"rolled back {len(self.skipped.rollbacks)} times already (stability.max_rollbacks)"
            raise self._give_up(step, f"{reason}; {what}")
        rollbacks = tuple(self.skipped.rollbacks)
        incident = Incident(step, self._bad[0], self.rollback_to, reason, figures, rollbacks)
        restored = self.roll_back(self._trainer, self._module, incident)
        if restored is None:
            self._nowhere_to_go(step, reason, figures)
            return
        self.skipped.rollbacks.append(restored.rollback)
        honoured = self._honoured  # ranges that were known all along, whatever the checkpoint says
        self._know(restored.knowledge)
        self._honoured = honoured
        self._module.take_back(f"rollback {len(self.skipped.rollbacks)}")

    def _nowhere_to_go(self, step: int, reason: str, figures: dict[str, float]) -> None:
        """Early spikes often pass by themselves; figures that are not finite do not."""
        what = f"{reason}; no whole checkpoint from before step {self._bad[0]} to go back to"
        if not all(math.isfinite(value) for value in figures.values()):
            raise self._give_up(step, what)
        self._warned(step, what)

    def _give_up(self, step: int, reason: str) -> Exception:
        self._event(step, "give up", reason)
        return self._module.stopped(f"step {step}: {reason}.", self._bad[0])

    # ---- what it knows

    def as_json(self) -> dict[str, Any]:
        """What a checkpoint has to hold so that a resumed run judges as this one."""
        return {
            "history": [list(pair) for pair in self.detector.history],
            "bad": list(self._bad),
            "rollbacks": len(self.skipped.rollbacks),
            "honoured": [list(pair) for pair in self._honoured],
        }

    def _know(self, knowledge: dict[str, Any]) -> None:
        self.detector.remember((loss, norm) for loss, norm in knowledge["history"])
        self._bad = list(knowledge["bad"])
        self._honoured = [(first, last) for first, last in knowledge["honoured"]]

    @property
    def _folder(self) -> Path:
        return Path(self._trainer.default_root_dir)

    def _event(self, step: int, kind: str, reason: str, **figures: float) -> None:
        if self._trainer.is_global_zero:
            append_event(self._folder / "events.jsonl", {"step": step, "event": kind, "reason": reason, **figures})


def describe(figures: dict[str, float], broken: bool) -> str:
    """What is wrong with a step, in words."""
    loss, norm = figures["loss"], figures["grad_norm"]
    if broken:
        bad = [f"{n} is {v}" for n, v in (("loss", loss), ("gradient norm", norm)) if not math.isfinite(v)]
        return " and ".join(bad) or "a loss term is not finite"
    return (
        f"loss {loss:.4f} is {figures['loss_deviations']:+.1f} deviations from {figures['usual_loss']:.4f}, "
        f"gradient norm {norm:.3f} {figures['grad_norm_deviations']:+.1f} from {figures['usual_grad_norm']:.3f}"
    )

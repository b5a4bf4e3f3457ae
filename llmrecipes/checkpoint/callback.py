"""Saving during training and going on from what was saved."""

from __future__ import annotations

import json
import math
import time
from dataclasses import asdict, dataclass, replace
from pathlib import Path
from typing import Any

import lightning.pytorch as L

from llmrecipes.checkpoint.files import checkpoint_name, read_checkpoint, write_checkpoint
from llmrecipes.checkpoint.retention import point_latest, purge, remove_leftovers, set_aside_after
from llmrecipes.checkpoint.state import TrainingState, load_optimizer_state, optimizer_state, rng_state, set_rng_state
from llmrecipes.recipe import Duration


class Checkpoints(L.Callback):
    """Writes a checkpoint every so often and at the end, keeps the ones worth keeping, restores one at the start.

    At a boundary the checkpoint comes first, evaluation and samples after it: neither can lose what was learned.

    Args:
        every: distance of checkpoints, in optimizer steps or tokens.
        keep_last: how many of the newest are kept.
        keep_every: checkpoints at multiples of this are kept for good; ``null`` = none.
        keep_best: keep the one with the lowest validation loss; saved after the validation when it is not yet there.
    """

    def __init__(
        self,
        every: Duration = Duration(500, "steps"),  # noqa: B008 - frozen
        keep_last: int = 2,
        keep_every: Duration | None = None,
        keep_best: bool = True,
    ) -> None:
        self.every = Duration.parse(every)
        self.keep_last = max(1, keep_last)
        self.keep_every = None if keep_every is None else Duration.parse(keep_every)
        self.keep_best = keep_best
        self.resume_from: Path | None = None
        self.save_seconds = 0.0
        self.validated = Validated()
        self._last_saved = -1
        self._rng: dict[str, Any] | None = None

    def root(self, trainer: L.Trainer) -> Path:
        return Path(trainer.default_root_dir) / "checkpoints"

    def on_fit_start(self, trainer: L.Trainer, pl_module: L.LightningModule) -> None:
        remove_leftovers(self.root(trainer))
        if self.resume_from is not None:
            self._restore(trainer, pl_module, read_checkpoint(self.resume_from))

    def _restore(self, trainer: L.Trainer, pl_module: Any, state: TrainingState) -> None:
        pl_module.model.load_state_dict(state.model, strict=True)
        load_optimizer_state(pl_module.model, trainer.optimizers[0], state.optimizer)
        set_aside_after(self.root(trainer), state.step)
        self.validated = Validated.read(self.root(trainer), up_to=state.step)
        self._rng, self._last_saved = state.rng, state.step
        set_loop_position(trainer, state.step)

    def on_train_start(self, trainer: L.Trainer, pl_module: L.LightningModule) -> None:
        # As late as possible: whatever set-up draws from the generators must not matter.
        if self._rng is not None:
            set_rng_state(self._rng)
            self._rng = None
            self._validate_if_missed(trainer)

    def _validate_if_missed(self, trainer: L.Trainer) -> None:
        """A run killed between a checkpoint and the validation due at the same step catches up on it."""
        interval, step = trainer.val_check_batch, trainer.global_step
        if isinstance(interval, int) and interval > 0 and step % interval == 0 and self.validated.step < step:
            self._validate(trainer)

    @staticmethod
    def _validate(trainer: L.Trainer) -> None:
        if trainer.enable_validation and isinstance(trainer.val_check_batch, int):
            trainer.validating = True
            trainer.fit_loop.epoch_loop.val_loop.run()
            trainer.training = True

    def on_train_end(self, trainer: L.Trainer, pl_module: Any) -> None:
        # Whatever the interval: the last parameters of a run are the ones that people quote.
        if trainer.global_step == trainer.max_steps and self.validated.step < trainer.global_step:
            self._validate(trainer)

    def on_train_batch_end(self, trainer: L.Trainer, pl_module: Any, outputs: Any, batch: Any, batch_idx: int) -> None:
        step = trainer.global_step
        if step % self.every.to_steps(pl_module.tokens_per_step) == 0 or step == trainer.max_steps:
            self.save(trainer, pl_module)

    def on_validation_end(self, trainer: L.Trainer, pl_module: Any) -> None:
        loss = pl_module.validation_loss
        if trainer.state.fn != "fit" or loss is None:
            return
        step, improved = trainer.global_step, loss < self.validated.best_loss
        if improved and self.keep_best:
            self.save(trainer, pl_module)
        self.validated = Validated(step, step, loss) if improved else replace(self.validated, step=step)
        self.validated.write(self.root(trainer))

    def save(self, trainer: L.Trainer, pl_module: Any) -> Path:
        """Write the present state, once per step; then purge what is no longer needed."""
        step, root = trainer.global_step, self.root(trainer)
        if step == self._last_saved:
            return root / checkpoint_name(step)
        started = time.perf_counter()
        state = TrainingState(
            step=step,
            model=dict(pl_module.model.state_dict()),
            optimizer=optimizer_state(pl_module.model, trainer.optimizers[0]),
            rng=rng_state(),
            info={"progress": pl_module.progress()},
        )
        path = write_checkpoint(root, state, attachments=[Path(trainer.default_root_dir) / "metrics.jsonl"])
        point_latest(root, path)
        keep_every = self.keep_every.to_steps(pl_module.tokens_per_step) if self.keep_every else None
        purge(root, self.keep_last, keep_every, protected=[self.validated.best_step] if self.keep_best else [])
        self._last_saved = step
        self.save_seconds += time.perf_counter() - started
        return path


@dataclass(frozen=True)
class Validated:
    """The newest validated step and the best one, beside the checkpoints in ``validated.json``."""

    step: int = -1
    best_step: int = -1
    best_loss: float = math.inf

    @classmethod
    def read(cls, root: Path, up_to: int) -> Validated:
        """What is on disk, without what belongs to steps after ``up_to`` that are about to be done again."""
        try:
            found = cls(**json.loads((root / "validated.json").read_text(encoding="utf-8")))
        except (FileNotFoundError, ValueError, TypeError):  # none yet, or cut short by a power failure
            return cls()
        if found.step <= up_to:
            return found
        return replace(found, step=-1) if found.best_step <= up_to else cls()

    def write(self, root: Path) -> None:
        root.mkdir(parents=True, exist_ok=True)
        temporary = root / ".validated.json"
        temporary.write_text(json.dumps(asdict(self)), encoding="utf-8")
        temporary.replace(root / "validated.json")


def set_loop_position(trainer: L.Trainer, step: int) -> None:
    """Tell Lightning's loops that ``step`` batches, each one optimizer step, are done."""
    state = trainer.fit_loop.state_dict()
    done = {"ready": step, "completed": step}
    state["epoch_loop.state_dict"]["_batches_that_stepped"] = step
    for part in ("total", "current"):
        state["epoch_loop.batch_progress"][part].update({**done, "started": step, "processed": step})
        state["epoch_loop.manual_optimization.optim_step_progress"][part].update(done)
        state["epoch_progress"][part].update({"ready": 1, "started": 1, "processed": 0, "completed": 0})
    trainer.fit_loop.load_state_dict(state)

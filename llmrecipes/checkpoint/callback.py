"""Saving during training and going on from what was saved."""

from __future__ import annotations

import copy
import json
import math
import time
from dataclasses import asdict, dataclass, replace
from functools import partial
from pathlib import Path
from typing import Any

import lightning.pytorch as L
import torch.distributed as dist

from llmrecipes.checkpoint.background import BackgroundSave
from llmrecipes.checkpoint.files import checkpoint_name, read_info, read_rng, write_checkpoint
from llmrecipes.checkpoint.load import load_optimizer, load_tensors
from llmrecipes.checkpoint.ranks import on_first_rank, rank, together
from llmrecipes.checkpoint.retention import point_latest, purge, remove_leftovers, set_aside_after
from llmrecipes.checkpoint.state import TrainingState, optimizer_state, rng_state, set_rng_state
from llmrecipes.recipe import Duration


class Checkpoints(L.Callback):
    """Writes a checkpoint every so often and at the end, keeps the ones worth keeping, restores one at the start.

    At a boundary the checkpoint comes first, evaluation and samples after it: neither can lose what was learned.

    Args:
        every: distance of checkpoints, in optimizer steps or tokens.
        keep_last: how many of the newest are kept.
        keep_every: checkpoints at multiples of this are kept for good; ``null`` = none.
        keep_best: keep the one with the lowest validation loss; saved after the validation when it is not yet there.
        async_save: copy the state to the host's memory and go on training while it is written; needs that memory.
        validate_first: validate before the first step too, as step 0: what a run begins with, on the same data as what
            it ends with. Nothing is saved then, and it is not the best.

    Attributes:
        resume_from: a verified checkpoint to begin with, or None.
        save_seconds: time from the beginning of saves to their end, so far.
        stall_seconds: time that training waited for saves, so far.
    """

    def __init__(
        self,
        every: Duration = Duration(500, "steps"),  # noqa: B008 - frozen
        keep_last: int = 2,
        keep_every: Duration | None = None,
        keep_best: bool = True,
        async_save: bool = False,
        validate_first: bool = False,
    ) -> None:
        self.every = Duration.parse(every)
        self.keep_last = max(1, keep_last)
        self.keep_every = None if keep_every is None else Duration.parse(keep_every)
        self.keep_best = keep_best
        self.resume_from: Path | None = None
        self.async_save = async_save
        self.validate_first = validate_first
        self.save_seconds = 0.0
        self.stall_seconds = 0.0
        self.validated = Validated()
        self._last_saved = -1
        self._rng: dict[str, Any] | None = None
        self._background = BackgroundSave()

    def root(self, trainer: L.Trainer) -> Path:
        return Path(trainer.default_root_dir) / "checkpoints"

    def on_fit_start(self, trainer: L.Trainer, pl_module: L.LightningModule) -> None:
        on_first_rank(lambda: remove_leftovers(self.root(trainer)), "removing what killed saves left failed")
        if self.resume_from is not None:
            self._restore(trainer, pl_module, self.resume_from)

    def on_validation_start(self, trainer: L.Trainer, pl_module: Any) -> None:
        if trainer.state.fn == "validate" and self.resume_from is not None:
            folder = self.resume_from
            together(lambda: load_tensors(folder, pl_module.saved_tensors()), f"reading {folder} failed")

    def _restore(self, trainer: L.Trainer, pl_module: Any, folder: Path) -> None:
        """Put the state of a verified checkpoint back, on any number of ranks. Collective."""
        root = self.root(trainer)
        self._load(trainer, pl_module, folder)
        step = read_info(folder)["step"]
        on_first_rank(lambda: set_aside_after(root, step), f"setting aside what comes after {folder} failed")
        self.validated = on_first_rank(lambda: Validated.read(root, up_to=step), "reading validated.json failed")
        self._rng, self._last_saved = read_rng(folder, rank()), step
        set_loop_position(trainer, step)

    def _load(self, trainer: L.Trainer, pl_module: Any, folder: Path) -> None:
        model, optimizer = pl_module.model, trainer.optimizers[0]

        def load() -> None:
            load_tensors(folder, pl_module.saved_tensors())
            load_optimizer(folder, model, optimizer)

        together(load, f"reading {folder} failed")

    def go_back(self, trainer: L.Trainer, pl_module: Any, folder: Path, validated: Validated) -> None:
        """Put an earlier state into a running training, whose position stays where it is. Collective.

        Args:
            folder: a verified checkpoint. validated: what was known of validations then.
        """
        self._load(trainer, pl_module, folder)
        self._last_saved, self.validated = -1, validated

    def on_train_start(self, trainer: L.Trainer, pl_module: L.LightningModule) -> None:
        # As late as possible: whatever set-up draws from the generators must not matter.
        if self._rng is not None:
            set_rng_state(self._rng)
            self._rng = None
        if self.resume_from is not None:
            self._validate_if_missed(trainer)
        elif self.validate_first:
            self._validate(trainer)

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
        self.finish()
        # Whatever the interval: the last parameters of a run are the ones that people quote.
        if trainer.global_step == trainer.max_steps and self.validated.step < trainer.global_step:
            self._validate(trainer)

    def on_train_batch_end(self, trainer: L.Trainer, pl_module: Any, outputs: Any, batch: Any, batch_idx: int) -> None:
        self._background.poll()
        step = trainer.global_step
        last = step == trainer.max_steps
        if step % self.every.to_steps(pl_module.tokens_per_step) == 0 or last:
            pl_module.settle()
            # Where nothing moved there is nothing new to keep: it would only push older states out.
            if last or not pl_module.passed_over:
                self.save(trainer, pl_module)

    def on_exception(self, trainer: L.Trainer, pl_module: Any, exception: BaseException) -> None:
        # What ended the training is another story; other ranks' threads go on with the save as well.
        self._background.abandon(seconds=60)

    def on_validation_end(self, trainer: L.Trainer, pl_module: Any) -> None:
        loss = pl_module.validation_loss
        if trainer.state.fn != "fit" or loss is None or trainer.global_step == 0:
            return
        # One rank decides, as a decision to save is one to wait for the others.
        improved = on_first_rank(lambda: loss < self.validated.best_loss, "comparing validation losses failed")
        step, root = trainer.global_step, self.root(trainer)
        if improved and self.keep_best:
            self.save(trainer, pl_module)
            self.finish()  # the note that it is the best must not be there before it is
        self.validated = Validated(step, step, loss) if improved else replace(self.validated, step=step)
        on_first_rank(lambda: self.validated.write(root), "writing validated.json failed")

    def save(self, trainer: L.Trainer, pl_module: Any) -> Path:
        """Write the present state, once per step; then purge what is no longer needed. Collective.

        With ``async_save`` it returns when the state is copied; see :meth:`finish`.
        """
        step, root = trainer.global_step, self.root(trainer)
        if step == self._last_saved:
            return root / checkpoint_name(step)
        started = time.perf_counter()
        pl_module.settle()
        self._background.finish()
        state = TrainingState(
            step=step,
            model=pl_module.saved_tensors(),
            optimizer=optimizer_state(pl_module.model, trainer.optimizers[0]),
            rng=rng_state(),
            info={"progress": copy.deepcopy(pl_module.progress())},
        )
        write = partial(
            self._write,
            root=root,
            attachments=read_attachments([Path(trainer.default_root_dir) / "metrics.jsonl"]),
            keep_every=self.keep_every.to_steps(pl_module.tokens_per_step) if self.keep_every else None,
            protected=[self.validated.best_step] if self.keep_best else [],
            started=started,
        )
        if self.async_save:
            self._background.start(state, write)
        else:
            write(state, None)
        self._last_saved = step
        self.stall_seconds += time.perf_counter() - started
        return root / checkpoint_name(step)

    def save_now(self, trainer: L.Trainer, pl_module: Any) -> Path:
        """:meth:`save` and :meth:`finish`: for whoever ends the process next. Collective."""
        path = self.save(trainer, pl_module)
        self.finish()
        return path

    def finish(self) -> None:
        """Wait for a save in flight; whoever needs its file calls this first. Collective.

        Raises:
            CheckpointError: it failed, on all ranks.
        """
        started = time.perf_counter()
        self._background.finish()
        self.stall_seconds += time.perf_counter() - started

    def _write(
        self,
        state: TrainingState,
        group: dist.ProcessGroup | None,
        root: Path,
        attachments: dict[str, bytes],
        keep_every: int | None,
        protected: list[int],
        started: float,
    ) -> None:
        path = write_checkpoint(root, state, attachments, group)

        def tidy() -> None:
            point_latest(root, path)
            purge(root, self.keep_last, keep_every, protected)

        on_first_rank(tidy, f"removing older checkpoints than {path} failed", group)
        self.save_seconds += time.perf_counter() - started


def read_attachments(paths: list[Path]) -> dict[str, bytes]:
    """What small files hold now, by name; on rank 0, which writes them. Missing ones are passed over."""
    return {path.name: path.read_bytes() for path in paths if path.exists()} if rank() == 0 else {}


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

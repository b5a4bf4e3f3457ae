"""The one optimizer step that every stage shares, and the only division of a loss.

One batch of the Trainer is one optimizer step: this rank's whole share of the global batch. It is split into
micro-batches here; every loss is a sum, divided by the count of the whole step over all micro-batches and data ranks.
Gradients are therefore the same for every split (Lightning's ``accumulate_grad_batches`` averages means instead).
"""

from __future__ import annotations

import logging
import math
from pathlib import Path
from typing import Any, Protocol

import lightning.pytorch as L
import torch
from torch import Tensor, nn

from llmrecipes.checkpoint import checkpoints
from llmrecipes.data.batch import Batch
from llmrecipes.data.order import derive_key
from llmrecipes.distributed import ShardedStrategy, clip_grad_norm, compile_blocks, packed_sum
from llmrecipes.modules.host_copy import HostCopy
from llmrecipes.modules.loss_terms import LossTerm
from llmrecipes.modules.step_record import SkippedStep, StepRecord
from llmrecipes.optim import AdamW, CoolDown, RunLength, Schedule
from llmrecipes.recipe import Duration

log = logging.getLogger("llmrecipes")


class TrainingStopped(Exception):
    """Training cannot go on; the state on disk is safe. Says what happened and where to go on from."""


class Guard(Protocol):
    """Watches losses and gradient norms; see `llmrecipes.callbacks.StabilityGuard`."""

    def skip_reason(self, step: int) -> str | None:
        """Why the data of step ``step`` (from 1) is passed over, or None."""

    def refuses(self, step: int, loss: Tensor, grad_norm: Tensor) -> Tensor:
        """Whether the update of ``step`` is to be left out: a boolean scalar on the device, equal on all ranks."""

    def after_step(self, step: int, loss: float, grad_norm: float, refused: bool) -> None:
        """Act on a finished step, before anything of it is saved; may put an earlier state back."""

    def as_json(self) -> dict[str, Any]:
        """What a checkpoint has to hold of it."""


class StepModule(L.LightningModule):
    """Base of all stages: subclasses give :meth:`build_model` and :meth:`loss_terms`.

    Args:
        optimizer: how parameters are updated.
        schedule: the learning rate over the run.
        clip_norm: largest global gradient norm; ``null`` measures without clipping.
        seed: of the initial weights and of dropout.
        compile: fuse each block by torch.compile.
    """

    model: Any
    # Terms beside ``loss`` that validation reports too.
    measured: tuple[str, ...] = ()

    def __init__(
        self, optimizer: AdamW, schedule: Schedule, clip_norm: float | None, seed: int = 0, compile: bool = False
    ) -> None:
        super().__init__()
        self.automatic_optimization = False
        self.optimizer_recipe = optimizer
        self.schedule = schedule
        self.clip_norm = clip_norm
        self.seed = seed
        self.compiled = compile
        self.guard: Guard | None = None
        self.last_step: StepRecord | SkippedStep | None = None
        self.validation_loss: float | None = None
        self.validation_metrics: dict[str, float] = {}
        # Per validation set and loss term: the sum, and the count that divides it.
        self._validation: dict[tuple[int, str], tuple[float, int]] = {}
        self._unsettled: tuple[int, HostCopy] | None = None
        self._taken_back = False
        # Set by whoever launches the run: what decides its trajectory, and a fall of the rate to its end.
        self.trajectory: dict[str, Any] | None = None
        self.start_cool_down: tuple[int, Duration] | None = None
        self.lr_changes: list[dict[str, Any]] = []
        self._run_length: RunLength | None = None

    # ---- what a stage defines

    def build_model(self) -> nn.Module:
        """The model, with any values; may be called under the meta device."""
        raise NotImplementedError  # pragma: no cover - abstract

    def init_model(self) -> None:
        """Fill the parameters of ``self.model``, whole or sharded, in place."""
        raise NotImplementedError  # pragma: no cover - abstract

    def loss_terms(self, batch: Batch) -> dict[str, LossTerm]:
        """The parts of one micro-batch's loss, as sums with gradients; ``loss`` is the one to report and validate."""
        raise NotImplementedError  # pragma: no cover - abstract

    def before_micro_batches(self, micro_batches: list[Batch], counts: dict[str, Tensor]) -> None:
        """Called once per step before the first forward."""

    def step_sums(self) -> dict[str, Tensor]:
        """This rank's share of the stage's own figures of the step: summed over ranks along with the losses."""
        return {}

    def after_step(self, record: StepRecord, sums: dict[str, Tensor], applied: Tensor) -> None:
        """Called once per step after the parameters moved; adds the stage's own figures to the record.

        Args:
            record: of the step. sums: `step_sums` over all ranks. applied: whether the update was made, on the device.
        """

    # ---- the model

    @property
    def initial_folder(self) -> Path | None:
        """The weights that parameters begin with and that frozen ones keep; None = they are drawn."""
        return None

    def saved_tensors(self) -> dict[str, Tensor]:
        """What of the model a checkpoint holds: all, or what is trained where the rest lies in another folder."""
        state = dict(self.model.state_dict())
        if not (self.trajectory or {}).get("base"):
            return state
        frozen = {name for name, parameter in self.model.named_parameters() if not parameter.requires_grad}
        return {name: tensor for name, tensor in state.items() if name not in frozen}

    @property
    def keeps_base(self) -> bool:
        """Whether parameters are frozen that a folder holds: checkpoints then say which, and do without them."""
        return False

    def configure_model(self) -> None:
        if hasattr(self, "model"):
            return
        self.model = self.make_model(self.compiled)
        self.init_model()

    def make_model(self, compiled: bool) -> Any:
        """A model as the strategy wants it, its parameters not filled yet."""
        strategy = self.trainer.strategy if self._trainer is not None else None
        if not isinstance(strategy, ShardedStrategy):
            model = self.build_model()
            if compiled:
                compile_blocks(model)
            return model
        # Never whole on any process: built without storage, divided, then filled.
        with torch.device("meta"):
            model = self.build_model()
        strategy.parallelize(model, compiled)
        return model.to_empty(device=strategy.parameter_device)

    def configure_optimizers(self) -> torch.optim.Optimizer:
        return self.optimizer_recipe.build(self.model.named_parameters())

    # ---- the step

    def training_step(self, batch: Batch, batch_idx: int) -> None:
        step = self.trainer.global_step
        reason = self.guard.skip_reason(step + 1) if self.guard else None
        if reason is not None:
            self.settle()
            self._pass_over(step, reason)
            return
        optimizer: Any = self.optimizers()
        sums, norm = self._gradients(step, batch)
        if self.settle():  # only now: the last step's figures arrived while the device works on this one
            optimizer.zero_grad(set_to_none=True)
            sums, norm = self._gradients(step, batch)
        refused = self._refused(step, sums, norm)
        learning_rate = self.set_learning_rate(optimizer.optimizer, step)
        self._update(optimizer, refused)
        losses = {name: sums.pop(name) for name in self._loss_names}
        self.last_step = StepRecord(step + 1, self.tokens_at(step + 1), losses, norm, learning_rate, batch)
        self.after_step(self.last_step, sums, ~refused)
        self._unsettled = step + 1, HostCopy(torch.stack([losses["loss"].double(), norm.double(), refused.double()]))
        if self.settles_at_once:
            self.settle()

    def _gradients(self, step: int, batch: Batch) -> tuple[dict[str, Tensor], Tensor]:
        """Gradients of the whole step, clipped; returns losses and the stage's figures over all ranks, and the norm."""
        counts = packed_sum(batch.counts(), self.device)
        micro_batches = batch.split(self.micro_batch)
        first = batch.first_row // self.micro_batch
        self.before_micro_batches(micro_batches, counts)
        sums: dict[str, Tensor] = {}
        for i, micro_batch in enumerate(micro_batches):
            self.seed_micro_batch(step, first + i)
            self._prepare_micro_batch(is_last=i == len(micro_batches) - 1)
            terms = self.loss_terms(micro_batch)
            self._backward(terms, counts)
            for name, term in terms.items():
                sums[name] = sums.get(name, 0.0) + term.sum.detach() / counts[term.per].clamp_min(1)
        self._loss_names = list(sums)
        sums = packed_sum(sums | self.step_sums(), self.device)
        return sums, clip_grad_norm(self.model.parameters(), self.clip_norm, self.device)

    def seed_micro_batch(self, step: int, index: int) -> None:
        """Dropout is a function of (seed, step, micro-batch): the same on any number of ranks, and after a resume."""
        torch.manual_seed(derive_key(self.seed, step, index) >> 1)

    def _prepare_micro_batch(self, is_last: bool) -> None:
        if isinstance(self.trainer.strategy, ShardedStrategy):
            self.trainer.strategy.prepare_micro_batch(self.model, is_last)

    def _backward(self, terms: dict[str, LossTerm], counts: dict[str, Tensor]) -> None:
        parts = [term.sum * (term.weight / counts[term.per].clamp_min(1)) for term in terms.values() if term.weight]
        # The forward runs under autocast; its backward repeats the forward's types and must not be cast again.
        with torch.autocast(self.device.type, enabled=False):
            self.manual_backward(torch.stack([part.to(parts[0].dtype) for part in parts]).sum())

    def _refused(self, step: int, losses: dict[str, Tensor], norm: Tensor) -> Tensor:
        """Whether the update is left out, decided on the device from figures that all ranks share."""
        figures = torch.stack([norm.float(), *(losses[name].float() for name in self._loss_names)])
        refused = ~torch.isfinite(figures).all()
        if self.guard is not None:
            refused = refused | self.guard.refuses(step + 1, losses["loss"], norm)
        return refused

    def _update(self, optimizer: Any, refused: Tensor) -> None:
        """One optimizer step, which a refused gradient leaves without effect: no wait for the device to know."""
        if getattr(optimizer.optimizer, "_step_supports_amp_scaling", False):
            optimizer.optimizer.found_inf = refused.float().to(_state_device(optimizer.optimizer))
            optimizer.optimizer.grad_scale = None
        elif bool(refused):
            for parameter in self.model.parameters():
                parameter.grad = None
        optimizer.step()
        optimizer.zero_grad(set_to_none=True)

    def _pass_over(self, step: int, reason: str) -> None:
        """Count a step without making it: its data is consumed, nothing moves."""
        progress = self.trainer.fit_loop.epoch_loop.manual_optimization.optim_step_progress
        progress.increment_ready()
        progress.increment_completed()
        self.last_step = SkippedStep(step + 1, self.tokens_at(step + 1), reason)

    def reshard(self) -> None:
        """After forward passes without a backward pass: every process keeps its share of the parameters only."""
        self.forget_gathered(self.model)

    def forget_gathered(self, model: nn.Module) -> None:
        """The same for any model that :meth:`make_model` made."""
        if isinstance(self.trainer.strategy, ShardedStrategy):
            self.trainer.strategy.reshard(model)

    @property
    def passed_over(self) -> bool:
        """Whether the last step moved nothing: its data was passed over, or an earlier state was put back after it."""
        return isinstance(self.last_step, SkippedStep)

    @property
    def settles_at_once(self) -> bool:
        """Whether figures are on the host as soon as they are computed."""
        return self.device.type == "cpu"

    def take_back(self, reason: str) -> None:
        """The guard put an earlier state back: the last step counts as passed over."""
        step = self.trainer.global_step
        self.last_step = SkippedStep(step, self.tokens_at(step), reason)
        self._taken_back = True

    def mark_refused(self, step: int) -> None:
        """Write in the record of ``step`` that its update was left out."""
        if isinstance(self.last_step, StepRecord) and self.last_step.step == step:
            self.last_step.extra["refused"] = True

    def settle(self) -> bool:
        """Look at the last step's figures, and act on them, before anything builds on it.

        On a GPU that is when the next step's gradients are under way, or when something is saved or logged: no step
        waits for its own figures.

        Returns:
            Whether an earlier state was put back: what was computed since is void.

        Raises:
            TrainingStopped: nothing is left to try.
        """
        self._taken_back = False
        if self._unsettled is None:
            return False
        (step, figures), self._unsettled = self._unsettled, None
        loss, norm, refused = figures.tolist()
        if self.guard is not None:
            self.guard.after_step(step, loss, norm, bool(refused))
        elif refused:
            raise self.non_finite(step, loss, norm)
        return self._taken_back

    def non_finite(self, step: int, loss: float, grad_norm: float) -> TrainingStopped:
        """What to raise after a step with figures that are not finite."""
        named = {"gradient norm": grad_norm, "loss": loss}
        bad = [f"{name} is {value}" for name, value in named.items() if not math.isfinite(value)] or ["a loss term"]
        return self.stopped(f"step {step}: {', '.join(bad)}; the step was not applied.", step)

    def stopped(self, what: str, first_bad: int) -> TrainingStopped:
        """What to raise: ``what`` happened, and the newest checkpoint from before step ``first_bad``."""
        root = Path(self.trainer.default_root_dir) / "checkpoints"
        saved = [path for path in checkpoints(root) if int(path.name.partition("=")[2]) < first_bad]
        good = f"The last good checkpoint is {saved[-1]}." if saved else f"{root} holds no checkpoint from before it."
        return TrainingStopped(f"{what} {good}")

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

    def tokens_at(self, step: int) -> int:
        """Token slots consumed after ``step`` steps."""
        return step * self.tokens_per_step

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
            "stability": self.guard.as_json() if self.guard is not None else None,
            "lr_changes": self.lr_changes,
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
        self._validation_error: Exception | None = None

    def validation_step(self, batch: Batch, batch_idx: int, dataloader_idx: int = 0) -> None:
        """Add up one batch. What goes wrong here must not cost the run: all ranks leave the evaluation together."""
        failed = torch.tensor(float(self._validation_error is not None))
        if float(packed_sum({"failed": failed}, self.device)["failed"]):
            return
        try:
            terms = self.loss_terms(batch)
            found = {name: (float(term.sum), int(batch.counts()[term.per])) for name, term in terms.items()}
        except Exception as error:
            if self.trainer.state.fn != "fit":
                raise
            self._validation_error = error
            return
        for name, (total, count) in found.items():
            before = self._validation.get((dataloader_idx, name), (0.0, 0))
            self._validation[dataloader_idx, name] = (before[0] + total, before[1] + count)

    def on_validation_epoch_end(self) -> None:
        """Every term per validation set, and over all of them, over all ranks."""
        self.reshard()
        failed = torch.tensor(float(self._validation_error is not None))
        over_ranks = packed_sum({"failed": failed} | self._validation_sums(), self.device)
        self.validation_metrics, self.validation_loss = {}, None
        if float(over_ranks.pop("failed")):
            if self._validation_error is not None:
                what = f"{type(self._validation_error).__name__}: {self._validation_error}"
                log.warning(f"step {self.trainer.global_step}: the evaluation failed and is left out ({what})")
            return
        for name, sums in over_ranks.items():
            self._add_validation(f"val_{name}", sums.tolist())
        self.validation_loss = self.validation_metrics.get("val_loss")

    def _validation_sums(self) -> dict[str, Tensor]:
        """This rank's sums and counts of each term, [validation sets, 2]; equally many on every rank."""
        sets = range(len(self.trainer.datamodule.valid_names))  # type: ignore[attr-defined]
        names = ("loss", *self.measured)
        pairs = {name: [self._validation.get((i, name), (0.0, 0)) for i in sets] for name in names}
        return {name: torch.tensor(values, dtype=torch.float64).view(-1, 2) for name, values in pairs.items()}

    def _add_validation(self, name: str, sums: list[list[float]]) -> None:
        """``name/<set>`` for every set that has something in it, and ``name`` over all."""
        names = self.trainer.datamodule.valid_names  # type: ignore[attr-defined]
        for place, (total, count) in zip(names, sums, strict=True):
            if count:
                self.validation_metrics[f"{name}/{place}"] = total / count
        total, count = (sum(column) for column in zip(*sums, strict=True)) if sums else (0.0, 0)
        if count:
            self.validation_metrics[name] = total / count


def _state_device(optimizer: torch.optim.Optimizer) -> torch.device:
    return optimizer.param_groups[0]["params"][0].device

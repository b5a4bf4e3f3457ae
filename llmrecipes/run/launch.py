"""One process decides how a run goes on; all of them do it."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import lightning.pytorch as L

from llmrecipes.callbacks.stability_guard import StabilityGuard
from llmrecipes.checkpoint.callback import Checkpoints
from llmrecipes.errors import UserError
from llmrecipes.optim import Restart
from llmrecipes.recipe import Duration
from llmrecipes.run.lr_changes import RatePlan


class NothingToDo(Exception):
    """The run is finished already: raised on all processes once they have met."""


@dataclass
class Decision:
    """What rank 0 found in the run folder; travels to the other ranks.

    Attributes:
        problems: mistakes that only rank 0 could see; all ranks end with them.
        trajectory: what decides the run's course.
        checkpoint: where to go on from, or what to validate.
        start_step: optimizer steps done. end: the run's last step.
        rate: what becomes of the learning rate.
        stability: what the stability guard knew at the checkpoint.
        nothing_to_do: all steps are done; ``validate``: but their last validation is missing.
    """

    problems: tuple[str, ...] = ()
    trajectory: dict[str, Any] | None = None
    checkpoint: str | None = None
    start_step: int = 0
    end: int = 0
    rate: RatePlan = field(default_factory=RatePlan)
    stability: dict[str, Any] | None = None
    nothing_to_do: bool = False
    validate: bool = False


class Launch(L.Callback):
    """Brings rank 0's decision to all ranks as soon as they can talk, and applies it.

    Args:
        announce: says what is about to run, given the last step; called on rank 0.
    """

    def __init__(self, announce: Callable[[int], None]) -> None:
        self._announce = announce
        self.decision: Decision | None = None

    def decide(self, look: Callable[[], Decision], alone: bool) -> Decision:
        """Decide on rank 0.

        Args:
            look: looks at the run folder.
            alone: no other process was started yet: a mistake then needs no broadcast and is raised at once.
        """
        try:
            self.decision = look()
        except UserError as error:
            if alone:
                raise
            self.decision = Decision(problems=tuple(error.problems))
        return self.decision

    def setup(self, trainer: L.Trainer, pl_module: Any, stage: str) -> None:
        self.decision = decision = trainer.strategy.broadcast(self.decision)
        assert decision is not None
        if decision.problems:
            raise UserError(*decision.problems)
        saver = next(c for c in trainer.callbacks if isinstance(c, Checkpoints))  # type: ignore[attr-defined]
        saver.resume_from = None if decision.checkpoint is None else Path(decision.checkpoint)
        trainer.datamodule.start_step = decision.start_step  # type: ignore[attr-defined]
        pl_module.trajectory = decision.trajectory
        guard = next(c for c in trainer.callbacks if isinstance(c, StabilityGuard))  # type: ignore[attr-defined]
        guard.resume_from = decision.stability
        _set_rate(pl_module, decision.rate)
        if stage != "fit":
            return
        if decision.nothing_to_do:
            raise NothingToDo
        if trainer.is_global_zero:
            self._announce(decision.end)


def _set_rate(module: Any, rate: RatePlan) -> None:
    module.lr_changes = rate.changes
    if rate.restart is not None:
        module.schedule = Restart(module.schedule, rate.restart)
    if rate.cool_down is not None:
        start, duration = rate.cool_down
        module.start_cool_down = (start, Duration.parse(duration))

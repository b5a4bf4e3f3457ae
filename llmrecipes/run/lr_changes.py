"""What becomes of the learning rate when a run goes on: it changes only when asked, and every change is remembered."""

from __future__ import annotations

import copy
import logging
from dataclasses import dataclass, field
from typing import Any, Literal

from llmrecipes.errors import UserError
from llmrecipes.optim import RunLength
from llmrecipes.recipe import Duration, diff

log = logging.getLogger("llmrecipes")

ResumeLR = Literal["keep", "override", "restart", "cool_down"]
FLOOR_REACHED = "step at which the learning rate reaches its floor"
_GOES_ON = "the {kind} begun at step {step}{over} goes on; --{option} is not applied again"


@dataclass(frozen=True)
class RatePlan:
    """The changes of a run's learning rate and what they amount to.

    Args:
        changes: all so far, oldest first, as the next checkpoints record them.
        restart: step at which the schedule began anew, or None.
        cool_down: start and length of the fall that ends the run, or None.
    """

    changes: list[dict[str, Any]] = field(default_factory=list)
    restart: int | None = None
    cool_down: tuple[int, str] | None = None

    def end(self, length: RunLength) -> int:
        """The last step of the run."""
        if self.cool_down is None:
            return length.max_steps
        start, duration = self.cool_down
        return start + Duration.parse(duration).to_steps(length.tokens_per_step)


def without_rate(trajectory: dict[str, Any]) -> dict[str, Any]:
    """A run's decisive settings but for those of the learning rate."""
    rest = copy.deepcopy(trajectory)
    rest.pop(FLOOR_REACHED, None)
    model = rest.get("model", {})
    model.pop("schedule", None)
    optimizer = model.get("optimizer")
    if isinstance(optimizer, dict):
        optimizer.get("init_args", {}).pop("lr", None)
    return rest


def plan_rate(
    asked: ResumeLR, cool_down: Duration | None, step: int | None, progress: dict[str, Any], present: dict[str, Any]
) -> RatePlan:
    """Go on with the recorded changes, or with one more when a new one is asked for.

    A scheduler repeats its command: what the last recorded change did already is not done again.

    Args:
        asked: the recipe's ``resume_lr``.
        cool_down: length of the fall, when one is asked for.
        step: where the run goes on, or None for a fresh one.
        progress: what the checkpoint recorded.
        present: the recipe's decisive settings, as the checkpoint has its own under ``trajectory``.

    Raises:
        UserError: a cool-down of nothing, or without a length.
    """
    if asked == "cool_down" and cool_down is None:
        raise UserError("--resume_lr cool_down needs the length of the fall: add --cool_down '2000 steps'")
    if cool_down is not None and asked in ("override", "restart"):
        raise UserError(f"--cool_down and --resume_lr {asked} contradict each other: leave one out")
    kind = "cool_down" if cool_down is not None else asked
    if step is None:
        if kind == "cool_down":
            raise UserError("--cool_down ends a run that has begun: there is no checkpoint to start it from")
        return RatePlan()
    changes = _recorded(progress)
    last = changes[-1] if changes else {"kind": "keep"}
    differs = diff(progress.get("trajectory") or {}, present)
    repeated = last["kind"] == kind and not (differs and kind != "cool_down")
    if kind != "keep" and repeated and kind != "override":
        over = f" over {last['duration']}" if kind == "cool_down" else ""
        option = "cool_down" if kind == "cool_down" else f"resume_lr {kind}"
        log.info(_GOES_ON.format(kind=kind.replace("_", "-"), step=last["step"], over=over, option=option))
    needed = {
        "keep": False,
        "override": bool(differs) or last["kind"] in ("restart", "cool_down"),
        "restart": not repeated,
        "cool_down": not repeated,
    }[kind]
    if needed:
        changes.append({"step": step, "kind": kind, "changes": differs})
        if kind == "cool_down":
            changes[-1]["duration"] = str(cool_down)
        log.info(f"learning rate: {kind} from step {step} on" + (f" ({'; '.join(differs)})" if differs else ""))
    return _effect(changes)


def _recorded(progress: dict[str, Any]) -> list[dict[str, Any]]:
    changes = list(progress.get("lr_changes") or [])
    old = progress.get("cool_down")
    if old and not changes:  # of a version that recorded nothing else
        changes.append({"step": old[0], "kind": "cool_down", "changes": [], "duration": old[1]})
    return changes


def _effect(changes: list[dict[str, Any]]) -> RatePlan:
    """Each change replaces the earlier ones, but a cool-down starts from whatever was there."""
    restart, cool_down = None, None
    for change in changes:
        if change["kind"] == "cool_down":
            cool_down = (change["step"], change["duration"])
        else:
            restart, cool_down = (change["step"] if change["kind"] == "restart" else None), None
    return RatePlan(changes, restart, cool_down)

"""Learning-rate schedules: pure functions of the optimizer step, as a factor on the peak rate.

Update ``step`` (from 0) is the ``t = step + 1``-th one. The first update has ``1 / warmup`` of the peak,
the last update of the warm-up the whole peak, the last update of the decay exactly the floor.
"""

from __future__ import annotations

import math
from dataclasses import dataclass
from typing import Literal

from llmrecipes.recipe import Duration

Shape = Literal["cosine", "linear", "sqrt"]


@dataclass(frozen=True)
class RunLength:
    """What turns lengths into steps: the run's optimizer steps and the tokens of each."""

    max_steps: int
    tokens_per_step: int


def fall(progress: float, floor: float, shape: Shape) -> float:
    """From 1 at ``progress`` 0 to ``floor`` at 1. ``sqrt`` is the 1 - sqrt cool-down of 2405.18392."""
    progress = min(max(progress, 0.0), 1.0)
    if shape == "cosine":
        remaining = 0.5 * (1.0 + math.cos(math.pi * progress))
    elif shape == "linear":
        remaining = 1.0 - progress
    else:
        remaining = 1.0 - math.sqrt(progress)
    return floor + (1.0 - floor) * remaining


class Schedule:
    """Base of all schedules."""

    def factor(self, step: int, run: RunLength) -> float:
        """The factor on the peak learning rate for optimizer step ``step`` (from 0)."""
        raise NotImplementedError  # pragma: no cover - abstract

    def decay_steps(self, run: RunLength) -> int | None:
        """Optimizer steps until the floor is reached; None when the rate never falls."""
        raise NotImplementedError  # pragma: no cover - abstract


class Constant(Schedule):
    """Warm-up, then the peak rate for ever.

    Args:
        warmup: length of the linear warm-up.
    """

    def __init__(self, warmup: Duration = Duration(0, "steps")) -> None:  # noqa: B008 - frozen
        self.warmup = Duration.parse(warmup)

    def factor(self, step: int, run: RunLength) -> float:
        warmup = self.warmup.to_steps(run.tokens_per_step)
        return min(1.0, (step + 1) / warmup) if warmup else 1.0

    def decay_steps(self, run: RunLength) -> int | None:
        return None


class WarmupCosine(Schedule):
    """Linear warm-up, then half a cosine down to a floor, then the floor.

    Args:
        warmup: length of the warm-up.
        decay: where the floor is reached, counted from the run's start (warm-up included); ``null`` = the whole run.
        floor: the lowest rate, as a fraction of the peak.
    """

    def __init__(self, warmup: Duration, decay: Duration | None = None, floor: float = 0.1) -> None:
        self.warmup = Duration.parse(warmup)
        self.decay = None if decay is None else Duration.parse(decay)
        self.floor = floor

    def factor(self, step: int, run: RunLength) -> float:
        warmup = self.warmup.to_steps(run.tokens_per_step)
        if step + 1 < warmup:
            return (step + 1) / warmup
        end = self.decay_steps(run)
        return fall((step + 1 - warmup) / max(1, end - warmup), self.floor, "cosine")

    def decay_steps(self, run: RunLength) -> int:
        return run.max_steps if self.decay is None else self.decay.to_steps(run.tokens_per_step)


class WarmupStableDecay(Schedule):
    """Warm-up, a long plateau at the peak, a short fall at the end (MiniCPM, 2404.06395).

    Args:
        warmup: length of the warm-up.
        decay: length of the fall, which ends with the run.
        floor: the lowest rate, as a fraction of the peak.
        shape: of the fall.
    """

    def __init__(self, warmup: Duration, decay: Duration, floor: float = 0.0, shape: Shape = "sqrt") -> None:
        self.warmup = Duration.parse(warmup)
        self.decay = Duration.parse(decay)
        self.floor = floor
        self.shape = shape

    def factor(self, step: int, run: RunLength) -> float:
        warmup, decay = (d.to_steps(run.tokens_per_step) for d in (self.warmup, self.decay))
        if step + 1 < warmup:
            return (step + 1) / warmup
        return fall((step + 1 - (run.max_steps - decay)) / max(1, decay), self.floor, self.shape)

    def decay_steps(self, run: RunLength) -> int:
        return run.max_steps


class CoolDown(Schedule):
    """ "Cool down now": from the rate that ``base`` has at ``start`` down to ``floor`` within ``duration``.

    The command line makes one with ``--cool_down``: it starts where the run stands and ends the run with it.

    Args:
        base: the schedule followed until ``start``.
        start: optimizer step of the first cooled update.
        duration: length of the fall.
        floor: the lowest rate, as a fraction of the peak.
        shape: of the fall.
    """

    def __init__(
        self, base: Schedule, start: int, duration: Duration, floor: float = 0.0, shape: Shape = "linear"
    ) -> None:
        self.base = base
        self.start = start
        self.duration = Duration.parse(duration)
        self.floor = floor
        self.shape = shape

    def factor(self, step: int, run: RunLength) -> float:
        if step < self.start:
            return self.base.factor(step, run)
        before = self.base.factor(max(0, self.start - 1), run)
        progress = (step + 1 - self.start) / max(1, self.duration.to_steps(run.tokens_per_step))
        return self.floor + (before - self.floor) * fall(progress, 0.0, self.shape)

    def decay_steps(self, run: RunLength) -> int:
        return self.start + self.duration.to_steps(run.tokens_per_step)


class Restart(Schedule):
    """A schedule that begins anew in the middle of a run: warm-up again, over the steps that remain.

    Resuming with ``--resume_lr restart`` makes one.

    Args:
        base: the schedule; lengths in it count from ``start``, and its run is what remains.
        start: optimizer step of the first update under it.
    """

    def __init__(self, base: Schedule, start: int) -> None:
        self.base = base
        self.start = start

    def factor(self, step: int, run: RunLength) -> float:
        assert step >= self.start, "earlier steps had another schedule"
        return self.base.factor(step - self.start, self._rest(run))

    def decay_steps(self, run: RunLength) -> int | None:
        steps = self.base.decay_steps(self._rest(run))
        return None if steps is None else self.start + steps

    def _rest(self, run: RunLength) -> RunLength:
        return RunLength(run.max_steps - self.start, run.tokens_per_step)

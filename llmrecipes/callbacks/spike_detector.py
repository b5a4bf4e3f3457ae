"""Whether a loss or a gradient norm stands out from the ones before it: medians and deviations, no averages.

One spike moves a mean and inflates a variance, and so hides the next one. The median does not notice it.
"""

from __future__ import annotations

import math
from collections import deque
from collections.abc import Iterable
from dataclasses import dataclass
from statistics import median

# Below these, deviations are nothing to speak of: of the loss in nats, of the gradient norm as its logarithm.
LOSS_FLOOR = 0.01
NORM_FLOOR = 0.05
_MAD_TO_SIGMA = 1.4826  # of a normal distribution


@dataclass(frozen=True)
class Typical:
    """Where a figure should be: its level now, and how far it usually is from it."""

    level: float
    spread: float

    def deviations(self, value: float) -> float:
        """How many spreads ``value`` lies above the level."""
        return (value - self.level) / self.spread


def typical(values: list[float], floor: float) -> Typical:
    """Level and spread of a series that drifts.

    The level is the median of the newest quarter: late where a loss falls, so it errs to the safe side.
    The spread is the median distance from a line through the medians of both halves: a steep fall is no noise.

    Args:
        values: oldest first.
        floor: added to the spread.
    """
    count = len(values)
    half = count // 2
    slope = (median(values[half:]) - median(values[:half])) / max(1.0, count / 2)
    flat = [value - slope * i for i, value in enumerate(values)]
    middle = median(flat)
    spread = _MAD_TO_SIGMA * median([abs(value - middle) for value in flat])
    return Typical(median(values[-max(1, count // 4) :]), spread + floor)


class SpikeDetector:
    """Judges each step's loss and gradient norm by those of the healthy steps before it; upwards only.

    Gradient norms are judged by their logarithms: they vary by factors.

    Args:
        window: healthy steps that are remembered.
        min_history: healthy steps before the first verdict.
        loss_threshold, grad_threshold: deviations above the level that make a spike.
    """

    def __init__(self, window: int, min_history: int, loss_threshold: float, grad_threshold: float) -> None:
        self.min_history = min_history
        self.loss_threshold = loss_threshold
        self.grad_threshold = grad_threshold
        self._history: deque[tuple[float, float]] = deque(maxlen=window)
        self._typical: tuple[Typical, Typical] | None = None

    @property
    def history(self) -> list[tuple[float, float]]:
        """Loss and gradient norm of the remembered steps, oldest first."""
        return list(self._history)

    def remember(self, history: Iterable[tuple[float, float]]) -> None:
        """Replace the history."""
        self._history = deque(((loss, norm) for loss, norm in history), maxlen=self._history.maxlen)
        self._typical = None

    def add(self, loss: float, grad_norm: float) -> None:
        """A healthy step."""
        self._history.append((loss, grad_norm))
        self._typical = None

    def limits(self) -> tuple[float, float]:
        """The largest loss and gradient norm that are no spike; infinite while too little is known."""
        if len(self._history) < self.min_history:
            return math.inf, math.inf
        loss, norm = self._known()
        exponent = norm.level + self.grad_threshold * norm.spread
        return loss.level + self.loss_threshold * loss.spread, math.exp(min(exponent, 700.0))

    def is_spike(self, loss: float, grad_norm: float) -> bool:
        """Whether either figure is above its limit."""
        largest_loss, largest_norm = self.limits()
        return loss > largest_loss or grad_norm > largest_norm

    def figures(self, loss: float, grad_norm: float) -> dict[str, float]:
        """The two figures, their usual values, and by how many deviations they are above them."""
        found = {"loss": loss, "grad_norm": grad_norm}
        if len(self._history) < self.min_history:
            return found
        usual_loss, usual_norm = self._known()
        return found | {
            "usual_loss": usual_loss.level,
            "loss_deviations": usual_loss.deviations(loss),
            "usual_grad_norm": math.exp(usual_norm.level),
            "grad_norm_deviations": usual_norm.deviations(_logarithm(grad_norm)),
        }

    def _known(self) -> tuple[Typical, Typical]:
        if self._typical is None:
            losses, norms = zip(*self._history, strict=True)
            self._typical = typical(list(losses), LOSS_FLOOR), typical([_logarithm(n) for n in norms], NORM_FLOOR)
        return self._typical


def _logarithm(norm: float) -> float:
    """Of a norm; a norm of zero, as of a frozen model, is a very small one."""
    return norm if math.isnan(norm) else math.log(max(norm, 1e-30))

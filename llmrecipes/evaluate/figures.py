"""A measured value with its number of cases and its 95% interval. Torch-free."""

from __future__ import annotations

import math
from collections.abc import Sequence
from dataclasses import asdict, dataclass
from typing import Any

import numpy as np

Z = 1.959963984540054  # of 95%
RESAMPLES = 2000


@dataclass(frozen=True)
class Figure:
    """What was measured.

    Attributes:
        value: None when there was nothing to measure: that is not 0.
        n: cases.
        low, high: ends of the 95% interval, or None.
        interval: how it was made: ``wilson``, ``bootstrap`` or ``fisher``.
    """

    value: float | None
    n: int
    low: float | None = None
    high: float | None = None
    interval: str | None = None

    def as_dict(self) -> dict[str, Any]:
        """For JSON."""
        return asdict(self)

    def __str__(self) -> str:
        if self.value is None:
            return "- (n=0)"
        ends = f" [{self.low:.3f}, {self.high:.3f}]" if self.low is not None and self.high is not None else ""
        return f"{self.value:.3f}{ends} n={self.n}"


def mean(scores: Sequence[float]) -> Figure:
    """Mean of scores: Wilson's interval when each is 0 or 1, else that of a bootstrap."""
    if not scores:
        return Figure(None, 0)
    if all(score in (0, 1) for score in scores):
        return rate(round(sum(scores)), len(scores))
    return ratio(scores, [1.0] * len(scores))


def rate(hits: int, n: int) -> Figure:
    """A share of ``n`` with Wilson's score interval (1927), which stays within 0 and 1 and is sound for small ``n``."""
    if n == 0:
        return Figure(None, 0)
    p = hits / n
    middle = (p + Z * Z / (2 * n)) / (1 + Z * Z / n)
    half = Z / (1 + Z * Z / n) * math.sqrt(p * (1 - p) / n + Z * Z / (4 * n * n))
    return Figure(p, n, max(0.0, min(p, middle - half)), min(1.0, max(p, middle + half)), "wilson")


def ratio(above: Sequence[float], below: Sequence[float]) -> Figure:
    """Sum of ``above`` over sum of ``below``; the interval draws cases with replacement, always the same way."""
    n = len(above)
    total = math.fsum(below)
    if n == 0 or total == 0:
        return Figure(None, n)
    value = math.fsum(above) / total
    if n == 1:
        return Figure(value, 1)
    a, b = np.asarray(above, dtype=np.float64), np.asarray(below, dtype=np.float64)
    rng = np.random.default_rng(0)
    values = []
    for _ in range(RESAMPLES):
        chosen = rng.integers(0, n, n)
        bottom = b[chosen].sum()
        if bottom:
            values.append(a[chosen].sum() / bottom)
    low, high = np.percentile(values, [2.5, 97.5])
    return Figure(value, n, float(low), float(high), "bootstrap")


def correlation(r: float, n: int) -> Figure:
    """A correlation with the interval of Fisher's z; none below four cases."""
    if n < 4 or abs(r) >= 1:
        return Figure(r if n else None, n)
    z, half = math.atanh(r), Z / math.sqrt(n - 3)
    return Figure(r, n, math.tanh(z - half), math.tanh(z + half), "fisher")

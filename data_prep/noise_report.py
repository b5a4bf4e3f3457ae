"""How well a classifier tells noise from good text: shares with confidence intervals, and the choice of a threshold."""

from __future__ import annotations

import math
from dataclasses import asdict, dataclass
from typing import Any

import numpy as np


@dataclass(frozen=True)
class Share:
    """`hits` of `total`, with Wilson's 95 % interval."""

    hits: int
    total: int

    @property
    def value(self) -> float:
        """The share; 0 of nothing."""
        return self.hits / self.total if self.total else 0.0

    @property
    def interval(self) -> tuple[float, float]:
        """Wilson's score interval, which stays within [0, 1] also for small counts."""
        if not self.total:
            return 0.0, 1.0
        z, n, p = 1.959964, self.total, self.value
        middle = p + z * z / (2 * n)
        spread = z * math.sqrt(p * (1 - p) / n + z * z / (4 * n * n))
        return (middle - spread) / (1 + z * z / n), (middle + spread) / (1 + z * z / n)

    def __str__(self) -> str:
        low, high = self.interval
        return f"{self.value:.3f} [{low:.3f}, {high:.3f}]  ({self.hits:,} of {self.total:,})"


@dataclass(frozen=True)
class Report:
    """A classifier on labelled texts: accuracy at 0.5, and at the threshold what is dropped rightly and wrongly."""

    threshold: float
    accuracy: Share
    precision: Share
    recall: Share
    false_positives: Share

    def to_json(self) -> dict[str, Any]:
        """As plain data."""
        return asdict(self)

    def table(self) -> str:
        """As lines to print."""
        return "\n".join(
            (
                f"accuracy at 0.5                   {self.accuracy}",
                f"threshold                         {self.threshold:.4f}",
                f"  good documents dropped          {self.false_positives}",
                f"  noise dropped (recall)          {self.recall}",
                f"  noise among the dropped         {self.precision}",
            )
        )


def evaluate_scores(scores: np.ndarray, is_noise: np.ndarray, threshold: float) -> Report:
    """The report of P(noise) [N] against labels [N]."""
    dropped = scores >= threshold
    return Report(
        threshold=float(threshold),
        accuracy=Share(int(((scores >= 0.5) == is_noise).sum()), len(scores)),
        precision=Share(int((dropped & is_noise).sum()), int(dropped.sum())),
        recall=Share(int((dropped & is_noise).sum()), int(is_noise.sum())),
        false_positives=Share(int((dropped & ~is_noise).sum()), int((~is_noise).sum())),
    )


def threshold_for(scores: np.ndarray, is_noise: np.ndarray, false_positives: float) -> float:
    """The smallest threshold that drops at most this share of the good texts."""
    good = np.sort(scores[~is_noise])[::-1]
    allowed = int(false_positives * len(good))
    # Just above the best good text that must stay.
    return float(np.nextafter(good[allowed], np.inf)) if allowed < len(good) else 0.0

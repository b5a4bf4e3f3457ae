"""What failures cost, and how often to save. Torch-free."""

from __future__ import annotations

import math
from dataclasses import dataclass

# Unexpected interruptions per GPU hour: Llama 3 had 419 in 54 days on 16,384 H100 (2407.21783, table 5). BLOOM's one to
# two a week on 384 A100 are 1.6e-5 to 3.1e-5.
PER_GPU_HOUR = 419 / (54 * 24 * 16384)
WEEK = 7 * 86400.0


@dataclass(frozen=True)
class FailureCost:
    """Of a whole run, in seconds of all its GPUs.

    Attributes:
        failures: expected number. lost: steps made again and restarts. saving: time spent saving.
        best_interval: between two checkpoints, seconds (Young 1974; Daly 2006).
    """

    failures: float
    lost: float
    saving: float
    best_interval: float


def failure_cost(
    seconds: float, per_week: float, interval: float, save_seconds: float, restart_seconds: float
) -> FailureCost:
    """A failure loses half an interval on average, and a restart; each interval costs one saving.

    Args:
        seconds: of the run without failures. per_week: failures of the whole job.
        interval: between checkpoints. save_seconds: that training waits for one. restart_seconds: until it
            trains again.
    """
    failures = seconds / WEEK * per_week
    between = WEEK / per_week if per_week else math.inf
    return FailureCost(
        failures=failures,
        lost=failures * (interval / 2 + restart_seconds),
        saving=seconds / interval * save_seconds,
        best_interval=math.sqrt(2 * save_seconds * between),
    )

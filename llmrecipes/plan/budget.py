"""Tokens from GPUs, days and MFU, and the reverse; how a model compares with the compute-optimal one. Torch-free."""

from __future__ import annotations

import math
from dataclasses import dataclass

DAY = 86400.0
# Tokens per parameter at the optimum (Chinchilla, 2203.15556).
CHINCHILLA = 20.0


@dataclass(frozen=True)
class Budget:
    """A training as arithmetic: ``tokens * flops_per_token = peak * mfu * seconds``.

    Attributes:
        peak: of all GPUs, FLOP/s. seconds: of training. mfu: share of the peak that is the model's work.
        tokens: seen. flops_per_token: 6 per active parameter, or the recipe's exact figure.
    """

    peak: float
    seconds: float
    mfu: float
    tokens: float
    flops_per_token: float

    @property
    def flops(self) -> float:
        """Of the whole training."""
        return self.tokens * self.flops_per_token


def solve(
    peak: float, flops_per_token: float, seconds: float | None, mfu: float | None, tokens: float | None
) -> Budget:
    """The one of three that is None, from the other two."""
    assert [seconds, mfu, tokens].count(None) == 1
    if tokens is None:
        assert seconds is not None
        assert mfu is not None
        tokens = peak * mfu * seconds / flops_per_token
    elif seconds is None:
        assert mfu is not None
        seconds = tokens * flops_per_token / (peak * mfu)
    else:
        mfu = tokens * flops_per_token / (peak * seconds)
    assert mfu is not None
    return Budget(peak, seconds, mfu, tokens, flops_per_token)


def over_training(params: float, tokens: float) -> float:
    """Tokens per parameter over Chinchilla's 20: 1 = compute-optimal, more = cheaper to use later."""
    return tokens / params / CHINCHILLA


def optimal(flops: float) -> tuple[float, float]:
    """Parameters and tokens of the compute-optimal model for so many FLOPs: ``6 N D`` with ``D = 20 N``."""
    params = math.sqrt(flops / (6 * CHINCHILLA))
    return params, CHINCHILLA * params

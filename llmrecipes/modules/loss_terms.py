"""Losses as (sum, what it is divided by, weight): the one division happens in the optimizer step."""

from __future__ import annotations

from typing import Literal, NamedTuple

from torch import Tensor

Unit = Literal["targets", "tokens", "pairs"]


class LossTerm(NamedTuple):
    """One part of a micro-batch's loss.

    Args:
        sum: scalar with gradient, summed over the micro-batch.
        per: the count over the whole step that divides it: ``targets`` (trained labels), ``tokens`` (real tokens) or
            ``pairs`` (of answers).
        weight: factor in the total loss; 0 = only measured, in training and in validation.
    """

    sum: Tensor
    per: Unit
    weight: float = 1.0

"""Pure functions that return sums and counts; the only division is by the count of the whole step, elsewhere."""

from llmrecipes.losses.balance import (
    balance_loss,
    balance_sum,
    bias_update,
    load_entropy,
    max_violation,
)
from llmrecipes.losses.cross_entropy import IGNORE, linear_cross_entropy

__all__ = [
    "IGNORE",
    "balance_loss",
    "balance_sum",
    "bias_update",
    "linear_cross_entropy",
    "load_entropy",
    "max_violation",
]

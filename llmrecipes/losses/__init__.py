"""Pure functions that return sums and counts; the only division is by the count of the whole step, elsewhere."""

from llmrecipes.losses.balance import (
    balance_loss,
    balance_sum,
    bias_update,
    load_entropy,
    max_violation,
)
from llmrecipes.losses.cross_entropy import IGNORE, linear_cross_entropy
from llmrecipes.losses.label_log_probs import label_log_probs
from llmrecipes.losses.preference import Answers, PreferenceLoss, preference_loss

__all__ = [
    "IGNORE",
    "Answers",
    "PreferenceLoss",
    "balance_loss",
    "balance_sum",
    "bias_update",
    "label_log_probs",
    "linear_cross_entropy",
    "load_entropy",
    "max_violation",
    "preference_loss",
]

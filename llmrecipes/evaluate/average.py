"""Categories of llm-jp-eval and their mean. Torch-free."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass

CATEGORIES = {
    "NLI": "inference",
    "QA": "questions",
    "RC": "reading",
    "MC": "multiple choice",
    "HE": "exams",
    "EL": "entities",
    "FA": "analysis",
    "MR": "mathematics",
    "MT": "translation",
}


@dataclass(frozen=True)
class Average:
    """Mean of category means.

    Attributes:
        value: None when no category was measured.
        categories: mean of each measured category's tasks.
        missing: categories that no task measured.
        strict: missing ones counted as 0, as in llm-jp-eval.
    """

    value: float | None
    categories: dict[str, float]
    missing: list[str]
    strict: bool

    def sentence(self) -> str:
        """What the value stands for."""
        if self.value is None:
            return "no average: no task of a category was measured"
        left = f"; not measured: {', '.join(self.missing)}" if self.missing else ""
        how = " (counted 0: strict)" if self.strict and self.missing else ""
        return f"AVG {self.value:.4f} over {len(self.categories)} of {len(CATEGORIES)} categories{left}{how}"


def average(scores: Sequence[tuple[str, float]], strict: bool) -> Average:
    """The mean of category means.

    Args:
        scores: category and score of every task; each task counts, the first like the others.
        strict: a category without a task counts 0.
    """
    groups = {name: [score for category, score in scores if category == name] for name in CATEGORIES}
    means = {name: sum(found) / len(found) for name, found in groups.items() if found}
    missing = [name for name in CATEGORIES if name not in means]
    count = len(CATEGORIES) if strict else len(means)
    return Average(sum(means.values()) / count if means else None, means, missing, strict)

"""Judgements to marks, marks to the table. Torch-free."""

from __future__ import annotations

import json
import re
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np

from llmrecipes.errors import UserError
from llmrecipes.evaluate.figures import RESAMPLES, Figure, mean, rate
from llmrecipes.inference.texts import read_lines

NONE = -1.0  # of a judgement without a mark: it counts nowhere
_MARK = re.compile(r"\[\[(\d+\.?\d*)\]\]")
_LENIENT = re.compile(r"\[(\d+\.?\d*)\]")


def parse_mark(judgement: str) -> float:
    """The mark in ``[[n]]``, else in ``[n]``, the first of each kind, as FastChat reads it; -1 where there is none."""
    found = _MARK.search(judgement) or _LENIENT.search(judgement)
    return float(found[1]) if found else NONE


@dataclass(frozen=True)
class Mark:
    """A judged turn.

    Attributes:
        question: its id.
        turn: 1 or 2.
        category: of the question.
        score: 1 to 10, or -1.
    """

    question: str
    turn: int
    category: str
    score: float


def category_mean(marks: Sequence[Mark]) -> Figure:
    """Mean of the categories' means, each over its turns; n = turns.

    The 95% interval draws questions (with all their turns) with replacement within each category.
    """
    groups: dict[str, dict[str, list[float]]] = {}
    for mark in marks:
        if mark.score != NONE:
            groups.setdefault(mark.category, {}).setdefault(mark.question, []).append(mark.score)
    if not groups:
        return Figure(None, 0)
    turns = [[np.asarray(scores) for scores in questions.values()] for questions in groups.values()]
    n = sum(len(scores) for questions in turns for scores in questions)
    value = float(np.mean([np.concatenate(questions).mean() for questions in turns]))
    if n < 2:
        return Figure(value, n)
    rng = np.random.default_rng(0)
    totals = np.zeros(RESAMPLES)
    for questions in turns:
        sums, counts = np.array([q.sum() for q in questions]), np.array([len(q) for q in questions])
        chosen = rng.integers(0, len(questions), (RESAMPLES, len(questions)))
        totals += sums[chosen].sum(1) / counts[chosen].sum(1)
    low, high = np.percentile(totals / len(turns), [2.5, 97.5])
    return Figure(value, n, float(low), float(high), "bootstrap")


def figures(marks: Sequence[Mark]) -> dict[str, Figure]:
    """``score`` (mean of category means), ``mean`` of all turns, of each turn, and the share that got a mark."""
    good = [mark for mark in marks if mark.score != NONE]
    turns = {
        f"turn_{turn}": mean([m.score for m in good if m.turn == turn]) for turn in sorted({m.turn for m in marks})
    }
    return {
        "score": category_mean(good),
        "mean": mean([mark.score for mark in good]),
        **turns,
        "judged": rate(len(good), len(marks)),
    }


def by_category(marks: Sequence[Mark]) -> dict[str, Figure]:
    """The mean mark of each category that has one, over its turns."""
    names = sorted({mark.category for mark in marks})
    return {name: category_mean([mark for mark in marks if mark.category == name]) for name in names}


def read_judgements(file: str) -> list[dict[str, Any]]:
    """FastChat's judgements: question_id, turn, judgment, model.

    Raises:
        UserError: every line that is none.
    """
    found, problems = [], []
    for where, line in read_lines(Path(file)):
        try:
            record = json.loads(line)
            text = str(record["judgment"])
            key = {"question": str(record["question_id"]), "turn": int(record.get("turn", 1))}
            found.append({**key, "model": str(record.get("model", "")), "judgement": text, "score": parse_mark(text)})
        except (ValueError, KeyError, TypeError) as error:
            problems.append(f"{where}: no judgement ({error}); it has question_id, turn, judgment and model")
    if problems:
        raise UserError(*problems[:10])
    return found


def judgement_table(file: str, categories: dict[str, str]) -> dict[str, tuple[Figure, dict[str, Figure]]]:
    """What recorded judgements say of each model: its score, and that of each category.

    Args:
        file: judgements; a question that was judged twice counts twice.
        categories: of each question_id.

    Raises:
        UserError: judgements of questions that are not known.
    """
    found = read_judgements(file)
    if unknown := sorted({one["question"] for one in found} - set(categories)):
        raise UserError(f"{file}: judges question_id {', '.join(unknown[:5])}, which the questions have not")
    table = {}
    for model in sorted({one["model"] for one in found}):
        own = [one for one in found if one["model"] == model]
        marks = [Mark(one["question"], one["turn"], categories[one["question"]], one["score"]) for one in own]
        table[model] = (category_mean(marks), by_category(marks))
    return table

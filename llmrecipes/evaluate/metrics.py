"""Scores of an answer against its reference, equal to those of llm-jp-eval 1.3.0. Torch-free.

Each takes ``(answer, reference)`` and gives a number between 0 and 1; ``pearson`` and ``spearman`` take all of a
task at once.
"""

from __future__ import annotations

import math
import re
from collections.abc import Callable, Sequence
from difflib import SequenceMatcher

_LATIN_1 = dict.fromkeys(range(128, 256))
_NUMBER = re.compile(r"-?\d+(?:,\d{3})*(?:\.\d+)?")


def exact_match(answer: str, reference: str) -> float:
    """1 if they are the same text."""
    return float(answer == reference)


def exact_match_figure(answer: str, reference: str) -> float:
    """1 if both are numbers and equal: ``7.0`` and ``7`` are (Nejumi's variant)."""
    try:
        return float(float(answer) == float(reference))
    except ValueError:
        return 0.0


def last_number(answer: str, reference: str) -> float:
    """1 if the last number that the answer holds is the reference: lenient where only a number was asked for."""
    found = _NUMBER.findall(answer)
    return exact_match_figure(found[-1].replace(",", ""), reference) if found else 0.0


def char_f1(answer: str, reference: str) -> float:
    """``fuzzywuzzy.fuzz.token_sort_ratio / 100``, which llm-jp-eval calls by this name.

    Words in order of the alphabet, then difflib's ratio, rounded to hundredths. As in fuzzywuzzy, letters of Latin-1
    beyond ASCII are dropped, and what is no letter or digit separates words. (rapidfuzz computes another ratio:
    docs/decisions.md.)
    """
    a, b = _sorted_words(answer), _sorted_words(reference)
    if a == b:
        return 1.0
    if not a or not b:
        return 0.0
    return round(100 * SequenceMatcher(None, a, b).ratio()) / 100


def _sorted_words(text: str) -> str:
    words = re.sub(r"\W", " ", text.translate(_LATIN_1)).lower().split()
    return " ".join(sorted(words))


def set_f1(answer: str, reference: str) -> float:
    """F1 of the lines as sets. Recall counts lines of the answer over lines of the reference, as the original does."""
    wanted = [line.strip() for line in reference.split("\n")]
    given = {line.strip() for line in answer.split("\n")}
    hits = sum(line in wanted for line in given)
    precision, recall = hits / len(given), hits / len(wanted)
    return 2 * precision * recall / (precision + recall) if hits else 0.0


def contains(answer: str, reference: str) -> float:
    """1 if the reference stands in the answer, and not as a part of a longer number or Latin word."""
    return float(re.search(_whole(reference), answer, re.IGNORECASE) is not None) if reference else 0.0


def begins_with(answer: str, reference: str) -> float:
    """1 if the answer begins with the reference: a sentence that was to be completed may go on after it."""
    return float(re.match(_whole(reference), answer, re.IGNORECASE) is not None) if reference else 0.0


def _whole(reference: str) -> str:
    before = r"(?<![0-9A-Za-z])" if reference[0].isascii() and reference[0].isalnum() else ""
    after = r"(?![0-9A-Za-z])(?![.,][0-9])" if reference[-1].isascii() and reference[-1].isalnum() else ""
    return before + re.escape(reference) + after


def parse_float(text: str) -> float:
    """The digits and points of a text as a number, -2 where they make none: llm-jp-eval's reading of an answer."""
    try:
        return float(re.sub(r"[^0-9.]", "", text))
    except ValueError:
        return -2.0


def pearson(answers: Sequence[str], references: Sequence[str]) -> float:
    """Correlation of all answers with all references; 0 where it is undefined (fewer than two, or all the same).

    Over the whole task: its descendants called it for one pair at a time and returned 0 whatever came out.
    """
    return correlation_of([parse_float(a) for a in answers], [float(r) for r in references])


def correlation_of(xs: Sequence[float], ys: Sequence[float]) -> float:
    """Pearson's of numbers; 0 where it is undefined."""
    if len(xs) < 2:
        return 0.0
    mean_x, mean_y = math.fsum(xs) / len(xs), math.fsum(ys) / len(ys)
    dx, dy = [x - mean_x for x in xs], [y - mean_y for y in ys]
    scale = math.sqrt(math.fsum(d * d for d in dx)) * math.sqrt(math.fsum(d * d for d in dy))
    if scale == 0:
        return 0.0
    return max(-1.0, min(1.0, math.fsum(a * b for a, b in zip(dx, dy, strict=True)) / scale))


def spearman(answers: Sequence[str], references: Sequence[str]) -> float:
    """The same of their ranks; equal ones share the mean of theirs."""
    xs, ys = [parse_float(a) for a in answers], [float(r) for r in references]
    return correlation_of(ranks(xs), ranks(ys))


def ranks(values: Sequence[float]) -> list[float]:
    """From 1, the mean of their places for equal values."""
    order = sorted(range(len(values)), key=lambda i: values[i])
    found = [0.0] * len(values)
    start = 0
    while start < len(order):
        end = start
        while end + 1 < len(order) and values[order[end + 1]] == values[order[start]]:
            end += 1
        for i in order[start : end + 1]:
            found[i] = (start + end) / 2 + 1
        start = end + 1
    return found


METRICS: dict[str, Callable[[str, str], float]] = {
    "exact_match": exact_match,
    "exact_match_figure": exact_match_figure,
    "last_number": last_number,
    "char_f1": char_f1,
    "set_f1": set_f1,
    "contains": contains,
    "begins_with": begins_with,
}
# Of a whole task, not of an answer.
OVER_ALL: dict[str, Callable[[Sequence[str], Sequence[str]], float]] = {"pearson": pearson, "spearman": spearman}

"""Answers to scores, scores to figures. Torch-free."""

from __future__ import annotations

import re
import unicodedata
from collections.abc import Sequence
from typing import Any

from llmrecipes.evaluate.config import TaskConfig
from llmrecipes.evaluate.figures import Figure, correlation, mean
from llmrecipes.evaluate.metrics import METRICS, OVER_ALL
from llmrecipes.evaluate.questions import Question

MORE = {  # further metrics of a kind, beside the one that stands for it
    "jsquad": ["exact_match", "best_char_f1", "best_exact_match"],
    "mgsm_ja": ["exact_match_figure", "last_number"],
    "jmmlu": [],
    "jnli": [],
    "jcommonsenseqa": [],
    "questions": ["exact_match", "contains", "char_f1"],
    "llm_jp_eval": ["exact_match", "char_f1"],
}
MANY = 60  # a breakdown with more values than this is left to the list of answers


def cut(output: str, way: str) -> str:
    """What counts as the answer: llm-jp-eval's ``NFKC(output.split("\\n\\n")[0].strip())``, or the first line."""
    if way == "blank_line":
        output = output.split("\n\n")[0]
    if way == "line":
        output = output.split("\n")[0]
    return unicodedata.normalize("NFKC", output.strip())


def names(task: TaskConfig) -> list[str]:
    """The metrics of a task that are computed answer by answer, the main one first."""
    main = ["exact_match"] if task.main_metric in OVER_ALL else [task.main_metric]
    return list(dict.fromkeys([*main, *MORE[task.kind]]))


def score_one(task: TaskConfig, question: Question, output: str, form: str | None) -> dict[str, Any]:
    """An answer as it is cut, its scores, and whether it has the form that was asked for (None = none was)."""
    answer = cut(output, task.end)
    reference = unicodedata.normalize("NFKC", question.reference.strip())
    scores = {}
    for name in names(task):
        metric = METRICS[name.removeprefix("best_")]
        others = [unicodedata.normalize("NFKC", text.strip()) for text in question.also]
        references = [reference, *others] if name.startswith("best_") else [reference]
        scores[name] = max(metric(answer, text) for text in references)
    obeys: bool | None = None
    if form is not None:
        obeys = re.fullmatch(form, answer) is not None
    elif question.within is not None:
        obeys = bool(answer) and answer in unicodedata.normalize("NFKC", question.within)
    return {"answer": answer, "scores": scores, "obeys": obeys}


def figures(task: TaskConfig, rows: Sequence[dict[str, Any]]) -> dict[str, Figure]:
    """Every metric of a task over its answers, and the share of answers in the form that was asked for."""
    found: dict[str, Figure] = {}
    if task.main_metric in OVER_ALL:
        answers, references = [row["answer"] for row in rows], [row["reference"] for row in rows]
        for name in dict.fromkeys([task.main_metric, *OVER_ALL]):  # JSTS is reported with both
            found[name] = correlation(OVER_ALL[name](answers, references), len(rows))
    found |= {name: mean([row["scores"][name] for row in rows]) for name in names(task)}
    judged = [float(row["obeys"]) for row in rows if row["obeys"] is not None]
    if judged:
        found["format_obeyed"] = mean(judged)
    return found


def breakdowns(task: TaskConfig, rows: Sequence[dict[str, Any]]) -> dict[str, dict[str, Figure]]:
    """The main metric for each subject, language, kind: ``{"lang": {"ja": ...}}``."""
    name = names(task)[0]
    found: dict[str, dict[str, Figure]] = {}
    for key in dict.fromkeys(key for row in rows for key in row["about"]):
        values = sorted({row["about"][key] for row in rows if key in row["about"]})
        if 1 < len(values) <= MANY:
            parts = {v: [row["scores"][name] for row in rows if row["about"].get(key) == v] for v in values}
            found[key] = {value: mean(scores) for value, scores in parts.items()}
    return found

"""Models on two axes: MT-Bench against llm-jp-eval, or any two figures, with others' published ones beside them."""

from __future__ import annotations

import csv
import math
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from llmrecipes.errors import UserError
from llmrecipes.evaluate.report.gather import Run
from llmrecipes.evaluate.report.plots import COLORS, label, save

AXES = ("llm_jp_eval", "mt_bench")  # the chart of the source documents
NAME = "model"


@dataclass(frozen=True)
class Point:
    """A model.

    Attributes:
        name: its label.
        x, y: figures, each (value, low end, high end).
        own: one of the report's runs; else a reference.
    """

    name: str
    x: tuple[float, float, float]
    y: tuple[float, float, float]
    own: bool


def draw_scatter(
    runs: Sequence[Run], folder: Path, references: Path | None, axes: Sequence[str] = AXES
) -> list[tuple[str, str, Path]]:
    """``scatter.png``, when a run of the report has both figures or there are references.

    Args:
        runs: of the report.
        folder: for the file.
        references: CSV with the columns model and both axes.
        axes: two figures: ``llm_jp_eval`` (the average over categories), ``mt_bench``, a task, or ``task.figure``.

    Raises:
        UserError: a CSV that lacks a column or holds no numbers; an axis that no run has, though references were given.
    """
    own = own_points(runs, axes)
    others = [] if references is None else read_references(references, axes)
    if references is not None and not own:
        known = ", ".join(sorted({name for run in runs for name in figures_of(run)})) or "none"
        raise UserError(f"--axes {' '.join(axes)}: no run has both figures; there are: {known}")
    if not own:
        return []
    path = folder / "scatter.png"
    save(lambda figure: _scatter(figure, [*others, *own], axes), (8, 6), path)
    beside = f"grey: {references.name}" if references is not None else "no reference models (--reference FILE.csv)"
    lacking = [(run.name, [axis for axis in axes if axis not in figures_of(run)]) for run in runs]
    left_out = [f"{name} is not there, it has no {axis[0]}" for name, axis in lacking if len(axis) == 1]
    return [(f"{axes[1]} against {axes[0]}", "; ".join(["bars: 95% intervals", beside, *left_out]), path)]


def figures_of(run: Run) -> dict[str, tuple[float, float, float]]:
    """What can stand on an axis; of a figure that several evaluations have, the newest's."""
    found: dict[str, tuple[float, float, float]] = {}
    for summary in run.summaries:
        mean = summary["average"].get("value")
        if mean is not None:
            found["llm_jp_eval"] = (mean, mean, mean)
        for task in summary["tasks"]:
            for name, figure in task["figures"].items():
                value = figure["value"]
                if value is None:
                    continue
                ends = [value if figure[end] is None else figure[end] for end in ("low", "high")]
                found[f"{task['task']}.{name}"] = (value, ends[0], ends[1])
                if name == task["metric"]:
                    found[task["task"]] = (value, ends[0], ends[1])
                    if task.get("kind") == "mt_bench":
                        found["mt_bench"] = (value, ends[0], ends[1])
    return found


def own_points(runs: Sequence[Run], axes: Sequence[str]) -> list[Point]:
    """A point for each run that has both figures."""
    found = [(run.name, figures_of(run)) for run in runs]
    return [Point(name, f[axes[0]], f[axes[1]], True) for name, f in found if axes[0] in f and axes[1] in f]


def read_references(path: Path, axes: Sequence[str]) -> list[Point]:
    """Published models: ``model,llm_jp_eval,mt_bench``; further columns do not matter, a row without both is left out.

    Raises:
        UserError: a missing file or column, or a value that is no number.
    """
    if not path.is_file():
        raise UserError(f"--reference {path}: no such file; a CSV with the columns {NAME},{','.join(axes)}")
    found, problems = [], []
    with path.open(encoding="utf-8-sig", newline="") as file:
        rows = csv.DictReader(file)
        columns = [name.strip() for name in rows.fieldnames or []]
        rows.fieldnames = columns
        if missing := [name for name in (NAME, *axes) if name not in columns]:
            raise UserError(f"{path}:1: no column {', '.join(missing)}; it has {', '.join(columns) or 'none'}")
        for row in rows:
            texts = [(row[axis] or "").strip() for axis in axes]
            if not all(texts):
                continue
            try:
                x, y = (float(text) for text in texts)
            except ValueError:
                problems.append(f"{path}:{rows.line_num}: {' and '.join(texts)}: not two numbers")
                continue
            if not (math.isfinite(x) and math.isfinite(y)):
                problems.append(f"{path}:{rows.line_num}: {' and '.join(texts)}: not finite")
                continue
            found.append(Point((row[NAME] or "").strip(), (x, x, x), (y, y, y), False))
    if problems:
        raise UserError(*problems[:10])
    return found


def _scatter(figure: Any, points: Sequence[Point], axes: Sequence[str]) -> None:
    axis = figure.subplots()
    axis.set_xlabel(label(axes[0]))
    axis.set_ylabel(label(axes[1]))
    axis.grid(alpha=0.25)
    own = 0
    for point in points:
        color = COLORS[own % len(COLORS)] if point.own else "0.6"
        own += point.own
        (x, left, right), (y, low, high) = point.x, point.y
        axis.errorbar(
            x,
            y,
            xerr=[[x - left], [right - x]],
            yerr=[[y - low], [high - y]],
            fmt="o" if point.own else "s",
            color=color,
            markersize=7 if point.own else 4,
            capsize=2 if point.own else 0,
            linewidth=0.9,
            zorder=3 if point.own else 2,
        )
        axis.annotate(
            label(point.name),
            (x, y),
            textcoords="offset points",
            xytext=(6, 5),
            fontsize=9 if point.own else 7,
            fontweight="bold" if point.own else "normal",
            color=color if point.own else "0.35",
        )
    axis.margins(0.15)

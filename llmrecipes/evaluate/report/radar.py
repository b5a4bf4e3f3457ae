"""The categories of MT-Bench as a radar chart, all models of the report in one."""

from __future__ import annotations

import math
from collections.abc import Sequence
from pathlib import Path
from typing import Any

from llmrecipes.evaluate.report.gather import Run
from llmrecipes.evaluate.report.plots import COLORS, label, save

FEWEST = 3  # categories that make a figure with an inside
# As the published charts have them, clockwise; others follow.
ORDER = ("writing", "roleplay", "reasoning", "math", "coding", "extraction", "stem", "humanities")


def draw_radar(runs: Sequence[Run], folder: Path) -> list[tuple[str, str, Path]]:
    """``radar.png``, when a run was judged in three categories or more."""
    found = judged(runs)
    names = sorted({name for _, values in found for name in values}, key=lambda n: (*_place(n), n))
    if len(names) < FEWEST:
        return []
    path = folder / "radar.png"
    save(lambda figure: _radar(figure, found, names), (6.5, 6), path)
    said = "mean mark of each category over both turns, 1 to 10"
    gaps = [f"{name}: {', '.join(n for n in names if n not in values)}" for name, values in found]
    gaps = [gap for gap in gaps if not gap.endswith(": ")]
    return [("MT-Bench by category", "; ".join([said, *(f"no mark, a gap in the line, {gap}" for gap in gaps)]), path)]


def _place(name: str) -> tuple[int]:
    return (ORDER.index(name),) if name in ORDER else (len(ORDER),)


def judged(runs: Sequence[Run]) -> list[tuple[str, dict[str, float]]]:
    """Each judged model with the marks of its categories; one that was never judged is not there, and not 0."""
    found = []
    for run in runs:
        for summary in run.summaries:
            for task in (task for task in summary["tasks"] if task.get("kind") == "mt_bench"):
                parts = task["breakdowns"].get("category", {})
                values = {name: figure["value"] for name, figure in parts.items() if figure["value"] is not None}
                many = sum(t.get("kind") == "mt_bench" for s in run.summaries for t in s["tasks"]) > 1
                if values:
                    found.append((f"{run.name} / {summary['name']}" if many else run.name, values))
    return found


def _radar(figure: Any, found: Sequence[tuple[str, dict[str, float]]], names: Sequence[str]) -> None:
    axis = figure.add_subplot(projection="polar")
    axis.set_theta_offset(math.pi / 2)
    axis.set_theta_direction(-1)
    angles = [2 * math.pi * i / len(names) for i in range(len(names))]
    axis.set_xticks(angles, [label(name) for name in names], fontsize=9)
    axis.set_ylim(0, 10)
    axis.set_yticks([2, 4, 6, 8, 10])
    for number, (name, values) in enumerate(found):
        color = COLORS[number % len(COLORS)]
        # A category without a mark is a gap in the line.
        marks = [values.get(category, math.nan) for category in names]
        axis.plot([*angles, angles[0]], [*marks, marks[0]], "o-", color=color, markersize=3, label=label(name))
        if not any(map(math.isnan, marks)):
            axis.fill(angles, marks, color=color, alpha=0.08)
    axis.legend(fontsize=8, loc="upper left", bbox_to_anchor=(-0.1, 1.1))

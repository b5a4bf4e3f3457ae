"""Figures of evaluations along a training, against the step."""

from __future__ import annotations

from collections.abc import Sequence
from functools import partial
from pathlib import Path
from typing import Any

from llmrecipes.evaluate.report.gather import Run
from llmrecipes.evaluate.report.plots import COLORS, label, save
from llmrecipes.evaluate.store import step_of

Series = list[tuple[int, dict[str, Any]]]


def draw_along(runs: Sequence[Run], folder: Path) -> list[tuple[str, str, Path]]:
    """A picture for each run that was evaluated at two steps or more."""
    pictures = []
    for number, run in enumerate(runs):
        found = {name: series for name, series in along(run).items() if len(series) > 1}
        if found:
            path = folder / f"along_training_{number}.png"
            save(partial(_curves, found=found), (9, 3.6), path)
            pictures.append((f"Evaluations along {run.name}", "each task's first figure with its 95% interval", path))
    return pictures


def along(run: Run) -> dict[str, Series]:
    """For each task, by ``recipe / task``, its step and figure in order."""
    found: dict[str, Series] = {}
    for summary in [*run.earlier, *run.summaries]:
        place = step_of(summary["name"])
        for task in summary["tasks"] if place is not None else ():
            figure = task["figures"][task["metric"]]
            if place is not None and figure["value"] is not None:
                found.setdefault(f"{place[0]} / {task['task']}: {task['metric']}", []).append((place[1], figure))
    return {name: sorted(series, key=lambda point: point[0]) for name, series in found.items()}


def _curves(figure: Any, found: dict[str, Series]) -> None:
    axis = figure.subplots()
    axis.set_xlabel("step")
    axis.grid(alpha=0.25)
    for number, (name, series) in enumerate(found.items()):
        color = COLORS[number % len(COLORS)]
        steps = [step for step, _ in series]
        axis.plot(steps, [f["value"] for _, f in series], "o-", color=color, markersize=3, label=label(name))
        ends = [(f["value"] if f[end] is None else f[end]) for end in ("low", "high") for _, f in series]
        axis.fill_between(steps, ends[: len(steps)], ends[len(steps) :], color=color, alpha=0.12, linewidth=0)
    axis.legend(fontsize=8)

"""The pictures of a report. matplotlib is imported when there is something to draw."""

from __future__ import annotations

import warnings
from collections.abc import Callable
from functools import partial
from pathlib import Path
from typing import Any

from llmrecipes.evaluate.report.gather import Run, data_mix

COLORS = ("tab:blue", "tab:orange", "tab:green", "tab:red", "tab:purple", "tab:brown", "tab:pink", "tab:cyan")


def draw_all(runs: list[Run], folder: Path) -> list[tuple[str, str, Path]]:
    """Every picture that the runs have figures for: ``(heading, what it shows, PNG)``.

    Args:
        runs: the runs.
        folder: for the files.
    """
    trained = [run for run in runs if len(run.steps) > 1]
    found = list[tuple[str, str, Path]]()

    def add(name: str, heading: str, text: str, draw: Callable[[Any], None], size: tuple[float, float]) -> None:
        path = folder / f"{name}.png"
        save(draw, size, path)
        found.append((heading, text, path))

    if trained:
        add("loss", "Loss", "nats per token; dots: validation", partial(_losses, runs=trained), (9, 4))
        for key, heading, text, log in (
            ("lr", "Learning rate", "as used by each step", False),
            ("grad_norm", "Gradient norm", "global, before clipping; logarithmic", True),
            ("tokens_per_second", "Throughput", "tokens per second between two logged steps", False),
        ):
            if any(r.get(key) is not None for run in trained for r in run.steps):
                add(key, heading, text, partial(_curve, runs=trained, key=key, logarithmic=log), (9, 2.6))
    for number, run in enumerate(runs):
        steps = [r for r in run.steps if r.get("expert_load")]
        if steps:
            layers = len(steps[0]["expert_load"])
            text = "share of each expert of a layer's tokens, times the number of experts: 1 is even"
            add(
                f"expert_load_{number}",
                f"Expert load of {run.name}",
                text,
                partial(_experts, steps=steps),
                (9, 0.9 + layers * max(0.35, min(1.5, 8 / layers))),
            )
    mixed = [run for run in runs if data_mix(run)]
    if mixed:
        add(
            "data_mix",
            "Data mix",
            "share of the training samples, from the recipes' weights",
            partial(_mix, runs=mixed),
            (9, 1.2 + 0.5 * len(mixed)),
        )
    return found


def save(draw: Callable[[Any], None], size: tuple[float, float], path: Path) -> None:
    """Draw on a figure of this size, in inches, and write it."""
    from matplotlib.backends.backend_agg import FigureCanvasAgg
    from matplotlib.figure import Figure

    figure = Figure(figsize=size, layout="constrained")
    FigureCanvasAgg(figure)
    draw(figure)
    with warnings.catch_warnings():
        # A letter that the machine's fonts lack, a gradient norm of zero on a logarithmic axis: nothing to act on.
        warnings.simplefilter("ignore", UserWarning)
        figure.savefig(path, dpi=110)


def label(text: str) -> str:
    """matplotlib reads formulas between dollars and leaves out labels that begin with a line."""
    return text.replace("$", r"\$").lstrip("_") or "run"


def _axis(figure: Any, ylabel: str) -> Any:
    axis = figure.subplots()
    axis.set_xlabel("million tokens")
    axis.set_ylabel(ylabel)
    axis.grid(alpha=0.25)
    return axis


def _losses(figure: Any, runs: list[Run]) -> None:
    axis = _axis(figure, "loss")
    for number, run in enumerate(runs):
        color = COLORS[number % len(COLORS)]
        steps = [r for r in run.steps if r["loss"] is not None]
        axis.plot([r["tokens"] / 1e6 for r in steps], [r["loss"] for r in steps], color=color, alpha=0.6, linewidth=0.9)
        axis.plot([], [], color=color, label=label(run.name))
        per_step = run.steps[-1]["tokens"] / run.steps[-1]["step"] / 1e6
        valid = [r for r in run.validations if r["val_loss"] is not None]
        axis.plot(
            [r["step"] * per_step for r in valid], [r["val_loss"] for r in valid], "o-", color=color, markersize=4
        )
    axis.legend(fontsize=8)


def _curve(figure: Any, runs: list[Run], key: str, logarithmic: bool) -> None:
    axis = _axis(figure, key.replace("_", " "))
    for number, run in enumerate(runs):
        steps = [r for r in run.steps if r.get(key) is not None]
        axis.plot(
            [r["tokens"] / 1e6 for r in steps],
            [r[key] for r in steps],
            color=COLORS[number % len(COLORS)],
            linewidth=0.9,
            label=label(run.name),
        )
    if logarithmic:
        axis.set_yscale("log")
    if len(runs) > 1:
        axis.legend(fontsize=8)


def _experts(figure: Any, steps: list[dict[str, Any]]) -> None:
    layers = len(steps[0]["expert_load"])
    axes = figure.subplots(layers, 1, sharex=True, squeeze=False)[:, 0]
    first, last = steps[0]["step"], steps[-1]["step"]
    image = None
    for layer, axis in enumerate(axes):
        rows = [record["expert_load"][layer] for record in steps]
        experts = len(rows[0])
        grid = [[row[expert] * experts for row in rows] for expert in range(experts)]
        image = axis.imshow(
            grid,
            aspect="auto",
            vmin=0,
            vmax=2,
            cmap="RdBu_r",
            interpolation="nearest",
            origin="lower",
            extent=(first, max(last, first + 1), -0.5, experts - 0.5),
        )
        crowded = layers > 8
        axis.set_ylabel(f"{layer}" if crowded else f"layer {layer}\nexpert", fontsize=7 if crowded else 8)
        if crowded:
            axis.set_yticks([])
    axes[-1].set_xlabel("step")
    figure.colorbar(image, ax=list(axes), extend="max")


def _mix(figure: Any, runs: list[Run]) -> None:
    from matplotlib import colormaps

    axis = figure.subplots()
    palette = colormaps["tab20"]
    names = list(dict.fromkeys(name for run in runs for name, _ in data_mix(run)))
    left = [0.0] * len(runs)
    for number, name in enumerate(names):
        shares = [dict(data_mix(run)).get(name, 0.0) for run in runs]
        color = palette(number % palette.N)
        axis.barh(range(len(runs)), shares, left=left, color=color, label=label(name), height=0.6)
        left = [a + b for a, b in zip(left, shares, strict=True)]
    axis.set_yticks(range(len(runs)), [label(run.name) for run in runs])
    axis.invert_yaxis()
    axis.set_xlim(0, 1)
    axis.legend(fontsize=8, ncols=5, loc="lower center", bbox_to_anchor=(0.5, 1.0))

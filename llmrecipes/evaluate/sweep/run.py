"""``llmrecipes sweep``: trains, evaluates, draws; what is done already is kept, so the same command goes on."""

from __future__ import annotations

import json
import subprocess
import sys
from collections.abc import Callable
from functools import partial
from pathlib import Path
from typing import Any

from data_prep.frame.config import help_text, read_config
from llmrecipes.errors import UserError
from llmrecipes.evaluate.store import SUMMARY, read_json, write_json
from llmrecipes.evaluate.sweep.config import SweepConfig
from llmrecipes.evaluate.sweep.subsets import read_examples, write_subset
from llmrecipes.recipe import read_recipe

RESULT, PICTURE = "sweep.json", "sweep.png"
ABOUT = (
    "Fine-tune on more and more examples and draw what the model then knows: nested sets, the same for the same seed.\n"
    "Repeat the command to go on after a stop."
)
Start = Callable[[list[str]], int]


def sweep(words: list[str]) -> int:
    """``llmrecipes sweep --config recipes/sweep/sft_examples.yaml``.

    Raises:
        UserError: every mistake of the recipes.
    """
    if not words or {"-h", "--help"} & set(words):
        print(help_text(SweepConfig, "llmrecipes sweep", ABOUT))
        return 0
    return run_sweep(read_config(SweepConfig, words), _start)


def _start(words: list[str]) -> int:
    """In a process of its own: a training owns signals and memory."""
    return subprocess.run([sys.executable, "-m", "llmrecipes", *words], check=False).returncode


def run_sweep(config: SweepConfig, start: Start) -> int:
    """All trainings and evaluations that are still to be done, and the picture.

    Args:
        config: the recipe.
        start: runs a command of llmrecipes and gives its exit code.

    Returns:
        0, or the exit code of the first command that did not end with 0: what was done is kept.

    Raises:
        UserError: a recipe without examples, or a figure that the evaluation has not.
    """
    output = Path(config.output)
    recipe = read_recipe([Path(name) for name in config.recipe])
    train = recipe.data.get("data", {}).get("init_args", {}).get("train")
    if not isinstance(train, dict) or not train:
        raise UserError(f"{config.recipe[-1]}: data.init_args.train names no files of examples")
    examples = read_examples(list(train))
    for count in config.examples:
        for seed in config.seeds:
            write_subset(_subset(output, seed, count), examples, seed, count)
    points = []
    for count in sorted(config.examples):
        for seed in config.seeds:
            code, figure = _one(config, output, seed, count, start)
            if code:
                return code
            points.append({"examples": count, "seed": seed, **figure})
            write_json(output / RESULT, {"figure": config.figure, "of": len(examples), "points": points})
            print(f"{count:>7,} examples, seed {seed}: {config.figure} {_shown(figure)}", flush=True)
    draw_sweep(output / RESULT, output / PICTURE)
    print(f"figures {output / RESULT}\npicture {output / PICTURE}")
    return 0


def _subset(output: Path, seed: int, count: int) -> Path:
    return output / "examples" / f"seed{seed}" / f"{count:07d}.jsonl"


def _one(config: SweepConfig, output: Path, seed: int, count: int, start: Start) -> tuple[int, dict[str, Any]]:
    name = f"{count:07d}-seed{seed}"
    run, measured = output / "runs" / name, output / "runs" / name / "evaluation" / "sweep"
    train = json.dumps({str(_subset(output, seed, count)): 1.0}, ensure_ascii=False)
    fit = [word for file in config.recipe for word in ("--config", file)]
    fit += [f"--name={name}", f"--run_root={output / 'runs'}", f"--seed={seed}", f"--data.init_args.train={train}"]
    if not (run / "DONE").exists() and (code := start(["fit", *fit, *config.overrides])):
        return code, {}
    if not (measured / SUMMARY).exists():
        words = ["evaluate", "--config", config.evaluation, "--model", str(run), "--output", str(measured)]
        if code := start(words):
            return code, {}
    return 0, find_figure(read_json(measured / SUMMARY), config.figure)


def find_figure(summary: dict[str, Any], wanted: str) -> dict[str, Any]:
    """``TASK``, ``TASK.FIGURE`` or ``TASK / key: value`` of an evaluation.

    Raises:
        UserError: it is not there; what is there is named.
    """
    known: dict[str, dict[str, Any]] = {}
    for task in summary["tasks"]:
        known[task["task"]] = task["figures"][task["metric"]]
        known |= {f"{task['task']}.{name}": figure for name, figure in task["figures"].items()}
        for key, parts in task["breakdowns"].items():
            known |= {f"{task['task']} / {key}: {value}": figure for value, figure in parts.items()}
    if wanted not in known:
        raise UserError(f"figure: the evaluation has no {wanted!r}; it has {', '.join(known)}")
    return known[wanted]


def _shown(figure: dict[str, Any]) -> str:
    if figure["value"] is None:
        return "- (n=0)"
    ends = "" if figure["low"] is None else f" [{figure['low']:.3f}, {figure['high']:.3f}]"
    return f"{figure['value']:.3f}{ends} n={figure['n']}"


def draw_sweep(figures: Path, picture: Path) -> None:
    """Draw ``sweep.json``: every training with its 95% interval, and the mean over the seeds."""
    from llmrecipes.evaluate.report.plots import save

    save(partial(_draw, found=json.loads(figures.read_text(encoding="utf-8"))), (7, 4.4), picture)


def _draw(figure: Any, found: dict[str, Any]) -> None:
    from llmrecipes.evaluate.report.plots import COLORS, label

    axis = figure.subplots()
    axis.set_xscale("log", base=2)
    axis.set_xlabel("examples of fine-tuning")
    axis.set_ylabel(label(found["figure"]))
    axis.grid(alpha=0.25)
    points = [point for point in found["points"] if point["value"] is not None]
    counts = sorted({point["examples"] for point in points})
    seeds = sorted({point["seed"] for point in points})
    for number, seed in enumerate(seeds):
        own = [point for point in points if point["seed"] == seed]
        # Beside each other, so that intervals do not cover each other.
        x = [point["examples"] * 2 ** (0.06 * (number - (len(seeds) - 1) / 2)) for point in own]
        ends = [[p["value"] - (p["value"] if p["low"] is None else p["low"]) for p in own]]
        ends += [[(p["value"] if p["high"] is None else p["high"]) - p["value"] for p in own]]
        color = COLORS[number % len(COLORS)]
        y = [p["value"] for p in own]
        axis.errorbar(
            x, y, yerr=ends, fmt="o", color=color, markersize=4, capsize=2, linewidth=0.8, label=f"seed {seed}"
        )
    means = [sum(v) / len(v) for c in counts if (v := [p["value"] for p in points if p["examples"] == c])]
    axis.plot(counts, means, color="0.3", linewidth=1, label="mean" if len(seeds) > 1 else None)
    axis.set_xticks(counts, [f"{count:,}" for count in counts])
    axis.minorticks_off()
    axis.legend(fontsize=8)

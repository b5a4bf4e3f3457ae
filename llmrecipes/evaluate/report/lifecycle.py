"""What each step from the seed to the preferences changed, in numbers: tables for the page and for the console.

All of it is read from the runs' own files: validations in metrics.jsonl (``checkpoint.validate_first`` writes the one
before the first step) and the summaries of ``llmrecipes evaluate``.
"""

from __future__ import annotations

import unicodedata
from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from llmrecipes.evaluate.report.gather import Run

EVERYTHING = "all"
LOSS = "val_loss"
FEW = 3  # a breakdown into more parts stays in the table of its evaluation
# Of a stage: the validation figures that say what it changed, and what they are.
FIGURES = {
    "RouterModule": {LOSS: "validation loss"},
    "SFTModule": {LOSS: "loss on answers not trained on"},
    "PreferenceModule": {
        LOSS: "validation loss",
        "val_logps/preferred": "share of pairs whose chosen answer is the likelier",
        "val_rewards/accuracies": "share of pairs with a margin above 0",
        "val_rewards/margins": "margin",
    },
}


@dataclass(frozen=True)
class Cell:
    """One figure.

    Attributes:
        text: as shown.
        own: of an expert: the domain is one that it was trained on.
        best: the lowest of all experts.
    """

    text: str
    own: bool = False
    best: bool = False

    def __str__(self) -> str:
        return self.text + ("*" if self.own else "")


@dataclass(frozen=True)
class Table:
    """Rows of figures.

    Attributes:
        heading, note: above and below it. columns: their names, the first is that of the rows' names.
    """

    heading: str
    columns: list[str]
    rows: list[list[Cell]]
    note: str = ""

    def __str__(self) -> str:
        """For a console."""
        lines = [self.columns, *([str(cell) for cell in row] for row in self.rows)]
        widths = [max(_width(line[i]) for line in lines) for i in range(len(self.columns))]
        shown = ["  ".join(_fill(text, width, i > 0) for i, (text, width) in enumerate(zip(line, widths, strict=True)))
                 for line in lines]  # fmt: skip
        return "\n".join([self.heading, *(f"  {line.rstrip()}" for line in shown), *([self.note] if self.note else [])])


def _width(text: str) -> int:
    return sum(2 if unicodedata.east_asian_width(letter) in "WF" else 1 for letter in text)


def _fill(text: str, width: int, right: bool) -> str:
    space = " " * (width - _width(text))
    return space + text if right else text + space


def lifecycle(runs: Sequence[Run]) -> list[Table]:
    """The tables that the runs have figures for."""
    return [table for table in (_domains(runs), _before_and_after(runs), *_answers(runs)) if table is not None]


# ---- experts on every domain


def _domains(runs: Sequence[Run]) -> Table | None:
    """Seed, experts and merged model on the same validation sets."""
    experts = [run for run in runs if _stage(run) == "LoraExpertModule" and len(_sets(run)) > 1]
    if not experts:
        return None
    same = [run for run in runs if _sets(run) == _sets(experts[0])]
    rows = list(_loss_rows([run for run in same if run in experts or _stage(run) != "LoraExpertModule"], experts))
    names = [name.partition("/")[2] for name in _last(experts[0]) if name.startswith(f"{LOSS}/")]
    keys = [*(f"{LOSS}/{name}" for name in names), LOSS]
    compared = [record for run, _, record in rows if run in experts]
    lowest = {key: min(record[key] for record in compared) for key in keys}
    table = []
    for run, title, record in rows:
        own = _own(run) if run is not None and run in experts else set[str]()
        cells = [
            Cell(_number(record[key]), key.partition("/")[2] in own, run in experts and record[key] == lowest[key])
            for key in keys
        ]
        table.append([Cell(title), *cells])
    won = [
        all(record[f"{LOSS}/{name}"] == lowest[f"{LOSS}/{name}"] for name in _own(run) & set(names))
        for run, _, record in rows
        if run is not None and run in experts
    ]
    note = f"*: the expert was trained on it. {sum(won)} of {len(won)} experts are the best expert on all of their own."
    return Table("Loss on every domain", ["model", *names, EVERYTHING], table, note)


def _loss_rows(runs: Sequence[Run], experts: Sequence[Run]) -> Iterator[tuple[Run | None, str, dict[str, Any]]]:
    """Models in the order of the life-cycle, each with a name and its validation; None: no run of its own."""
    first = _first(experts[0])
    seeds = [run for run in runs if _stage(run) == "PretrainModule" and _last(run)]
    if not seeds and first is not None:
        yield None, "seed", first
    for run in [*seeds, *(run for run in runs if run in experts)]:
        yield run, run.name, _last(run)
    for run in runs:
        if _stage(run) == "RouterModule" and _last(run):
            before = _first(run)
            if before is not None:
                yield run, f"{run.name}, random routers", before
            yield run, f"{run.name}, trained", _last(run)


def _own(run: Run) -> set[str]:
    return {Path(name).name for name in run.setting("data", "init_args", "train") or {}}


def _sets(run: Run) -> tuple[Any, ...]:
    """What decides the windows of a run's validation sets; () where they are not of shards."""
    data = run.setting("data", "init_args") or {}
    if not str(run.setting("data", "class_path")).endswith("PackedShards"):
        return ()
    rows = (data.get("valid_batches") or 0) * (data.get("micro_batch") or 0)
    same = (data.get("seq_len"), data.get("document_mask"), rows)
    if data.get("valid"):  # whole shards, whatever is trained on
        return (*sorted(data["valid"].items()), *same)
    shards = data.get("valid_from") or list(data.get("train") or {})
    return (*sorted(shards), data.get("split"), *same)


# ---- before and after


def _before_and_after(runs: Sequence[Run]) -> Table | None:
    rows = []
    for run in runs:
        before, after = _first(run), _last(run)
        if before is None or before is after:
            continue
        for key, what in FIGURES.get(_stage(run), {}).items():
            if before.get(key) is not None and after.get(key) is not None:
                rows.append([Cell(run.name), Cell(what), Cell(_number(before[key])), Cell(_number(after[key]))])
    if not rows:
        return None
    note = "Both on the same held-out data: before the first step, and at the end."
    return Table("Each stage, before and after", ["run", "figure", "before", "after"], rows, note)


# ---- answers


def _answers(runs: Sequence[Run]) -> Iterator[Table]:
    """The main figure of each task that several runs were asked, one table for each evaluation."""
    asked: dict[str, dict[str, dict[str, Any]]] = {}
    for run in runs:
        for summary in run.summaries:
            for task in summary["tasks"]:
                asked_of = task["figures"][task["metric"]]["n"]
                key = f"{summary['name']} / {task['task']}: {task['metric']}, {task['ask']}, {asked_of} asked"
                asked.setdefault(key, {})[run.name] = task | {"ended": _ended(summary["rows"][task["task"]])}
    asked = {key: of_run for key, of_run in asked.items() if len(of_run) > 1}
    for key, of_run in asked.items():
        rows = []
        parts = dict.fromkeys(
            (name, part)
            for task in of_run.values()
            for name, values in task["breakdowns"].items()
            if len(values) <= FEW
            for part in values
        )
        for name, task in of_run.items():
            figures = [task["figures"][task["metric"]]]
            figures += [task["breakdowns"].get(about, {}).get(part) for about, part in parts]
            rows.append([Cell(name), *(Cell(_with_interval(figure)) for figure in figures), Cell(task["ended"])])
        columns = ["run", EVERYTHING, *(part for _, part in parts), "ended by itself"]
        yield Table(key, columns, rows)


def _ended(rows: list[dict[str, Any]]) -> str:
    """Share of answers that the model ended: one that was never taught to stop looks like one that was, otherwise."""
    return f"{sum(row.get('finish') == 'eos' for row in rows) / len(rows):.3f}" if rows else "-"


def _with_interval(figure: dict[str, Any] | None) -> str:
    if figure is None or figure["value"] is None:
        return "-"
    low, high = figure["low"], figure["high"]
    ends = "" if low is None or high is None else f" ({low:.3f}-{high:.3f})"
    return f"{figure['value']:.3f}{ends}"


# ---- of runs


def _stage(run: Run) -> str:
    return str(run.setting("model", "class_path") or "").rpartition(".")[2]


def _first(run: Run) -> dict[str, Any] | None:
    """The validation before the first step, if it was made."""
    return next((record for record in run.validations if record["step"] == 0), None)


def _last(run: Run) -> dict[str, Any]:
    """The newest validation; {} where there is none."""
    return run.validations[-1] if run.validations else {}


def _number(value: float | None) -> str:
    return "-" if value is None else f"{value:.4f}"

"""The report: one HTML file with everything in it, and its pictures as PNG."""

from __future__ import annotations

import base64
import hashlib
import json
import time
from collections.abc import Sequence
from importlib.resources import files
from itertools import pairwise
from pathlib import Path
from typing import Any

from llmrecipes import __version__
from llmrecipes.errors import UserError
from llmrecipes.evaluate.report.along import draw_along
from llmrecipes.evaluate.report.gather import Run, lineage, read_runs, recipe_difference
from llmrecipes.evaluate.report.lifecycle import lifecycle
from llmrecipes.evaluate.report.plots import draw_all
from llmrecipes.evaluate.report.radar import draw_radar
from llmrecipes.evaluate.report.router_map import draw_routers
from llmrecipes.evaluate.report.scatter import AXES, draw_scatter

PAGE = "report.html"
LONGEST = 2000  # characters of a question or answer in the list; all of them are in answers.jsonl


def write_report(
    folders: list[Path],
    output: Path,
    title: str | None = None,
    references: Path | None = None,
    axes: Sequence[str] = AXES,
) -> Path:
    """Write the report.

    Args:
        folders: runs and evaluations.
        output: folder for ``report.html`` and the pictures.
        title: its heading.
        references, axes: see :func:`~llmrecipes.evaluate.report.scatter.draw_scatter`.

    Returns:
        The page.

    Raises:
        UserError: folders that hold nothing to report, or an output that is a file.
    """
    runs = read_runs(folders)
    if output.exists() and not output.is_dir():
        raise UserError(f"{output}: a file; name a folder with --output")
    output.mkdir(parents=True, exist_ok=True)
    pictures = draw_all(runs, output) + draw_along(runs, output) + draw_routers(runs, output)
    pictures += draw_radar(runs, output) + draw_scatter(runs, output, references, axes)
    page = output / PAGE
    temporary = page.with_name(f".{PAGE}")
    temporary.write_text(render(runs, pictures, title), encoding="utf-8")
    temporary.replace(page)
    return page


def render(runs: list[Run], pictures: list[tuple[str, str, Path]], title: str | None = None) -> str:
    """The page. Whatever runs and models wrote is text in it: escaped by jinja, or JSON shown by ``textContent``."""
    import jinja2
    from markupsafe import Markup

    here = files("llmrecipes.evaluate.report")
    script = here.joinpath("page.js").read_text(encoding="utf-8")
    digest = base64.b64encode(hashlib.sha256(script.encode()).digest()).decode()
    environment = jinja2.Environment(autoescape=True, undefined=jinja2.StrictUndefined)
    template = environment.from_string(here.joinpath("page.html").read_text(encoding="utf-8"))
    with_recipe = [run for run in runs if run.recipe]
    return template.render(
        title=title or " · ".join(run.name for run in runs),
        version=__version__,
        time=time.strftime("%Y-%m-%d %H:%M"),
        css=Markup(here.joinpath("page.css").read_text(encoding="utf-8")),
        script=Markup(script),
        script_hash=Markup(f"sha256-{digest}"),
        overview=[_overview(run) for run in with_recipe],
        pictures=[
            {"heading": heading, "text": text, "file": path.name, "data": base64.b64encode(path.read_bytes()).decode()}
            for heading, text, path in pictures
        ],
        effects=lifecycle(runs),
        lineages=[{"name": run.name, "chain": lineage(run)} for run in with_recipe],
        evaluations=[_evaluation(run, summary) for run in runs for summary in run.summaries],
        answers=Markup(_in_script(_answers(runs))),
        differences=[
            {"a": a.name, "b": b.name, "lines": "\n".join(recipe_difference(a.folder, b.folder)) or "none"}
            for a, b in pairwise(with_recipe)
        ],
    )


def _in_script(value: Any) -> str:
    """JSON that no text within can end the script element of, or open another."""
    text = json.dumps(value, ensure_ascii=False, separators=(",", ":"))
    for character in "<>&\u2028\u2029":
        text = text.replace(character, f"\\u{ord(character):04x}")
    # Half of a surrogate pair is no text for a file.
    return text.encode("utf-8", "replace").decode("utf-8")


def _overview(run: Run) -> dict[str, str]:
    last = run.steps[-1] if run.steps else {}
    valid = run.validations[-1] if run.validations else {}
    domains = {key.partition("/")[2]: value for key, value in valid.items() if key.startswith("val_loss/")}
    return {
        "name": run.name,
        "folder": str(run.folder),
        "steps": f"{last['step']:,}" if last else "-",
        "tokens": f"{last['tokens']:,}" if last else "-",
        "loss": _number(last.get("loss")),
        "val": _number(valid.get("val_loss")),
        "domains": ", ".join(f"{name} {_number(value)}" for name, value in domains.items()),
    }


def _number(value: float | None) -> str:
    return "-" if value is None else f"{value:.4f}"


def _evaluation(run: Run, summary: dict[str, Any]) -> dict[str, Any]:
    rows, notes = [], []
    for task in summary["tasks"]:
        named = [task["metric"], *(name for name in task["figures"] if name != task["metric"])]
        asked = task["ask"] + (f", {task['few_shots']}-shot" if task.get("few_shots") else "")
        rows += [_row(task["task"], asked, name, task["figures"][name]) for name in named]
        for key, parts in task["breakdowns"].items():
            rows += [_row(f"{task['task']} / {key}: {part}", "", named[0], f) for part, f in parts.items()]
        notes += [f"{task['task']}: {note}" for note in task["notes"]]
    return {
        "run": run.name,
        "name": summary["name"],
        "weights": summary["weights"],
        "average": summary["average"]["sentence"],
        "rows": rows,
        "notes": notes,
    }


def _row(task: str, asked: str, metric: str, figure: dict[str, Any]) -> dict[str, str]:
    low, high = figure["low"], figure["high"]
    ends = "-" if low is None or high is None else f"{low:.3f} - {high:.3f}"
    return {
        "task": task,
        "asked": asked,
        "metric": metric,
        "value": _number(figure["value"]),
        "interval": ends,
        "n": str(figure["n"]),
    }


def _answers(runs: list[Run]) -> dict[str, Any]:
    """All answers, each as few letters as can be: set, id, question, reference, answer, score, form ..."""
    sets, rows = list[str](), list[dict[str, Any]]()
    for run in runs:
        for summary in run.summaries:
            for task in summary["tasks"]:
                found = summary["rows"][task["task"]]
                if not found:
                    continue
                sets.append(f"{run.name} / {summary['name']} / {task['task']}")
                rows += [_listed(row, len(sets) - 1, task.get("scale", 1)) for row in found]
    return {"sets": sets, "rows": rows}


def _listed(row: dict[str, Any], number: int, scale: float) -> dict[str, Any]:
    """A row of the list; a score out of ``scale`` is shown as a share of it."""
    return {
        "s": number,
        "i": row["id"],
        "q": _short(row["question"]),
        "r": _short(row["reference"]),
        "x": _short(row["answer"]),
        "v": max(0.0, next(iter(row["scores"].values())) / scale),
        "o": row["obeys"],
        **({"j": _short(row["judgement"])} if row.get("judgement") else {}),
        "a": [f"{key}: {value}" for key, value in row["about"].items()],
    }


def _short(text: str) -> str:
    return text if len(text) <= LONGEST else text[: LONGEST - 1] + "…"

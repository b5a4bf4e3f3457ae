"""A task of lm-evaluation-harness, run through its API on a model of ours."""

from __future__ import annotations

import importlib.util
import logging
import re
from collections.abc import Sequence
from pathlib import Path
from typing import TYPE_CHECKING, Any

from llmrecipes.errors import UserError
from llmrecipes.evaluate.config import TaskConfig
from llmrecipes.evaluate.figures import Figure, Z, mean

if TYPE_CHECKING:
    from llmrecipes.inference.opened import Opened

INSTALL = "pip install 'llmrecipes[eval]'"


def check_harness(task: TaskConfig) -> str:
    """The name of a task within the harness.

    Raises:
        UserError: lm-evaluation-harness is not installed, or the file names no task.
    """
    if importlib.util.find_spec("lm_eval") is None:
        raise UserError(f"task {task.title}: kind lm_eval needs lm-evaluation-harness; {INSTALL}")
    if not is_task_file(task.file):
        return task.file
    found = re.search(
        r"(?m)^task:[ \t]*[\"']?([\w./-]+)[\"']?[ \t]*(#.*)?$", Path(task.file).read_text(encoding="utf-8")
    )
    if found is None:
        raise UserError(f"{task.file}: no task of lm-evaluation-harness: there is no line `task: NAME` in it")
    return found[1]


def is_task_file(name: str) -> bool:
    """Whether a task is given as a file; else it is the name of one of the harness's own, which needs its data."""
    return Path(name).suffix in (".yaml", ".yml")


def run_harness(opened: Opened, task: TaskConfig, batch_size: int) -> tuple[dict[str, Any], list[dict[str, Any]]]:
    """Figures and answers of a task.

    Args:
        opened: the model.
        task: of kind ``lm_eval``.
        batch_size: texts written side by side.

    Returns:
        The result, and a row for each document.

    Raises:
        UserError: the harness cannot make the task or ask the model, or a conversation has no template.
    """
    name = check_harness(task)
    from lm_eval.evaluator import simple_evaluate
    from lm_eval.tasks import TaskManager

    from llmrecipes.evaluate.harness_model import DecoderLM

    for source in ("lm_eval", "datasets", "huggingface_hub"):
        logging.getLogger(source).setLevel(logging.ERROR)
    local = is_task_file(task.file)
    chat = task.ask == "chat"
    model = DecoderLM(opened, batch_size, chat)
    if chat:
        model.chat_template(True)  # that there is none is said here, in our words
    try:
        manager = TaskManager(include_path=str(Path(task.file).parent) if local else None, include_defaults=not local)
        done = simple_evaluate(
            model,
            tasks=[name],
            num_fewshot=task.few_shots or None,
            limit=task.limit,
            task_manager=manager,
            bootstrap_iters=0,
            apply_chat_template=chat,
            fewshot_as_multiturn=chat,
        )
    except Exception as error:  # tasks are code and data of many authors
        reason = (str(error).strip().splitlines() or [""])[0][:300]
        raise UserError(
            f"task {task.title}: lm_eval cannot run {task.file}: {type(error).__name__}: {reason}"
        ) from error
    assert done is not None
    if name not in done["results"] or name not in done["samples"]:
        raise UserError(f"{task.file}: {name} is a group of tasks; name them one by one")
    rows = _rows(done["samples"][name])
    figures = _figures(done["results"][name], done["samples"][name])
    main = task.metric or next(iter(figures))
    if main not in figures:
        raise UserError(f"task {task.title}: no metric {main!r} in {task.file}; it has {', '.join(figures)}")
    result = {
        "task": task.title,
        "kind": task.kind,
        "ask": f"lm_eval {name}, chat" if chat else f"lm_eval {name}",
        "file": task.file,
        "category": task.group,
        "metric": main,
        "few_shots": done["n-shot"].get(name, task.few_shots),
        "n": len(rows),
        "figures": {key: figure.as_dict() for key, figure in figures.items()},
        "breakdowns": {},
        "notes": [
            *(
                [f"{model.shortened} requests were shortened on the left to {model.max_length} tokens"]
                * bool(model.shortened)
            )
        ],
    }
    return result, [{**row, "scores": _first(row["scores"], main)} for row in rows]


def _first(scores: dict[str, float], name: str) -> dict[str, float]:
    """The same scores, the one that stands for the task in front."""
    return {key: scores[key] for key in sorted(scores, key=lambda key: key != name)}


def _name(metric: str, filtered: str) -> str:
    return metric if filtered == "none" else f"{metric}, {filtered}"


def _figures(results: dict[str, Any], samples: Sequence[dict[str, Any]]) -> dict[str, Figure]:
    """Every metric as the harness has it; with an interval of ours where it is the mean over documents."""
    found = {}
    for key, value in results.items():
        metric, comma, filtered = key.partition(",")
        if not comma or metric.endswith("_stderr") or not isinstance(value, int | float):
            continue
        scores = [one.get(metric) for one in samples if one["filter"] == filtered]
        numbers = [float(score) for score in scores if isinstance(score, int | float)]
        figure = mean(numbers)
        if len(numbers) != len(scores) or figure.value is None or abs(figure.value - value) > 1e-9 * max(1, abs(value)):
            error = results.get(f"{metric}_stderr,{filtered}")
            figure = Figure(float(value), len(scores))
            if isinstance(error, int | float):
                half = Z * float(error)
                figure = Figure(float(value), len(scores), value - half, value + half, "stderr")
        found[_name(metric, filtered)] = figure
    return found


def _rows(samples: Sequence[dict[str, Any]]) -> list[dict[str, Any]]:
    """One row a document, whatever filters its answer went through."""
    rows: dict[int, dict[str, Any]] = {}
    for one in samples:
        scores = {_name(m, one["filter"]): float(one[m]) for m in one["metrics"] if isinstance(one.get(m), int | float)}
        number = one["doc_id"] + 1
        if number in rows:
            rows[number]["scores"] |= scores
            continue
        answer = _answer(one)
        rows[number] = {
            "id": number,
            "question": str(one["arguments"][0][0]),
            "reference": str(one["target"]),
            "answer": answer,
            "scores": scores or {"unscored": 0.0},
            "obeys": None,
            "output": answer,
            "finish": "",
            "examples": 0,
            "about": {},
        }
    return list(rows.values())


def _answer(sample: dict[str, Any]) -> str:
    """The text that was written, or the likeliest of the choices."""
    found = sample["filtered_resps"]
    if isinstance(found[0], str):
        return found[0]
    likely = [one[0] if isinstance(one, list | tuple) else one for one in found]
    best = max(range(len(likely)), key=lambda i: likely[i])
    arguments = sample["arguments"]
    text = str(arguments[best][1]).strip() if best < len(arguments) and len(arguments[best]) > 1 else ""
    return f"{text} ({likely[best]:.2f})"

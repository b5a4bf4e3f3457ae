"""``llmrecipes evaluate``: asks a model the questions of each task and writes down answers, scores and figures."""

from __future__ import annotations

import math
import sys
import time
from collections.abc import Callable, Sequence
from dataclasses import replace
from functools import cache
from pathlib import Path
from typing import Any

import torch
from tqdm import tqdm

from llmrecipes.convert.consolidate import find_checkpoint
from llmrecipes.errors import UserError
from llmrecipes.evaluate.average import average
from llmrecipes.evaluate.config import EvaluateConfig, TaskConfig
from llmrecipes.evaluate.figures import Figure, ratio
from llmrecipes.evaluate.harness import check_harness, run_harness
from llmrecipes.evaluate.mt_bench.questions import read_conversations
from llmrecipes.evaluate.mt_bench.run import run_mt_bench
from llmrecipes.evaluate.questions import READERS, Asked, Question, chat_message, prompt, read_task
from llmrecipes.evaluate.scoring import breakdowns, figures, score_one
from llmrecipes.evaluate.store import SUMMARY, Store, made_of, model_fingerprint, write_json
from llmrecipes.inference.generate_command import Request, write
from llmrecipes.inference.opened import Opened, open_model
from llmrecipes.inference.perplexity import score
from llmrecipes.inference.perplexity_command import window_of
from llmrecipes.inference.prompts import Prompt, make
from llmrecipes.inference.texts import read_documents
from llmrecipes.models import DecoderOutput, Sampling

ASKED = {*READERS, "llm_jp_eval"}  # kinds whose questions are asked here
STOPS = {"blank_line": ["\n\n"], "line": ["\n"], "none": []}


def evaluate(config: EvaluateConfig, output: Path) -> dict[str, Any]:
    """Measure every task, going on where a stopped evaluation left off.

    Args:
        config: the recipe.
        output: folder with one folder for each task and ``summary.json``.

    Returns:
        The summary.

    Raises:
        UserError: files or models that cannot be read, or answers of something else in the folder.
    """
    check_tasks(config)  # mistakes first
    place = Path(config.model)
    place = place if _is_folder_of_weights(place) else find_checkpoint(place)
    return measure(config, output, lambda: _open(config), str(place), model_fingerprint(place))


def check_tasks(config: EvaluateConfig) -> dict[str, Asked]:
    """The questions of the tasks that have some, by task.

    Raises:
        UserError: files that cannot be read.
    """
    for task in config.tasks:
        if task.kind == "lm_eval":
            check_harness(task)
        elif task.mt_bench is not None:
            read_conversations(task.file, task.mt_bench.references, task.limit)
    return {task.title: read_task(task) for task in config.tasks if task.kind in ASKED}


def measure(
    config: EvaluateConfig, output: Path, open_it: Callable[[], Opened], place: str, identity: str
) -> dict[str, Any]:
    """Measure every task of a model, going on where a stopped evaluation left off.

    Args:
        config: the recipe.
        output: see :func:`evaluate`.
        open_it: opens the model; called when there is something to ask.
        place: where its weights are.
        identity: tells its answers from those of others.
    """
    asked = check_tasks(config)
    how = {"template": config.template, "tokenizer": config.tokenizer, "dtype": config.dtype}
    stores = {
        task.title: Store(output / task.title, made_of(task, identity, how), config.overwrite) for task in config.tasks
    }
    opened = cache(open_it)
    results = []
    for task in config.tasks:
        store = stores[task.title]
        result = store.result
        if result is None:
            began = time.monotonic()
            result = _measure(opened, task, asked.get(task.title), store, config.batch_size)
            result["seconds"] = round(time.monotonic() - began, 1)
            store.finish(result)
        else:
            print(f"{task.title}: measured already ({store.folder})", file=sys.stderr)
        results.append(result)
        print(_line(result), flush=True)
    summary = _summary(config, place, identity, results)
    write_json(output / SUMMARY, summary)
    return summary


def _measure(
    opened: Callable[[], Opened], task: TaskConfig, asked: Asked | None, store: Store, batch_size: int
) -> dict[str, Any]:
    if task.kind == "perplexity":
        return _perplexity(opened(), task)
    if task.kind == "mt_bench":
        return run_mt_bench(opened, task, store, batch_size)
    if task.kind == "lm_eval":
        result, rows = run_harness(opened(), task, batch_size)
        store.replace(rows)
        return result
    assert asked is not None
    return _questions(opened(), task, asked, store, batch_size)


def _is_folder_of_weights(folder: Path) -> bool:
    return (folder / "config.json").is_file() or (folder / "model.yaml").is_file()


def _open(config: EvaluateConfig) -> Opened:
    opened = open_model(config.model, config.dtype, config.tokenizer, config.template)
    device = config.device
    if device == "auto":
        device = "cuda" if torch.cuda.is_available() else "cpu"
    if device == "cuda" and not torch.cuda.is_available():
        raise UserError("device: cuda, but torch finds no GPU here; write auto or cpu")
    return opened if device == "cpu" else replace(opened, model=opened.model.to(device))


# ---- questions


def _questions(opened: Opened, task: TaskConfig, asked: Asked, store: Store, batch_size: int) -> dict[str, Any]:
    rows = store.rows()
    todo = [question for question in asked.questions if question.id not in rows]
    prompts = {question.id: _prompt(opened, task, asked, question) for question in todo}
    todo.sort(key=lambda question: len(prompts[question.id][1]))  # little padding, and the ETA errs to one side
    request = Request(asked.max_new_tokens, Sampling(), STOPS[task.end])
    with tqdm(
        total=len(asked.questions), initial=len(rows), desc=task.title, unit="q", mininterval=_interval()
    ) as progress:
        for start in range(0, len(todo), batch_size):
            group = todo[start : start + batch_size]
            done = _ask(opened, task, asked, group, prompts, request)
            store.append(done)
            rows |= {row["id"]: row for row in done}
            progress.update(len(done))
    ordered = [rows[question.id] for question in asked.questions]
    found = figures(task, ordered)
    lost = sum(row["finish"] == "too_long" for row in ordered)
    fewer = sum(row["examples"] < len(asked.examples) for row in ordered)
    long = sum(row["finish"] == "length" for row in ordered)
    return {
        "task": task.title,
        "kind": task.kind,
        "ask": task.way,
        "file": task.file,
        "category": task.group,
        "metric": task.main_metric,
        "few_shots": task.few_shots,
        "max_new_tokens": asked.max_new_tokens,
        "n": len(ordered),
        "figures": {name: figure.as_dict() for name, figure in found.items()},
        "breakdowns": {
            key: {value: figure.as_dict() for value, figure in part.items()}
            for key, part in breakdowns(task, ordered).items()
        },
        "notes": [
            *([f"{lost} questions did not fit into the model's positions and count as unanswered"] if lost else []),
            *([f"{fewer} questions were asked with fewer examples, to fit into its positions"] if fewer else []),
            *([f"{long} of {len(ordered)} answers reached max_new_tokens {asked.max_new_tokens}"] if long else []),
        ],
    }


def _interval() -> float:
    """Seconds between two pictures of the progress: few lines in a log file."""
    return 0.5 if sys.stderr.isatty() else 30.0


def _prompt(opened: Opened, task: TaskConfig, asked: Asked, question: Question) -> tuple[Prompt, list[int], int]:
    """The prompt, its tokens and how many examples it shows; no tokens: it cannot be made to fit."""
    if task.way == "chat":
        found = make(chat_message(asked, question, task.kind), chat=True, system=None)
        return found, _if_it_fits(opened, opened.codec.chat(list(found.messages or ()))), 0
    if task.way == "cloze":
        found = Prompt(question.text)
        return found, _if_it_fits(opened, opened.codec.encode(question.text)), 0
    for examples in range(len(asked.examples), -1, -1):
        found = Prompt(prompt(asked, question, examples))
        ids = _if_it_fits(opened, opened.codec.encode(found.text), asked.max_new_tokens)
        if ids:
            return found, ids, examples
    return found, [], 0


def _if_it_fits(opened: Opened, ids: list[int], room: int = 1) -> list[int]:
    limit = opened.max_seq_len if opened.hard_limit else None
    return [] if limit is not None and len(ids) + room > limit else ids


def _ask(
    opened: Opened,
    task: TaskConfig,
    asked: Asked,
    group: Sequence[Question],
    prompts: dict[int, tuple[Prompt, list[int], int]],
    request: Request,
) -> list[dict[str, Any]]:
    fitting = [question for question in group if prompts[question.id][1]]
    written = write(opened, [prompts[q.id][0] for q in fitting], [prompts[q.id][1] for q in fitting], request)
    outputs = {question.id: (one.text, one.finish) for question, one in zip(fitting, written, strict=True)}
    rows = []
    for question in group:
        output, finish = outputs.get(question.id, ("", "too_long"))
        scored = score_one(task, question, output, asked.form)
        rows.append(
            {
                "id": question.id,
                "question": question.text,
                "reference": question.reference,
                **scored,
                "output": output,
                "finish": finish,
                "examples": prompts[question.id][2],
                "about": question.about,
            }
        )
    return rows


# ---- perplexity


def _perplexity(opened: Opened, task: TaskConfig) -> dict[str, Any]:
    documents = list(read_documents([], [task.file], task.field, task.limit))
    size, stride = window_of(opened.name, opened.max_seq_len, opened.hard_limit, None, None)
    scores = []
    routed = RoutedTokens()
    found = score(opened.model, opened.codec, documents, size, stride, opened.vocab_size, routed.add)
    for one in tqdm(found, total=len(documents), desc=task.title, unit="text", mininterval=_interval()):
        scores.append(one)
    total = sum(scores[1:], scores[0])
    bits = ratio([s.nats / math.log(2) for s in scores], [float(s.num_bytes) for s in scores])
    token = _exp(ratio([s.nats for s in scores], [float(s.tokens) for s in scores]))
    return {
        "task": task.title,
        "kind": task.kind,
        "ask": "score",
        "file": task.file,
        "category": None,
        "metric": "bits_per_byte",
        "n": len(scores),
        "figures": {"bits_per_byte": bits.as_dict(), "perplexity_per_token": token.as_dict()},
        "breakdowns": {},
        "counted": {"tokens": total.tokens, "characters": total.characters, "bytes": total.num_bytes},
        "notes": [f"windows of {size} tokens, stride {stride}"],
        **({"routing": routed.shares} if routed.shares else {}),
    }


class RoutedTokens:
    """Counts, over texts of one domain, how many tokens each router sent to each expert."""

    def __init__(self) -> None:
        self._counts: list[torch.Tensor] = []

    def add(self, output: DecoderOutput) -> None:
        """Take what the model gave for some texts."""
        counts = [routing.counts.to("cpu", torch.float64) for routing in output.routing]
        self._counts = [a + b for a, b in zip(self._counts, counts, strict=True)] if self._counts else counts

    @property
    def shares(self) -> list[list[float]]:
        """``[router][expert]``, each row adding up to 1; [] without experts or with routers of several sizes."""
        if len({len(count) for count in self._counts}) != 1:
            return []
        return [[round(float(x), 6) for x in count / count.sum().clamp_min(1)] for count in self._counts]


def _exp(figure: Figure) -> Figure:
    """A figure in nats as a perplexity."""
    value, low, high = (None if x is None or x > 700 else math.exp(x) for x in (figure.value, figure.low, figure.high))
    return Figure(value, figure.n, low, high, figure.interval)


# ---- the summary


def _summary(config: EvaluateConfig, place: str, identity: str, results: list[dict[str, Any]]) -> dict[str, Any]:
    scores = [
        (result["category"], result["figures"][result["metric"]]["value"])
        for result in results
        if result["category"] and result["figures"][result["metric"]]["value"] is not None
    ]
    mean = average(scores, config.strict)
    return {
        "model": config.model,
        "weights": place,
        "model_fingerprint": identity,
        "tasks": results,
        "average": {
            "value": mean.value,
            "categories": mean.categories,
            "missing": mean.missing,
            "strict": mean.strict,
            "sentence": mean.sentence(),
        },
    }


def _line(result: dict[str, Any]) -> str:
    main = result["metric"]
    names = [main, *(name for name in result["figures"] if name != main)]
    shown = "  ".join(f"{name} {Figure(**result['figures'][name])}" for name in names)
    return "\n".join([f"{result['task']}: {shown}", *(f"  note: {note}" for note in result["notes"])])

"""One model's MT-Bench: write the answers, have them judged, make the table. Both halves go on where they stopped."""

from __future__ import annotations

import sys
from collections.abc import Callable, Iterator
from concurrent.futures import FIRST_EXCEPTION, Future, ThreadPoolExecutor, wait
from typing import Any

from tqdm import tqdm

from llmrecipes.errors import UserError
from llmrecipes.evaluate.config import KINDS, TaskConfig
from llmrecipes.evaluate.mt_bench.config import JudgeConfig, MTBenchConfig
from llmrecipes.evaluate.mt_bench.cost import estimate
from llmrecipes.evaluate.mt_bench.endpoint import Endpoint, Messages, Unanswered
from llmrecipes.evaluate.mt_bench.judge_prompts import ask, judge_prompts
from llmrecipes.evaluate.mt_bench.questions import Conversation, read_conversations
from llmrecipes.evaluate.mt_bench.scores import NONE, Mark, by_category, figures, parse_mark, read_judgements
from llmrecipes.evaluate.store import WRITTEN, Store
from llmrecipes.inference.generate_command import Request, write
from llmrecipes.inference.opened import Opened, open_model
from llmrecipes.inference.prompts import Prompt
from llmrecipes.models import Sampling

HIGHEST = 10
Judgement = tuple[str, dict[str, int]]
Judge = Callable[[Messages], Judgement]


def run_mt_bench(open_it: Callable[[], Opened], task: TaskConfig, store: Store, batch_size: int) -> dict[str, Any]:
    """Figures of the task; its answers and judgements are in the store.

    Args:
        open_it: opens the model, when there is something left to write.
        task: of kind ``mt_bench``.
        store: its folder.
        batch_size: conversations held side by side.

    Raises:
        UserError: files that cannot be read, a judge that refuses, or one that could not be reached.
    """
    settings = task.mt_bench
    assert settings is not None
    conversations = read_conversations(task.file, settings.references, task.limit)
    longest = task.max_new_tokens or KINDS["mt_bench"][2]
    written = _write_all(open_it, conversations, settings, longest, store, task, batch_size)
    rows = _judge_all(conversations, written, settings, store, task.title)
    marks = [Mark(row["about"]["question"], row["turn"], row["about"]["category"], row["mark"]) for row in rows]
    lost, none = sum(row["finish"] == "too_long" for row in rows), sum(mark.score == NONE for mark in marks)
    return {
        "task": task.title,
        "kind": task.kind,
        "ask": "two turns",
        "file": task.file,
        "category": None,
        "metric": "score",
        "few_shots": 0,
        "max_new_tokens": longest,
        "n": len(rows),
        "scale": HIGHEST,
        "judge": settings.judge.model or settings.judge.file,
        "figures": {name: figure.as_dict() for name, figure in figures(marks).items()},
        "breakdowns": {"category": {name: figure.as_dict() for name, figure in by_category(marks).items()}},
        "notes": [
            f"judged by {settings.judge.model or settings.judge.file}; score is the mean of the categories' means",
            *([f"{none} of {len(rows)} judgements held no mark and count nowhere"] if none else []),
            *([f"{lost} turns did not fit into the model's positions: their answers are empty"] if lost else []),
        ],
    }


def row_id(one: Conversation, turn: int) -> int:
    """Of a turn: odd numbers are first turns."""
    return 2 * (one.number - 1) + turn


# ---- writing


def _write_all(
    open_it: Callable[[], Opened],
    conversations: list[Conversation],
    settings: MTBenchConfig,
    longest: int,
    store: Store,
    task: TaskConfig,
    batch_size: int,
) -> dict[int, dict[str, Any]]:
    """The answers of the model, by the number of the question."""
    rows = store.rows(WRITTEN)
    todo = [one for one in conversations if one.number not in rows]
    if not todo:
        return rows
    opened = open_it()
    todo.sort(key=lambda one: (settings.temperature(one.category), len(one.turns)))
    with tqdm(
        total=len(conversations), initial=len(rows), desc=task.title, unit="q", mininterval=_interval()
    ) as progress:
        while todo:
            same = (settings.temperature(todo[0].category), len(todo[0].turns))
            group = [one for one in todo[:batch_size] if (settings.temperature(one.category), len(one.turns)) == same]
            todo = todo[len(group) :]
            done = _hold(opened, group, same[0], longest, settings.seed)
            store.append(done, WRITTEN)
            rows |= {row["id"]: row for row in done}
            progress.update(len(done))
    return rows


def _hold(
    opened: Opened, group: list[Conversation], temperature: float, longest: int, seed: int
) -> list[dict[str, Any]]:
    """Conversations of equally many turns at one temperature, each with a generator of its own."""
    said: list[list[dict[str, str]]] = [[] for _ in group]
    rows: list[dict[str, Any]] = [{"id": one.number, "answers": [], "finish": []} for one in group]
    for turn in range(len(group[0].turns)):
        for messages, one in zip(said, group, strict=True):
            messages.append({"role": "user", "content": one.turns[turn]})
        ids = [opened.codec.chat(messages) for messages in said]
        limit = opened.max_seq_len if opened.hard_limit else None
        fits = [i for i, tokens in enumerate(ids) if limit is None or len(tokens) < limit]
        prompts = [Prompt(group[i].turns[turn], tuple(said[i])) for i in fits]
        seeds = [seed + row_id(group[i], turn + 1) for i in fits]
        request = Request(longest, Sampling(temperature=temperature), seeds=seeds)
        done = dict(zip(fits, write(opened, prompts, [ids[i] for i in fits], request), strict=True))
        for i, row in enumerate(rows):
            row["answers"].append(done[i].text.strip() if i in done else "")
            row["finish"].append(done[i].finish if i in done else "too_long")
            said[i].append({"role": "assistant", "content": row["answers"][turn]})
    return rows


# ---- judging


def _judge_all(
    conversations: list[Conversation],
    written: dict[int, dict[str, Any]],
    settings: MTBenchConfig,
    store: Store,
    title: str,
) -> list[dict[str, Any]]:
    """Every turn with its judgement, in order."""
    rows = store.rows()
    turns = [(one, turn) for one in conversations for turn in range(1, len(one.turns) + 1)]
    todo = [(one, turn) for one, turn in turns if row_id(one, turn) not in rows]
    if settings.judge.kind == "recorded":
        found = _recorded(settings.judge, todo)
        done = [_row(*key, written[key[0].number], "recorded", text, {}) for key, text in found]
        store.append(done)
        rows |= {row["id"]: row for row in done}
    elif todo:
        calls = _calls(todo, written, settings)
        for row in _ask_all(todo, calls, written, settings.judge, title, len(turns)):
            store.append([row])
            rows[row["id"]] = row
    return [rows[row_id(one, turn)] for one, turn in turns]


def _calls(
    todo: list[tuple[Conversation, int]], written: dict[int, dict[str, Any]], settings: MTBenchConfig
) -> list[tuple[str, Messages]]:
    prompts = judge_prompts(settings.prompts, settings.language)
    calls = []
    for one, turn in todo:
        with_reference = one.category in settings.with_reference
        if with_reference and len(one.reference) < turn:
            raise UserError(
                f"question {one.id} ({one.category}): no reference answer for turn {turn}; "
                "name a file in mt_bench.references, or take the category out of with_reference"
            )
        calls.append(ask(prompts, one, written[one.number]["answers"], turn, with_reference))
    return calls


def _ask_all(
    todo: list[tuple[Conversation, int]],
    calls: list[tuple[str, Messages]],
    written: dict[int, dict[str, Any]],
    config: JudgeConfig,
    title: str,
    total: int,
) -> Iterator[dict[str, Any]]:
    """Rows as the judgements come; those that came before a failure are given before it is raised."""
    expected = estimate(config, [messages for _, messages in calls])
    if config.kind == "endpoint":
        print(f"{title}: {expected.sentence()}", flush=True)
    if config.max_cost is not None and expected.cost is not None and expected.cost > config.max_cost:
        raise UserError(
            f"judge.max_cost {config.max_cost:g}: {expected.sentence()}; nothing was asked. Raise it, or set limit"
        )
    judge = Endpoint(config).judge if config.kind == "endpoint" else _local_judge(config)
    workers = config.workers if config.kind == "endpoint" else 1
    with ThreadPoolExecutor(workers) as pool:
        places = {pool.submit(judge, messages): i for i, (_, messages) in enumerate(calls)}
        waiting: set[Future[Judgement]] = set(places)
        with tqdm(
            total=total, initial=total - len(todo), desc=f"{title}: judging", mininterval=_interval()
        ) as progress:
            while waiting:
                done, waiting = wait(waiting, timeout=1.0, return_when=FIRST_EXCEPTION)
                failed = [future for future in done if future.exception() is not None]
                for future in done:
                    if future.exception() is None:
                        i = places[future]
                        progress.update(1)
                        yield _row(*todo[i], written[todo[i][0].number], calls[i][0], *future.result())
                if failed:
                    pool.shutdown(wait=False, cancel_futures=True)
                    yield from _finished(waiting, places, todo, written, calls)
                    _give_up(failed[0].exception())


def _finished(
    futures: set[Future[Judgement]],
    places: dict[Future[Judgement], int],
    todo: list[tuple[Conversation, int]],
    written: dict[int, dict[str, Any]],
    calls: list[tuple[str, Messages]],
) -> Iterator[dict[str, Any]]:
    """Judgements under way when another failed: they were paid for."""
    for future in futures:
        if not future.cancelled() and future.exception() is None:
            i = places[future]
            yield _row(*todo[i], written[todo[i][0].number], calls[i][0], *future.result())


def _give_up(error: BaseException | None) -> None:
    if isinstance(error, Unanswered):
        raise UserError(f"{error}; what was judged is kept: repeat the command to go on")
    assert error is not None
    raise error


def _local_judge(config: JudgeConfig) -> Callable[[Messages], Judgement]:
    """A model of a folder as the judge."""
    assert config.model is not None
    opened = open_model(config.model)

    def judge(messages: Messages) -> Judgement:
        request = Request(config.max_tokens, Sampling(temperature=config.temperature))
        ids = opened.codec.chat(messages)
        (done,) = write(opened, [Prompt(messages[-1]["content"], tuple(messages))], [ids], request)
        return done.text, {"prompt": len(ids), "completion": len(done.ids)}

    return judge


def _recorded(config: JudgeConfig, todo: list[tuple[Conversation, int]]) -> list[tuple[tuple[Conversation, int], str]]:
    """The judgement of each turn out of the file; the last one of a turn that was judged twice.

    Raises:
        UserError: the file is of several models and none is named, or it lacks a turn.
    """
    assert config.file is not None
    found = read_judgements(config.file)
    models = sorted({one["model"] for one in found})
    wanted = config.model if config.model is not None else models[0] if len(models) == 1 else None
    if wanted not in models:
        raise UserError(f"{config.file}: judges {', '.join(models) or 'nothing'}; name one of them in judge.model")
    texts = {(one["question"], one["turn"]): one["judgement"] for one in found if one["model"] == wanted}
    lacking = [f"{one.id} turn {turn}" for one, turn in todo if (one.id, turn) not in texts]
    if lacking:
        raise UserError(f"{config.file}: no judgement of question {', '.join(lacking[:8])} ({len(lacking)} in all)")
    return [((one, turn), texts[one.id, turn]) for one, turn in todo]


def _row(
    one: Conversation, turn: int, written: dict[str, Any], prompt: str, judgement: str, usage: dict[str, int]
) -> dict[str, Any]:
    mark = parse_mark(judgement)
    answer = written["answers"][turn - 1]
    return {
        "id": row_id(one, turn),
        "question": one.turns[turn - 1],
        "reference": one.reference[turn - 1] if len(one.reference) >= turn else "",
        "answer": answer,
        "scores": {"score": mark},
        "obeys": None,
        "output": answer,
        "finish": written["finish"][turn - 1],
        "examples": 0,
        "about": {"category": one.category, "turn": str(turn), "question": one.id},
        "turn": turn,
        "mark": mark,
        "judgement": judgement,
        "judge_prompt": prompt,
        "usage": usage,
    }


def _interval() -> float:
    """Seconds between two pictures of the progress: few lines in a log file."""
    return 0.5 if sys.stderr.isatty() else 30.0

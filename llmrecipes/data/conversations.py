"""Conversations from JSONL, in the shapes that people have them. Torch-free."""

from __future__ import annotations

import json
from collections.abc import Iterator
from pathlib import Path
from typing import Any

from llmrecipes.errors import UserError
from llmrecipes.lines import read_lines

Message = dict[str, str]
ROLES = ("system", "user", "assistant")
_SHAREGPT = {"human": "user", "user": "user", "gpt": "assistant", "assistant": "assistant", "system": "system"}
_PAIRS = (("input", "output"), ("prompt", "completion"), ("prompt", "response"), ("question", "answer"))
SHAPES = (
    '{"messages": [{"role", "content"}, ...]}, {"conversations": [{"from", "value"}, ...]}, '
    '{"instruction", "input", "output"}, ' + ", ".join(f'{{"{a}", "{b}"}}' for a, b in _PAIRS)
)
SHOWN = 20


def read_objects(path: str | Path) -> Iterator[tuple[int, dict[str, Any] | str]]:
    """Line number (from 1) and object of each line of a ``.jsonl``, ``.jsonl.gz`` or ``.jsonl.zst`` file.

    A line that is no JSON object comes as the reason, a string; empty lines are left out.

    Raises:
        UserError: the file is missing, or a broken archive.
    """
    try:
        for number, (raw, _) in enumerate(read_lines(Path(path)), 1):
            if raw.strip():
                yield number, _object(raw)
    except OSError as error:
        raise UserError(f"{path}: {error.strerror or error}") from None


def _object(raw: bytes) -> dict[str, Any] | str:
    try:
        value = json.loads(raw)
    except UnicodeDecodeError as error:
        return f"not UTF-8 at byte {error.start}"
    except (json.JSONDecodeError, RecursionError) as error:
        return (
            f"not JSON ({error.msg} at column {error.colno})" if isinstance(error, json.JSONDecodeError) else "nested"
        )
    return value if isinstance(value, dict) else f"a JSON {type(value).__name__}, but one object a line is expected"


def messages_of(record: dict[str, Any]) -> list[Message]:
    """The conversation in one record, whatever its shape.

    Raises:
        ValueError: none of the shapes, or something in it is no text; says what.
    """
    if "messages" in record:
        return check_messages(record["messages"], "messages")
    if "conversations" in record:
        return check_messages(_sharegpt(record["conversations"]), "conversations")
    if "instruction" in record and "output" in record:
        extra = record.get("input") or ""
        text = f"{record['instruction']}\n\n{extra}" if extra else record["instruction"]
        return _single(text, record["output"])
    for asked, answered in _PAIRS:
        if asked in record and answered in record:
            return _single(record[asked], record[answered])
    raise ValueError(f"fields {', '.join(list(record)[:8]) or 'none'}: no conversation in them; known are {SHAPES}")


def _single(asked: object, answered: object) -> list[Message]:
    return check_messages(
        [{"role": "user", "content": asked}, {"role": "assistant", "content": answered}], "the question and answer"
    )


def _sharegpt(turns: object) -> object:
    if not isinstance(turns, list) or not all(isinstance(turn, dict) for turn in turns):
        return turns
    return [{"role": _SHAREGPT.get(str(t.get("from")), str(t.get("from"))), "content": t.get("value")} for t in turns]


def check_messages(messages: object, name: str) -> list[Message]:
    """``messages`` as they are, if they are messages.

    Raises:
        ValueError: says what is wrong with them.
    """
    if not isinstance(messages, list) or not messages:
        raise ValueError(f"{name}: no list of messages")
    for place, message in enumerate(messages, 1):
        if not isinstance(message, dict) or not isinstance(message.get("role"), str):
            raise ValueError(f'{name}: message {place} is not like {{"role": "user", "content": "..."}}')
        if message["role"] not in ROLES:
            raise ValueError(f"{name}: message {place} has role {message['role']!r}; known are {', '.join(ROLES)}")
        if not isinstance(message.get("content"), str):
            raise ValueError(f"{name}: the content of message {place} is no text")
    return [{"role": m["role"], "content": m["content"]} for m in messages]


def read_conversations(path: str | Path) -> list[tuple[int, list[Message]]]:
    """Line number and messages of every conversation of a file.

    Raises:
        UserError: the lines that hold none (the first of them), or the file is empty.
    """
    found: list[tuple[int, list[Message]]] = []
    problems: list[str] = []
    for number, record in read_objects(path):
        try:
            if isinstance(record, str):
                raise ValueError(record)
            found.append((number, messages_of(record)))
        except ValueError as error:
            problems.append(f"{path}:{number}: {error}")
    refuse(path, problems, bool(found), "conversation")
    return found


def refuse(path: str | Path, problems: list[str], any_found: bool, what: str) -> None:
    """Raise the first problems of a file, and how many more there are; or that there is nothing in it."""
    if len(problems) > SHOWN:
        problems = [*problems[:SHOWN], f"{path}: and {len(problems) - SHOWN} more lines like these"]
    if not problems and not any_found:
        problems = [f"{path}: no {what} in it"]
    if problems:
        raise UserError(*problems)

"""Prompts from the command line, a file or standard input. Torch-free."""

from __future__ import annotations

import json
from dataclasses import dataclass
from pathlib import Path

from llmrecipes.errors import UserError
from llmrecipes.inference.texts import not_text, read_lines

Message = dict[str, str]


@dataclass(frozen=True)
class Prompt:
    """A text to continue, or a conversation to answer.

    Attributes:
        text: the prompt; of a conversation its last message.
        messages: the conversation so far, or None.
    """

    text: str
    messages: tuple[Message, ...] | None = None


def collect(given: list[str], file: str | None, field: str, chat: bool, system: str | None) -> list[Prompt]:
    """Prompts of the command line, then those of the file.

    Args:
        given: each ``--prompt``.
        file: one prompt a line, or JSONL with ``field`` (with ``chat`` also ``messages``).
        field: name of the prompt in a JSON line.
        chat: each prompt is what a user says.
        system: first message of every conversation that has none of its own.

    Raises:
        UserError: every prompt that is empty or cannot be read.
    """
    problems: list[str] = []
    prompts = []
    for number, text in enumerate(given, 1):
        reason = not_text(text) if text else "empty; give at least one character to continue"
        if reason:
            problems.append(f"--prompt (number {number}): {reason}")
        else:
            prompts.append(make(text, chat, system))
    for where, line in read_lines(Path(file)) if file else ():
        try:
            prompts.append(_of_line(line, Path(file or ""), field, chat, system))
        except ValueError as error:
            problems.append(f"{where}: {error}")
    if file and not prompts and not problems:
        problems.append(f"{file}: no prompts in it")
    if problems:
        raise UserError(*problems)
    return prompts


def make(text: str, chat: bool, system: str | None) -> Prompt:
    """A prompt from its text."""
    if not chat:
        return Prompt(text)
    first = [{"role": "system", "content": system}] if system else []
    return Prompt(text, (*first, {"role": "user", "content": text}))


def is_jsonl(path: Path) -> bool:
    """Whether the name says that each line is a JSON object."""
    return Path(path.name.removesuffix(".gz").removesuffix(".zst")).suffix in (".jsonl", ".json")


def _of_line(line: str, file: Path, field: str, chat: bool, system: str | None) -> Prompt:
    if not is_jsonl(file):
        return make(line, chat, system)
    try:
        record = json.loads(line)
    except json.JSONDecodeError as error:
        raise ValueError(f"not JSON ({error.msg} at column {error.colno}); mend or remove the line") from None
    if not isinstance(record, dict):
        raise ValueError(f"a JSON {type(record).__name__}, but one object a line is expected")
    if reason := not_text(json.dumps(record, ensure_ascii=False)):
        raise ValueError(reason)
    if chat and "messages" in record:
        return _conversation(record["messages"], system)
    text = record.get(field)
    if field not in record:
        has = ", ".join(list(record)[:8]) or "none"
        raise ValueError(f"no field {field!r} (fields here: {has}); name the right one with --field")
    if not isinstance(text, str) or not text:
        raise ValueError(f"field {field!r} is no text to continue; give at least one character")
    return make(text, chat, system)


def _conversation(messages: object, system: str | None) -> Prompt:
    if not isinstance(messages, list) or not messages:
        raise ValueError("'messages' is no list of messages")
    for message in messages:
        parts = isinstance(message, dict) and [message.get("role"), message.get("content")]
        if not parts or not all(isinstance(part, str) for part in parts):
            raise ValueError('every message is {"role": "...", "content": "..."}')
    if system and messages[0]["role"] != "system":
        messages = [{"role": "system", "content": system}, *messages]
    return Prompt(messages[-1]["content"], tuple(messages))

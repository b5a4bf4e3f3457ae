"""Conversations to be held, with the reference answers of some. Torch-free."""

from __future__ import annotations

import json
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from llmrecipes.errors import UserError
from llmrecipes.inference.texts import read_lines


@dataclass(frozen=True)
class Conversation:
    """What a user says.

    Attributes:
        id: as the file names it.
        number: of its line, from 1: it stays the same whatever is left out.
        category: groups questions in the table.
        turns: one or two messages.
        reference: good answers to the turns; () where there are none.
    """

    id: str
    number: int
    category: str
    turns: tuple[str, ...]
    reference: tuple[str, ...] = ()


def read_conversations(file: str, references: str | None, limit: int | None = None) -> list[Conversation]:
    """The questions, with the references of their own file or of ``references``.

    Raises:
        UserError: every line that is no question or reference.
    """
    problems: list[str] = []
    given = _references(Path(references), problems) if references else {}
    found: list[Conversation] = []
    for number, (where, line) in enumerate(read_lines(Path(file)), 1):
        try:
            record = json.loads(line)
            turns = tuple(str(turn) for turn in record["turns"])
            if not 1 <= len(turns) <= 2:
                raise ValueError(f"{len(turns)} turns, but MT-Bench has one or two")
            name = str(record["question_id"])
            reference = given.get(name, _texts(record.get("reference", ())))
            found.append(Conversation(name, number, str(record.get("category", "all")), turns, reference))
        except (ValueError, KeyError, TypeError) as error:
            what = f"no field {error}" if isinstance(error, KeyError) else str(error)
            problems.append(f"{where}: no question of MT-Bench: {what}; it has question_id, category and turns")
    names = [one.id for one in found]
    problems += [
        f"{file}: question_id {name} stands there twice" for name in sorted({n for n in names if names.count(n) > 1})
    ]
    if problems:
        raise UserError(*problems[:10])
    if not found:
        raise UserError(f"{file}: no questions in it")
    return found[:limit]


def _texts(value: Any) -> tuple[str, ...]:
    return (value,) if isinstance(value, str) else tuple(str(text) for text in value)


def _references(path: Path, problems: list[str]) -> dict[str, tuple[str, ...]]:
    found = {}
    for where, line in read_lines(path):
        try:
            record = json.loads(line)
            texts = record["choices"][0]["turns"] if "choices" in record else record["reference"]
            found[str(record["question_id"])] = _texts(texts)
        except (ValueError, KeyError, TypeError, IndexError) as error:
            problems.append(f"{where}: no reference answer ({error}); it has question_id and choices or reference")
    return found

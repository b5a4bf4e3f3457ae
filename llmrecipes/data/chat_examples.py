"""Conversations as ids, with the positions that are trained on: the assistant's words and the piece that ends them."""

from __future__ import annotations

from collections import Counter
from collections.abc import Sequence
from dataclasses import dataclass, field
from typing import Literal, NamedTuple

import numpy as np

from llmrecipes.data.chat_template import ChatTemplate
from llmrecipes.data.conversations import Message
from llmrecipes.data.tokenizer import Tokenizer
from llmrecipes.errors import UserError

Turns = Literal["all", "last"]


class Example(NamedTuple):
    """One conversation.

    Attributes:
        ids: [n] int32. trained: [n] bool, True where the id is one to be predicted.
    """

    ids: np.ndarray
    trained: np.ndarray


@dataclass
class Counts:
    """What became of the conversations of a file.

    Attributes:
        dropped: why some are no examples. notes: what was done to some of the others.
    """

    dropped: Counter[str] = field(default_factory=Counter)
    notes: Counter[str] = field(default_factory=Counter)

    def drop(self, why: str) -> None:
        """Count one that is left out."""
        self.dropped[why] += 1

    def in_words(self, total: int) -> list[str]:
        """Lines for the log."""
        lines = [f"{number:,} of {total:,} dropped: {why}" for why, number in self.dropped.most_common()]
        return lines + [f"{number:,} {what}" for what, number in self.notes.most_common()]


class ChatEncoder:
    """Turns conversations into examples.

    The ids of a prompt are those that generation computes for it, so that training and use see the same.

    Args:
        template, tokenizer: how a conversation is spelled.
        seq_len: positions per row; whole turns beyond are cut off.
        turns: assistant turns that are trained on: ``all``, or the ``last`` of each conversation.
    """

    def __init__(self, template: ChatTemplate, tokenizer: Tokenizer, seq_len: int, turns: Turns = "all") -> None:
        self.template, self.tokenizer, self.seq_len, self.turns = template, tokenizer, seq_len, turns
        self._stop = self._stop_ids()

    def _stop_ids(self) -> set[int]:
        """Ids at which generation stops: the tokenizer's EOS, and what the tokenizer's configuration calls so."""
        named = self.template.special.get("eos_token")
        found = None if not named else self.tokenizer.piece_id(named)
        return {self.tokenizer.eos_id} if found is None else {found}

    def encode(self, messages: Sequence[Message], counts: Counts) -> Example | None:
        """The example of a conversation; None when it is dropped, and ``counts`` says why.

        Raises:
            UserError: the template cannot be trained with.
        """
        asked = [i for i, message in enumerate(messages) if message["role"] == "assistant"]
        if not asked:
            counts.drop("no assistant turn")
            return None
        if any(not messages[turn]["content"].strip() for turn in asked):
            counts.drop("an empty answer")
            return None
        ids: list[int] = []
        trained: list[bool] = []
        for turn in asked if self.turns == "all" else asked[-1:]:
            prompt, answer = self._turn(messages, turn, ids, counts)
            if len(prompt) + len(answer) - 1 > self.seq_len:
                if ids:
                    counts.notes["cut after the last turn that fits"] += 1
                break
            end = self._end(answer, messages[turn]["content"])
            trained += [False] * (len(prompt) - len(ids)) + [True] * end + [False] * (len(answer) - end)
            ids = prompt + answer
        if not ids:
            counts.drop(f"its first trained answer ends beyond seq_len {self.seq_len}")
            return None
        if len(ids) > 1 and ids[0] == ids[1] and ids[0] in self._bos_ids():
            raise UserError(
                f"the chat template of {self.template.where} and the tokenizer both begin a text with "
                f"{self.tokenizer.piece(ids[0])!r}: twice the same piece; take it out of the template"
            )
        return Example(np.array(ids, np.int32), np.array(trained, bool))

    def _bos_ids(self) -> set[int]:
        named = self.template.special.get("bos_token")
        found = self.tokenizer.piece_id(named) if named else None
        return set() if found is None else {found}

    def _turn(
        self, messages: Sequence[Message], turn: int, before: list[int], counts: Counts
    ) -> tuple[list[int], list[int]]:
        """Ids up to where the assistant speaks, and of what it says with all that the template puts after it."""
        asked = self.template.text(messages[:turn], reply=True)
        whole = self.template.text(messages[: turn + 1], reply=False)
        if not whole.startswith(asked):
            raise UserError(
                f"the chat template of {self.template.where} writes the text before an answer differently once the "
                "answer is there: what is trained would not be what is used; give another with data.template"
            )
        prompt, answer = self.tokenizer.encode_marked(asked), []
        together = self.tokenizer.encode_marked(whole)
        if together[: len(prompt)] == prompt:
            answer = together[len(prompt) :]
        else:  # a piece spans the border, which generation can never produce: it begins after the prompt's last piece
            counts.notes["answer encoded apart from its prompt"] += 1
            answer = self.tokenizer.encode_marked(whole[len(asked) :])
        if prompt[: len(before)] != before:
            raise UserError(
                f"the chat template of {self.template.where} rewrites earlier turns: they cannot be trained on in one "
                "pass; set data.turns: last, or give another template"
            )
        return prompt, answer

    def _end(self, answer: list[int], text: str) -> int:
        """How many ids of an answer are trained on: up to the piece that stops generation, it included."""
        for place in reversed(range(len(answer))):
            if answer[place] in self._stop:
                return place + 1
        names = ", ".join(repr(self.tokenizer.piece(i)) for i in sorted(self._stop))
        raise UserError(
            f"the chat template of {self.template.where} does not end an answer ({text[:20]!r}...) with {names}, at "
            "which generation stops: the model would never learn to stop; add {{ eos_token }} after the answer in the "
            "template, or name one with data.template"
        )


def best_fit(lengths: np.ndarray, capacity: int) -> list[list[int]]:
    """Rows of examples that together fill at most ``capacity`` positions: best-fit decreasing (2404.10830).

    ``lengths`` [N], each at most ``capacity``. Deterministic: equal lengths go in the order of their numbers.
    """
    rows: list[list[int]] = []
    by_room: dict[int, list[int]] = {}  # room left -> rows
    rooms = np.zeros(capacity + 1, bool)
    for number in np.argsort(-lengths, kind="stable").tolist():
        length = int(lengths[number])
        fits = int(rooms[length:].argmax()) + length if rooms[length:].any() else None
        if fits is None:
            row, room = len(rows), capacity
            rows.append([])
        else:
            row, room = by_room[fits].pop(), fits
            rooms[fits] = bool(by_room[fits])
        rows[row].append(number)
        by_room.setdefault(room - length, []).append(row)
        rooms[room - length] = True
    return rows

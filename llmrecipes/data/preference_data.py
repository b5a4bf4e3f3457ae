"""Preferences as a LightningDataModule: two answers to one prompt, the chosen one and the rejected."""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import dataclass
from typing import Any

import numpy as np
import torch
from torch import Tensor

from llmrecipes.data.batch import IGNORE, Batch
from llmrecipes.data.chat_data import ConversationData, Encoded, ExampleRows, at_line
from llmrecipes.data.chat_examples import ChatEncoder, Counts, Example
from llmrecipes.data.conversations import Message, check_messages, read_objects, refuse


@dataclass
class PreferenceBatch(Batch):
    """Rows of pairs: of each pair first the chosen conversation, then the rejected.

    Attributes:
        pairs: per row, the number of each of its pairs among all pairs of the data set.
        answers: per row, the trained positions of its conversations: chosen, rejected, chosen, ...
    """

    pairs: list[list[int]] | None = None
    answers: list[list[int]] | None = None

    def to(self, device: torch.device | str, non_blocking: bool = False) -> PreferenceBatch:
        """The batch on another device; Lightning calls this."""
        return self.of(super().to(device, non_blocking), self.pairs, self.answers)

    def rows(self, start: int, stop: int) -> PreferenceBatch:
        """Rows start .. stop - 1 (a micro-batch), without copying."""
        assert self.pairs is not None and self.answers is not None
        return self.of(super().rows(start, stop), self.pairs[start:stop], self.answers[start:stop])

    @staticmethod
    def of(batch: Batch, pairs: list[list[int]] | None, answers: list[list[int]] | None) -> PreferenceBatch:
        """A batch whose rows hold these pairs."""
        return PreferenceBatch(
            batch.tokens,
            batch.labels,
            batch.document_lengths,
            batch.token_mask,
            batch.first_row,
            batch.document_prefixes,
            pairs,
            answers,
        )

    @property
    def pair_numbers(self) -> list[int]:
        """Of all pairs in the batch, row after row."""
        return [number for row in self.pairs or [] for number in row]

    @property
    def answer_lengths(self) -> list[int]:
        """Trained positions of each conversation, row after row."""
        return [length for row in self.answers or [] for length in row]

    def counts(self) -> dict[str, Tensor]:
        """``pairs`` too."""
        counts = super().counts()
        return counts | {"pairs": torch.full_like(counts["targets"], len(self.pair_numbers))}


class PreferencePairs(ConversationData):
    """Pairs of answers for DPO and its relatives, in an order that depends on (seed, step) only.

    A line is ``{"prompt", "chosen", "rejected"}``, each a text or a list of messages; without ``prompt`` the other two
    are whole conversations that begin alike. The last answer of each is what is compared.

    Args:
        train: JSONL file -> weight by tokens, on any positive scale.
        tokenizer: folder of the tokenizer, with its chat template unless ``template`` names one.
        seq_len: positions per row; a pair must fit into one.
        micro_batch: rows that pass through the model at once.
        global_batch: rows per optimizer step over all data ranks.
        template: ``instruction_ja``, ``alpaca``, ``chatml`` or a jinja file; ``null`` = the tokenizer's own.
        pack: put pairs that fit together into one row; false = one pair per row.
        share_prompts: compute what both answers of a pair follow once, not twice.
        valid: name -> JSONL file of a validation set, used whole. ``null``: the validation part of each train file.
        split: shares of training and validation pairs of each train file, drawn once and for all.
        seed: of the data order; independent of the model's.
        valid_batches: at most so many batches of ``micro_batch`` rows per validation set, over all ranks together.
        cache: folder where encoded files are kept for the next launch.
    """

    size = 2

    def __init__(
        self,
        train: dict[str, float],
        tokenizer: str,
        seq_len: int,
        micro_batch: int,
        global_batch: int,
        template: str | None = None,
        pack: bool = True,
        share_prompts: bool = True,
        valid: dict[str, str] | None = None,
        split: str = "95,5",
        seed: int = 0,
        valid_batches: int = 16,
        cache: str = "data/cache",
    ) -> None:
        super().__init__(
            train,
            tokenizer,
            seq_len,
            micro_batch,
            global_batch,
            template,
            "last",
            pack,
            valid,
            split,
            seed,
            valid_batches,
            cache,
        )
        self.share_prompts = share_prompts

    def fingerprint(self) -> dict[str, Any]:
        """All that decides which tokens step s sees."""
        return super().fingerprint() | {"share_prompts": self.share_prompts}

    def shared(self, encoded: Encoded) -> np.ndarray:
        """How many first ids of each conversation are left out, because the one before it has them, [conversations].

        Of a rejected answer's: all but the last id of what it has in common with the chosen one's, whose prediction is
        its own.
        """
        left_out = super().shared(encoded)
        if self.share_prompts:
            for rejected in range(1, len(left_out), 2):
                left_out[rejected] = common_prompt(*(_conversation(encoded, i) for i in (rejected - 1, rejected))) - 1
        return left_out

    def read(self, path: str, encoder: ChatEncoder, counts: Counts) -> Iterator[list[Example] | None]:
        """One pair a line."""
        problems: list[str] = []
        any_found = False
        for number, record in read_objects(path):
            try:
                if isinstance(record, str):
                    raise ValueError(record)
                sides = pair_of(record)
            except ValueError as error:
                problems.append(f"{path}:{number}: {error}")
                continue
            any_found = True
            with at_line(path, number):
                yield self._pair(sides, encoder, counts)
        refuse(path, problems, any_found, "pair")

    def _pair(self, sides: list[list[Message]], encoder: ChatEncoder, counts: Counts) -> list[Example] | None:
        if sides[0] == sides[1]:
            counts.drop("chosen and rejected are the same")
            return None
        one = Counts()
        pair = [encoder.encode(side, one) for side in sides]
        if None in pair:
            counts.drop(next(iter(one.dropped)))
        elif self._positions([side for side in pair if side]) > self.seq_len:
            counts.drop(f"chosen and rejected together are longer than seq_len {self.seq_len}")
        else:
            counts.notes += one.notes
            return [side for side in pair if side is not None]
        return None

    def _positions(self, pair: list[Example]) -> int:
        """Positions that a pair takes in a row."""
        both = sum(len(side.ids) - 1 for side in pair)
        return both - (common_prompt(*pair) - 1 if self.share_prompts else 0)

    @property
    def num_pairs(self) -> int:
        """Pairs of all files, training and validation."""
        return sum((len(encoded.starts) - 1) // 2 for encoded in self._encoded.values())

    def _first_pair(self, source: ExampleRows) -> int:
        """Number of the first pair of a source's file among all."""
        before = 0
        for encoded in self._encoded.values():
            if encoded is source.encoded:
                return before
            before += (len(encoded.starts) - 1) // 2
        raise AssertionError("a source without a file")

    def _collate(self, sources: list[ExampleRows], source: np.ndarray, window: np.ndarray) -> PreferenceBatch:
        batch = super()._collate(sources, source, window)
        rows = [(sources[s], w) for s, w in zip(source.tolist(), window.tolist(), strict=True)]
        pairs = [(self._first_pair(rows_of) + rows_of.rows[w]).tolist() for rows_of, w in rows]
        answers = []
        for labels, documents, numbers in zip(batch.labels, batch.document_lengths or [], pairs, strict=True):
            answers.append([int((part != IGNORE).sum()) for part in labels.split(documents)[: 2 * len(numbers)]])
        return PreferenceBatch.of(batch, pairs, answers)

    def blank(self, batch: Batch, rows: np.ndarray) -> None:
        """Leave nothing to be scored in ``rows``, a mask [B]."""
        super().blank(batch, rows)
        assert isinstance(batch, PreferenceBatch) and batch.pairs is not None and batch.answers is not None
        for row in rows.nonzero()[0].tolist():
            batch.pairs[row], batch.answers[row] = [], []

    def all_rows(self) -> list[tuple[ExampleRows, int]]:
        """Every row of every source, training and validation."""
        sources = [*self._train_sources, *self._valid_sources.values()]
        return [(source, row) for source in sources for row in range(len(source))]

    def batch_of(self, rows: list[tuple[ExampleRows, int]]) -> PreferenceBatch:
        """These rows as a batch."""
        sources = [source for source, _ in rows]
        return self._collate(sources, np.arange(len(rows)), np.array([row for _, row in rows]))


def common_prompt(chosen: Example, rejected: Example) -> int:
    """How many first ids two conversations share, before the first that is trained on; at least 1."""
    longest = min(int(side.trained.argmax()) for side in (chosen, rejected))
    differs = chosen.ids[:longest] != rejected.ids[:longest]
    return max(1, int(differs.argmax()) if differs.any() else longest)


def _conversation(encoded: Encoded, number: int) -> Example:
    part = slice(encoded.starts[number], encoded.starts[number + 1])
    return Example(encoded.ids[part], encoded.trained[part])


def pair_of(record: dict[str, Any]) -> list[list[Message]]:
    """The conversations that end with the chosen and with the rejected answer.

    Raises:
        ValueError: it is no pair; says what is wrong.
    """
    missing = [name for name in ("chosen", "rejected") if name not in record]
    if missing:
        has = ", ".join(list(record)[:8]) or "none"
        raise ValueError(f"no field {' and '.join(map(repr, missing))} (fields here: {has})")
    prompt = _messages(record["prompt"], "user", "prompt") if "prompt" in record else []
    sides = [prompt + _messages(record[name], "assistant", name) for name in ("chosen", "rejected")]
    for name, side in zip(("chosen", "rejected"), sides, strict=True):
        if side[-1]["role"] != "assistant":
            raise ValueError(f"{name}: does not end with what the assistant says")
        if len(side) < 2:
            raise ValueError(f"{name}: an answer without a prompt; give a field 'prompt'")
    if sides[0][:-1] != sides[1][:-1]:
        raise ValueError("chosen and rejected answer different prompts")
    return sides


def _messages(value: object, role: str, name: str) -> list[Message]:
    return check_messages([{"role": role, "content": value}] if isinstance(value, str) else value, name)

"""How the recipe's own data fill a micro-batch: borders of documents, shared prompts, labels.

The rows of a micro-batch are no plain rows of text: attention runs document by document and puts the results together
again, answers to one prompt copy what they share of it, and only tokens with a label have logits. All of it is memory.
"""

from __future__ import annotations

import logging
import warnings
from collections.abc import Iterator, Sequence
from dataclasses import dataclass, replace
from itertools import islice
from pathlib import Path
from typing import TYPE_CHECKING, Any

from llmrecipes.errors import UserError
from llmrecipes.recipe import checked_recipe

if TYPE_CHECKING:
    from llmrecipes.data.batch import Batch
    from llmrecipes.plan.job import Job

_KINDS = ("PackedShards", "ChatExamples", "PreferencePairs")
# Looked at: the micro-batches of the first steps, and of a file of conversations the first ones.
_MICRO_BATCHES, _STEPS, _CONVERSATIONS = 32, 8, 2000


@dataclass(frozen=True)
class Row:
    """One row of a micro-batch.

    Attributes:
        documents: their lengths, which sum to the row's. prefixes: of the document before it that each goes on from.
        labels: positions that have one.
    """

    documents: tuple[int, ...]
    prefixes: tuple[int, ...]
    labels: int


@dataclass(frozen=True)
class Layout:
    """The rows of one micro-batch.

    Attributes:
        rows: one each. masked: whether padding is told from real tokens.
        assumed: why it is not taken from the data; empty where it is.
    """

    rows: tuple[Row, ...]
    masked: bool = False
    assumed: str = ""

    @property
    def documents(self) -> list[list[int]]:
        """Per row, the lengths of its documents."""
        return [list(row.documents) for row in self.rows]

    @property
    def prefixes(self) -> list[list[int]] | None:
        """Per row, what each of its documents goes on from; None = none does."""
        return [list(row.prefixes) for row in self.rows] if any(any(row.prefixes) for row in self.rows) else None

    @property
    def cut(self) -> bool:
        """Whether attention runs document by document: for all rows, or for none."""
        return any(len(row.documents) > 1 for row in self.rows)

    @property
    def labels(self) -> int:
        """Positions that have one, at least 1."""
        return max(1, sum(row.labels for row in self.rows))

    @property
    def share(self) -> float:
        """Of all positions, those that have a label."""
        return self.labels / sum(sum(row.documents) for row in self.rows)

    def of(self, rows: int) -> Layout:
        """As many rows, the first ones, again from the beginning where there are not enough."""
        return replace(self, rows=tuple(self.rows[i % len(self.rows)] for i in range(rows)))

    def labelled(self, share: float) -> Layout:
        """The same rows with another share of labels."""
        rows = tuple(replace(row, labels=round(share * sum(row.documents))) for row in self.rows)
        return replace(self, rows=rows)


def assumed_layout(length: int, cut: bool, why: str) -> Layout:
    """Where there are no data to look at: every token has a label, and a row that may be cut is, before its last token.

    That takes most: what is put together again is as large as the row however it is cut, and attention that holds
    whole scores (ALiBi, dropout) holds those of a document almost as long as the row.
    """
    documents = (length - 1, 1) if cut and length > 1 else (length,)
    return Layout((Row(documents, (0,) * len(documents), length),), assumed=why)


def read_layout(paths: Sequence[Path], overrides: Sequence[str], job: Job) -> Layout:
    """Of the first micro-batches of the recipe's data the one that takes most, with documents in its rows if any has
    them, and most labels; assumed where the data are not here.
    """
    recipe = checked_recipe(paths, overrides, files=False).data["data"]
    name = str(recipe["class_path"]).rpartition(".")[2]
    settings = dict(recipe.get("init_args") or {})
    lacking = [str(path) for path in _files(name, settings) if not path.exists()]
    why = f"{lacking[0]} is not here" if lacking else "" if name in _KINDS else f"{recipe['class_path']} is not ours"
    if not why:
        try:
            found = max(_micro_batches(name, settings, job), key=lambda layout: (layout.cut, layout.labels))
        except UserError as error:
            why = error.problems[0]
        else:
            return found
    return assumed_layout(job.seq_len, job.cut, why)


def _files(name: str, settings: dict[str, Any]) -> Iterator[Path]:
    """What the data are read from."""
    for path in settings.get("train") or {}:
        yield Path(f"{path}.bin" if name == "PackedShards" else path)
    if settings.get("tokenizer"):
        yield Path(settings["tokenizer"])


def _micro_batches(name: str, settings: dict[str, Any], job: Job) -> list[Layout]:
    """Of the first steps, in the recipe's own order."""
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")  # Lightning's, of a trainer that is not there
        logging.getLogger("lightning.pytorch").setLevel(logging.ERROR)
        from llmrecipes import data
        from llmrecipes.data.chat_data import ConversationData

        # The plan may be for other processes than the recipe's: a step's rows are the same, and so are the first ones.
        module = getattr(data, name)(**settings | {"micro_batch": job.micro_batch, "global_batch": job.global_batch})
        if isinstance(module, ConversationData):
            module.most_lines = _CONVERSATIONS
        module.setup("fit")
    batches = (batch for step in range(_STEPS) for batch in module.step_batch(step).split(job.micro_batch))
    return [_of(batch) for batch in islice(batches, _MICRO_BATCHES)]


def _of(batch: Batch) -> Layout:
    from llmrecipes.data.batch import IGNORE

    length = batch.tokens.shape[1]
    documents = batch.document_lengths or [[length]] * batch.num_rows
    prefixes = batch.document_prefixes or [[0] * len(row) for row in documents]
    labels = (batch.labels != IGNORE).sum(1).tolist()
    rows = [Row(tuple(d), tuple(p), n) for d, p, n in zip(documents, prefixes, labels, strict=True)]
    return Layout(tuple(rows), masked=batch.token_mask is not None)

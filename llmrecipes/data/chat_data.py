"""Conversations as LightningDataModules: packed to rows without waste, loss on the assistant's words alone."""

from __future__ import annotations

import hashlib
import json
import os
import sys
import time
from collections.abc import Iterator
from contextlib import contextmanager
from functools import cached_property
from itertools import islice
from pathlib import Path
from typing import Any, ClassVar, NamedTuple, TypeVar

import numpy as np
import torch

from llmrecipes.data.batch import IGNORE, Batch
from llmrecipes.data.buffers import Buffers
from llmrecipes.data.chat_examples import ChatEncoder, Counts, Example, Turns, best_fit
from llmrecipes.data.chat_template import NAMED, ChatTemplate, find_template
from llmrecipes.data.conversations import Message, read_conversations
from llmrecipes.data.order import Permutation, derive_key
from llmrecipes.data.packing import parse_split, split_documents
from llmrecipes.data.step_data import StepData, ValidSet
from llmrecipes.errors import UserError

_FORMAT = 1  # of the cache
_SPLIT_KEY = derive_key(0x5911)
T = TypeVar("T")


class Encoded(NamedTuple):
    """The conversations of one file.

    Attributes:
        ids: of all of them, one after the other, [tokens] int32. trained: [tokens] bool.
        starts: first id of each conversation and the end, [conversations + 1].
        counts: what became of the lines, in words.
    """

    ids: np.ndarray
    trained: np.ndarray
    starts: np.ndarray
    counts: list[str]


class ExampleRows:
    """Examples of a file packed into rows of ``seq_len`` positions.

    An example is ``size`` conversations that follow each other. A conversation of n ids takes n - 1 positions: its
    last id is only predicted. The first ``shared`` ones are left out where the conversation before it has them.
    """

    def __init__(
        self,
        encoded: Encoded,
        size: int,
        shared: np.ndarray,
        chosen: np.ndarray,
        seq_len: int,
        pack: bool,
        what: str,
    ) -> None:
        if not len(chosen):
            raise UserError(f"{what}: no example in it")
        self.encoded, self.size, self.shared = encoded, size, shared
        lengths = (np.diff(encoded.starts) - 1 - shared).reshape(-1, size).sum(1)[chosen]
        rows = best_fit(lengths, seq_len) if pack else [[n] for n in range(len(chosen))]
        self.rows = [chosen[row] for row in rows]
        self.num_examples = len(chosen)
        self.num_positions = int(lengths.sum())

    def __len__(self) -> int:
        return len(self.rows)

    def fill(self, row: int, tokens: np.ndarray, labels: np.ndarray) -> tuple[list[int], list[int]]:
        """Write a row into ``tokens`` and ``labels`` [T]; returns the lengths of its conversations, and of what was
        left out of each."""
        ids, trained, starts, _ = self.encoded
        lengths, prefixes, at = [], [], 0
        for conversation in (self.rows[row][:, None] * self.size + np.arange(self.size)).ravel().tolist():
            prefix = int(self.shared[conversation])
            first, last = starts[conversation] + prefix, starts[conversation + 1] - 1
            length = int(last - first)
            tokens[at : at + length] = ids[first:last]
            labels[at : at + length] = np.where(trained[first + 1 : last + 1], ids[first + 1 : last + 1], IGNORE)
            lengths.append(length)
            prefixes.append(prefix)
            at += length
        return lengths, prefixes


class ConversationData(StepData):
    """What supervised fine-tuning and preference training share: files of conversations, spelled by a template.

    Subclasses say what an example is: ``size`` conversations, read by ``read``.
    """

    size: ClassVar[int]

    def __init__(
        self,
        train: dict[str, float],
        tokenizer: str,
        seq_len: int,
        micro_batch: int,
        global_batch: int,
        template: str | None,
        turns: Turns,
        pack: bool,
        valid: dict[str, str] | None,
        split: str,
        seed: int,
        valid_batches: int,
        cache: str,
    ) -> None:
        super().__init__(seq_len, micro_batch, global_batch, seed, tokenizer, valid_batches)
        self.train = dict(train)
        self.template_name = template
        self.turns: Turns = turns
        self.pack = pack
        self.valid = None if valid is None else dict(valid)
        self.split = split
        self.cache = Path(cache)
        self._encoded: dict[str, Encoded] = {}
        self._keys: dict[str, str] = {}
        self._buffers = Buffers()
        # Of each file; None = all. Who only wants to know what rows look like need not wait for a large one.
        self.most_lines: int | None = None

    def read(self, path: str, encoder: ChatEncoder, counts: Counts) -> Iterator[list[Example] | None]:
        """The example of each line, None where there is none.

        Raises:
            UserError: a line cannot be read, or the template cannot be trained with.
        """
        raise NotImplementedError  # pragma: no cover - abstract

    def shared(self, encoded: Encoded) -> np.ndarray:
        """How many first ids of each conversation are left out, because the one before it has them, [conversations]."""
        return np.zeros(len(encoded.starts) - 1, np.int64)

    # ---- before step 1

    def prepare_data(self) -> None:
        """Encode all files, once (Lightning calls it on one process per node).

        Raises:
            UserError: all problems of all files at once.
        """
        self.setup("fit")

    def setup(self, stage: str) -> None:
        """Read what is encoded, encode what is not, and pack it.

        Raises:
            UserError: all problems at once.
        """
        self._raise(self._size_problems())
        if self._order is not None:
            return
        problems: list[str] = []
        for path in dict.fromkeys([*self.train, *(self.valid or {}).values()]):
            try:
                self._encoded[path] = self._load(path)
            except UserError as error:
                problems += error.problems
        self._raise(problems)
        self._pack()

    def _size_problems(self) -> list[str]:
        problems = super()._size_problems() + self._weight_problems(self.train, "JSONL file")
        try:
            parse_split(self.split)
        except UserError as error:
            problems += error.problems
        return problems

    @cached_property
    def template(self) -> ChatTemplate:
        """How a conversation is spelled.

        Raises:
            UserError: there is none.
        """
        folder = self.tokenizer.folder
        eos = self.tokenizer.piece(self.tokenizer.eos_id)
        found = find_template(folder, self.template_name, eos)
        if found is None:
            raise UserError(
                f"{folder}: no chat template beside the tokenizer; name one with data.template: {', '.join(NAMED)}"
            )
        return found

    def _load(self, path: str) -> Encoded:
        key = self._keys[path] = self._key(path)
        file = self.cache / f"{Path(path).stem}-{key[:16]}.npz"
        if not file.is_file():
            encoded = self._encode(path)
            if self.most_lines is None:
                _write(file, encoded)
            return encoded
        with np.load(file, allow_pickle=False) as kept:
            return Encoded(kept["ids"], kept["trained"], kept["starts"], json.loads(str(kept["counts"])))

    def _encode(self, path: str) -> Encoded:
        """All examples of a file, with a progress line on a terminal."""
        counts = Counts()
        encoder = ChatEncoder(self.template, self.tokenizer, self.seq_len, self.turns)
        lines = list(islice(with_progress(self.read(path, encoder, counts), path), self.most_lines))
        examples = [example for example in lines if example is not None]
        words = counts.in_words(len(lines))
        if not examples:
            raise UserError(f"{path}: no example to train on ({'; '.join(words)})")
        conversations = [conversation for example in examples for conversation in example]
        starts = np.concatenate([[0], np.cumsum([len(one.ids) for one in conversations])])
        ids, trained = (np.concatenate(parts) for parts in zip(*conversations, strict=True))
        return Encoded(ids, trained, starts, words)

    def _key(self, path: str) -> str:
        """All that decides the examples of a file."""
        try:
            content = hashlib.sha256(Path(path).read_bytes()).hexdigest()
        except OSError as error:
            raise UserError(f"{path}: {error.strerror or error}") from None
        return hashlib.sha256(repr((_FORMAT, type(self).__name__, content, *self._spelling())).encode()).hexdigest()

    def _spelling(self) -> list[str]:
        special = json.dumps(self.template.special, sort_keys=True)
        return [self.tokenizer.sha256, self.template.source, special, str(self.seq_len), self.turns]

    def _pack(self) -> None:
        train, valid = [], {}
        problems: list[str] = []
        shared = {path: self.shared(encoded) for path, encoded in self._encoded.items()}

        def rows(path: str, chosen: np.ndarray, what: str) -> ExampleRows | None:
            try:
                encoded = self._encoded[path]
                return ExampleRows(encoded, self.size, shared[path], chosen, self.seq_len, self.pack, what)
            except UserError as error:
                problems.extend(error.problems)
                return None

        for path in self.train:
            number = (len(self._encoded[path].starts) - 1) // self.size
            parts = split_documents(self.split, number)
            shuffled = Permutation(number, _SPLIT_KEY)(np.arange(number)) if number else np.arange(0)
            train.append(rows(path, np.sort(shuffled[slice(*parts[0])]), f"{path} (train part of data.split)"))
            if self.valid is None and parts[1][0] < parts[1][1]:
                valid[Path(path).stem] = rows(path, np.sort(shuffled[slice(*parts[1])]), f"{path} (validation part)")
        for name, path in (self.valid or {}).items():
            number = (len(self._encoded[path].starts) - 1) // self.size
            valid[name] = rows(path, np.arange(number), f"{path} (data.valid {name})")
        self._raise(problems)
        self.blend(train, list(self.train.values()), valid)

    # ---- batches

    def _collate(self, sources: list[ExampleRows], source: np.ndarray, window: np.ndarray) -> Batch:
        shape = (len(source), self.seq_len)
        tokens, labels = self._buffers.take(shape), self._buffers.take(shape)
        real = torch.zeros(shape, dtype=torch.bool)
        lengths, prefixes = [], []
        for row, (s, w) in enumerate(zip(source.tolist(), window.tolist(), strict=True)):
            found, left_out = sources[s].fill(w, tokens[row], labels[row])
            used = sum(found)
            tokens[row, used:], labels[row, used:] = 0, IGNORE
            real[row, :used] = True
            # padding is a document of its own: nothing real sees it
            rest = used < self.seq_len
            lengths.append(found + [self.seq_len - used] * rest)
            prefixes.append(left_out + [0] * rest)
        shared = prefixes if any(map(any, prefixes)) else None
        return Batch(torch.from_numpy(tokens), torch.from_numpy(labels), lengths, real, 0, shared)

    # ---- facts

    @cached_property
    def vocab_size(self) -> int:
        """Number of ids of the tokenizer."""
        return self.tokenizer.vocab_size

    @property
    def eos_id(self) -> int:
        """Id that ends an answer."""
        return self.tokenizer.eos_id

    def chat_prompt(self, text: str) -> list[int]:
        """Ids of what a user says, up to where the assistant is to speak."""
        message: Message = {"role": "user", "content": text}
        return self.tokenizer.encode_marked(self.template.text([message], reply=True))

    def fingerprint(self) -> dict[str, Any]:
        """All that decides which tokens step s sees; a checkpoint keeps it and a resume compares it."""
        return {
            "train": [
                {"name": Path(p).name, "weight": w, "content": self._keys[p][:16]} for p, w in self.train.items()
            ],
            "seed": self.seed,
            "seq_len": self.seq_len,
            "global_batch": self.global_batch,
            "split": self.split,
            "pack": self.pack,
        }

    def describe(self, max_steps: int | None = None) -> list[str]:
        """Lines for the log: examples, share and epochs of each file, how full the rows are, what was dropped."""
        assert self._order is not None, "setup() comes first"
        steps = max_steps if max_steps is not None else getattr(self.trainer, "max_steps", -1)
        total = sum(self.train.values())
        counts = self._order.counts_before(max(steps, 0) * self.global_batch)
        lines = []
        for (path, weight), source, count in zip(self.train.items(), self._train_sources, counts, strict=True):
            planned = f", {count / len(source):.2f} epochs in {steps} steps" if steps > 0 else ""
            filled = source.num_positions / (len(source) * self.seq_len)
            lines.append(
                f"{path}: {source.num_examples:,} examples in {len(source):,} rows, {filled:.1%} full, "
                f"share {weight / total:.1%}{planned}"
            )
            lines += [f"{path}: {line}" for line in self._encoded[path].counts]
        for name, valid in self._valid_sources.items():
            lines.append(f"validation {name}: {ValidSet(self, valid).num_windows} of {len(valid):,} rows")
        return lines


class ChatExamples(ConversationData):
    """Conversations for supervised fine-tuning, in an order that depends on (seed, step) only.

    Several examples share a row and do not see each other; positions restart at each. Trained on are the assistant's
    words and the piece that ends them, also where that piece is the padding of other tools.

    Args:
        train: JSONL file -> weight by tokens, on any positive scale.
        tokenizer: folder of the tokenizer, with its chat template unless ``template`` names one.
        seq_len: positions per row; a conversation is cut after the last turn that fits.
        micro_batch: rows that pass through the model at once.
        global_batch: rows per optimizer step over all data ranks.
        template: ``instruction_ja``, ``alpaca``, ``chatml`` or a jinja file; ``null`` = the tokenizer's own.
        turns: which assistant turns are trained on.
        pack: put examples that fit together into one row; false = one example per row.
        valid: name -> JSONL file of a validation set, used whole. ``null``: the validation part of each train file.
        split: shares of training and validation conversations of each train file, drawn once and for all.
        seed: of the data order; independent of the model's.
        valid_batches: at most so many batches of ``micro_batch`` rows per validation set, over all ranks together.
        cache: folder where encoded files are kept for the next launch.
    """

    size = 1

    def __init__(
        self,
        train: dict[str, float],
        tokenizer: str,
        seq_len: int,
        micro_batch: int,
        global_batch: int,
        template: str | None = None,
        turns: Turns = "all",
        pack: bool = True,
        valid: dict[str, str] | None = None,
        split: str = "98,2",
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
            turns,
            pack,
            valid,
            split,
            seed,
            valid_batches,
            cache,
        )

    def read(self, path: str, encoder: ChatEncoder, counts: Counts) -> Iterator[list[Example] | None]:
        """One conversation a line."""
        for number, messages in read_conversations(path):
            with at_line(path, number):
                example = encoder.encode(messages, counts)
            yield None if example is None else [example]


@contextmanager
def at_line(path: str, number: int) -> Iterator[None]:
    """Problems in here are problems of this line."""
    try:
        yield
    except UserError as error:
        raise UserError(*(f"{path}:{number}: {problem}" for problem in error.problems)) from None


def with_progress(items: Iterator[T], name: str) -> Iterator[T]:
    """The items; how many there were so far, on a terminal, where it takes long."""
    shown = time.monotonic()
    done = 0
    for done, item in enumerate(items, 1):
        if sys.stderr.isatty() and time.monotonic() - shown > 1:
            shown = time.monotonic()
            print(f"\r{name}: {done:,} conversations", end="", file=sys.stderr, flush=True)
        yield item


def _write(file: Path, encoded: Encoded) -> None:
    """Whole or not at all; a cache that cannot be written costs time only."""
    partial = file.with_name(f"{file.name}.{os.getpid()}.partial")
    try:
        file.parent.mkdir(parents=True, exist_ok=True)
        with partial.open("wb") as out:
            np.savez(out, **(encoded._asdict() | {"counts": json.dumps(encoded.counts)}))
        partial.replace(file)
    except OSError:
        partial.unlink(missing_ok=True)

"""Packed token shards as a LightningDataModule: one train batch is this rank's whole share of an optimizer step."""

from __future__ import annotations

import hashlib
from collections import Counter
from functools import cached_property
from pathlib import Path
from typing import Any

import numpy as np
import torch

from llmrecipes.data.batch import Batch
from llmrecipes.data.buffers import Buffers
from llmrecipes.data.manifest import Manifest
from llmrecipes.data.packing import PackedSource, parse_split, split_documents
from llmrecipes.data.shards import IndexedShard
from llmrecipes.data.step_data import StepData, ValidSet
from llmrecipes.data.verify import check_manifest, verify
from llmrecipes.errors import UserError


class PackedShards(StepData):
    """Token shards, packed to windows of ``seq_len``, blended by weight, in an order that depends on (seed, step) only.

    Args:
        train: shard prefix (path without ``.bin``) -> weight by tokens, on any positive scale.
        valid: name -> prefix of a validation set, used whole. ``null``: the validation part of each train shard.
        valid_from: prefixes of shards whose validation part is used instead, also of ones that are not trained on: how
            one domain's training changes the others. ``null`` = those of ``train``.
        seq_len: targets per row, T.
        micro_batch: rows that pass through the model at once.
        global_batch: rows per optimizer step over all data ranks.
        split: shares of train, validation and test documents of each train shard, as Megatron's ``--split``.
        seed: of the data order; independent of the model's.
        document_mask: cut rows at document starts (no attention, no target across); false = plain causal rows.
        tokenizer: folder of the tokenizer; its hash must be the shards'.
        valid_batches: at most so many batches of ``micro_batch`` rows per validation set, over all ranks together.
        vocab_size: number of ids the model knows; ``null`` = the shards'.
    """

    def __init__(
        self,
        train: dict[str, float],
        seq_len: int,
        micro_batch: int,
        global_batch: int,
        valid: dict[str, str] | None = None,
        split: str = "998,1,1",
        seed: int = 0,
        document_mask: bool = True,
        tokenizer: str | None = None,
        valid_batches: int = 16,
        vocab_size: int | None = None,
        valid_from: list[str] | None = None,
    ) -> None:
        super().__init__(seq_len, micro_batch, global_batch, seed, tokenizer, valid_batches)
        self.train = dict(train)
        self.valid = None if valid is None else dict(valid)
        self.valid_from = None if valid_from is None else list(valid_from)
        self.split = split
        self.document_mask = document_mask
        self._vocab_size = vocab_size
        self._shards: dict[str, IndexedShard] = {}
        self._manifests: dict[str, Manifest | None] = {}
        self._buffers = Buffers()
        self._verified = False

    # ---- before step 1 -------------------------------------------------------------------------------------------

    def prepare_data(self) -> None:
        """Open everything and check every checksum, once (Lightning calls it on one process per node).

        Raises:
            UserError: all problems of all shards at once.
        """
        self.setup("fit")
        if self._verified:
            return
        problems: list[str] = []
        notes: list[str] = []
        for prefix in self._shards:
            try:
                notes += verify(prefix, vocab_size=self.vocab_size)
            except UserError as error:
                problems += error.problems
        if problems:
            raise UserError(*problems)
        self.notes, self._verified = notes, True

    def setup(self, stage: str) -> None:
        """Open the shards and check all that needs no reading of them: sizes, tokenizers, vocabulary, batch sizes.

        Raises:
            UserError: all problems at once.
        """
        if self._order is not None:
            self._raise(self._size_problems())
            return
        self._raise(self._size_problems() + self._open_shards())
        self._raise(self._tokenizer_problems())
        self._cut()

    def _size_problems(self) -> list[str]:
        problems = super()._size_problems() + self._weight_problems(self.train, "shard prefix")
        try:
            shares = parse_split(self.split)
        except UserError as error:
            return [*problems, *error.problems]
        if self.valid_from is not None and self.valid is not None:
            problems.append("data.valid_from: has no effect beside data.valid; leave one out")
        if self.valid_from is not None and not shares[1]:
            problems.append(f"data.valid_from: data.split {self.split} leaves no validation part")
        return problems

    def _open_shards(self) -> list[str]:
        problems: list[str] = []
        for prefix in dict.fromkeys([*self.train, *(self.valid or {}).values(), *(self.valid_from or [])]):
            try:
                shard = IndexedShard(prefix)
                manifest = Manifest.read(prefix)
            except UserError as error:
                problems += error.problems
                continue
            self._shards[prefix], self._manifests[prefix] = shard, manifest
            if manifest is not None:
                problems += check_manifest(shard, manifest)
        return problems

    def _tokenizer_problems(self) -> list[str]:
        """Shards of different tokenizers, or of another than the recipe's, must never be trained on together."""
        problems = []
        known = {prefix: m for prefix, m in self._manifests.items() if m is not None}
        first = next(iter(known), None)
        wanted = (f"data.tokenizer {self.tokenizer_folder}", self.tokenizer) if self.tokenizer_folder else None
        for prefix, manifest in known.items():
            if wanted is not None and manifest.tokenizer_sha256 != wanted[1].sha256:
                problems.append(
                    f"{prefix}: written with tokenizer {manifest.tokenizer} ({manifest.tokenizer_sha256[:12]}), "
                    f"{wanted[0]} is another ({wanted[1].sha256[:12]})"
                )
            elif first is not None and manifest.tokenizer_sha256 != known[first].tokenizer_sha256:
                problems.append(
                    f"{prefix}: written with tokenizer {manifest.tokenizer} ({manifest.tokenizer_sha256[:12]}), "
                    f"{first} with {known[first].tokenizer} ({known[first].tokenizer_sha256[:12]}); use one"
                )
            for name in ("vocab_size", "eos_id"):
                if first is not None and getattr(manifest, name) != getattr(known[first], name):
                    problems.append(
                        f"{prefix}: {name} is {getattr(manifest, name)}, of {first} {getattr(known[first], name)}; "
                        "tokenize both with one tokenizer"
                    )
            if self._vocab_size is not None and manifest.vocab_size > self._vocab_size:
                problems.append(
                    f"{prefix}: its tokenizer has {manifest.vocab_size} ids, data.vocab_size is {self._vocab_size}"
                )
        if not known and self._vocab_size is None and wanted is None:
            problems.append("data.vocab_size: the shards have no manifest; give data.vocab_size or data.tokenizer")
        return problems

    def _cut(self) -> None:
        problems: list[str] = []

        def source(prefix: str, documents: tuple[int, int], what: str) -> PackedSource | None:
            try:
                return PackedSource(self._shards[prefix], documents, self.seq_len, self.document_mask, what)
            except UserError as error:
                problems.extend(error.problems)
                return None

        def part(prefix: str, number: int) -> tuple[int, int]:
            return split_documents(self.split, self._shards[prefix].num_documents)[number]

        what = f"part of data.split {self.split}"
        train = [source(prefix, part(prefix, 0), f"{prefix} (train {what})") for prefix in self.train]
        valid = {}
        held_out = [] if self.valid is not None or not parse_split(self.split)[1] else self.valid_from or self.train
        short = Counter(Path(prefix).name for prefix in held_out)
        for prefix in held_out:
            name = Path(prefix).name if short[Path(prefix).name] == 1 else prefix
            valid[name] = source(prefix, part(prefix, 1), f"{prefix} (validation {what})")
        for name, prefix in (self.valid or {}).items():
            valid[name] = source(prefix, (0, self._shards[prefix].num_documents), f"{prefix} (data.valid {name})")
        self._raise(problems)
        valid_sources = {name: s for name, s in valid.items() if s is not None}
        self.blend([s for s in train if s is not None], list(self.train.values()), valid_sources)

    # ---- batches

    def _collate(self, sources: list[PackedSource], source: np.ndarray, window: np.ndarray) -> Batch:
        shape = (len(source), self.seq_len)
        tokens, labels = self._buffers.take(shape), self._buffers.take(shape)
        lengths: list[list[int]] | None = [[] for _ in range(len(source))] if self.document_mask else None
        alone = len(sources) == 1
        for s in [0] if alone else np.unique(source).tolist():
            rows = np.arange(len(source)) if alone else np.flatnonzero(source == s)
            windows = window if alone else window[rows]
            largest = sources[s].fill(windows, rows, tokens, labels)
            if not 0 <= largest < self.vocab_size:
                raise UserError(
                    f"{sources[s].shard.bin_path}: id {largest} in windows {windows.tolist()[:8]} is not below "
                    f"the vocabulary size {self.vocab_size}"
                )
            if lengths is not None:
                sources[s].cut(windows, rows, labels, lengths)
        return Batch(torch.from_numpy(tokens), torch.from_numpy(labels), lengths)

    # ---- facts

    @cached_property
    def vocab_size(self) -> int:
        """Number of ids: the recipe's, else the manifests', else the tokenizer's."""
        if self._vocab_size is not None:
            return self._vocab_size
        return (
            next((m.vocab_size for m in self._manifests.values() if m is not None), None) or self.tokenizer.vocab_size
        )

    @property
    def eos_id(self) -> int | None:
        """Id that ends a document; None when neither manifest nor tokenizer say."""
        known = next((m.eos_id for m in self._manifests.values() if m is not None), None)
        return self.tokenizer.eos_id if known is None and self.tokenizer_folder else known

    def fingerprint(self) -> dict[str, Any]:
        """All that decides which tokens step s sees; a checkpoint keeps it and a resume compares it."""
        return {
            # A list: the place of a source decides its order too, and two may have the same name.
            "train": [{"name": Path(p).name, "weight": w, **self._content(p)} for p, w in self.train.items()],
            "seed": self.seed,
            "seq_len": self.seq_len,
            "global_batch": self.global_batch,
            "split": self.split,
            "document_mask": self.document_mask,
        }

    def _content(self, prefix: str) -> dict[str, Any]:
        shard, manifest = self._shards[prefix], self._manifests[prefix]
        sums = [] if manifest is None else [*manifest.bin_crc32, manifest.idx_crc32]
        checksum = hashlib.sha256(repr(sums).encode()).hexdigest()[:16] if sums else None
        return {"tokens": shard.num_tokens, "documents": shard.num_documents, "checksum": checksum}

    def describe(self, max_steps: int | None = None) -> list[str]:
        """Lines for the log: tokens, share and epochs of each source, and the notes of the checks."""
        assert self._order is not None, "setup() comes first"
        steps = max_steps if max_steps is not None else getattr(self.trainer, "max_steps", -1)
        total = sum(self.train.values())
        counts = self._order.counts_before(max(steps, 0) * self.global_batch)
        lines = []
        for (prefix, weight), source, count in zip(self.train.items(), self._train_sources, counts, strict=True):
            per_epoch = len(source) * total / (weight * self.global_batch)
            planned = f", {count / len(source):.2f} epochs in {steps} steps" if steps > 0 else ""
            lines.append(
                f"{prefix}: {source.num_tokens:,} tokens in {source.documents[1] - source.documents[0]:,} documents, "
                f"share {weight / total:.1%}, {per_epoch:,.1f} steps per epoch{planned}"
            )
        for name, valid in self._valid_sources.items():
            rows = ValidSet(self, valid).num_windows
            lines.append(f"validation {name}: {rows} of {len(valid):,} windows of {self.seq_len} tokens")
        return lines + self.notes

"""`llmrecipes data decontaminate`: documents that hold questions or answers of the evaluation sets."""

from __future__ import annotations

import json
from collections.abc import Iterator
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any, Literal

import numpy as np

from data_prep.frame.config import Finding, StageConfig
from data_prep.frame.map import Judge, Verdict, run_map
from data_prep.frame.records import Document
from data_prep.frame.shards import Shard
from data_prep.rules.repetition import ngram_hashes, words
from data_prep.rules.unicode import normalize
from llmrecipes.errors import UserError


@dataclass(frozen=True, kw_only=True)
class DecontaminateConfig(StageConfig):
    """Recipe of `data decontaminate`.

    Words are runs of one script, without signs and case: 13 of them are some 30 characters of Japanese.

    Args:
        eval: JSONL files of the evaluation sets; all text in them counts, at any depth.
        eval_fields: only these fields of their records; null for all.
        ngram: this many words in a row are an overlap.
        min_words: an item shorter than ngram is looked for as a whole, if it has at least so many words.
        action: drop such documents, or keep them with the field `contaminated`.
    """

    eval: list[str]
    eval_fields: list[str] | None = None
    ngram: int = 13
    min_words: int = 8
    action: Literal["drop", "flag"] = "drop"

    def problems(self) -> Iterator[Finding]:
        """Lengths that cannot be."""
        yield from super().problems()
        if not 1 <= self.min_words <= self.ngram:
            yield ("min_words",), "min_words: between 1 and ngram", "write 8"

    def missing(self) -> Iterator[Finding]:
        """The evaluation sets."""
        yield from super().missing()
        for number, name in enumerate(self.eval):
            if not Path(name).is_file():
                yield ("eval", number), f"eval: {name}: no such file", "name a JSONL file"


@dataclass(frozen=True)
class Items:
    """N-grams of evaluation sets: for each length, sorted hashes and the item each is from."""

    hashes: dict[int, np.ndarray] = field(default_factory=dict)
    item: dict[int, np.ndarray] = field(default_factory=dict)
    names: list[str] = field(default_factory=list)
    num_short: int = 0

    def found_in(self, text: str) -> set[int]:
        """Numbers of the items that overlap with a text."""
        ids, found = words_of(text), set[int]()
        for length, known in self.hashes.items():
            if len(ids) < length:
                continue
            hashes = ngram_hashes(ids, length)
            places = np.minimum(np.searchsorted(known, hashes), len(known) - 1)
            found.update(self.item[length][places[known[places] == hashes]].tolist())
        return found


def run(config: DecontaminateConfig) -> None:
    """Drops or flags, and counts for each item of the evaluation sets how many documents hold it."""
    items = read_items(config)
    print(f"{len(items.names):,} texts of evaluation sets; {items.num_short:,} are too short to look for", flush=True)
    run_map("decontaminate", config, make_judge)


def make_judge(config: DecontaminateConfig, _: Shard) -> Judge:
    """The judge of single documents."""
    items = read_items(config)

    def judge(document: Document) -> Verdict:
        found = sorted(items.names[item] for item in items.found_in(document.text))
        if not found:
            return Verdict(document.text)
        if config.action == "flag":
            return Verdict(document.text, added={"contaminated": found}, notes=tuple(found))
        return Verdict(document.text, f"in_{Path(found[0].rpartition(':')[0]).name}", notes=tuple(found))

    return lambda documents: [judge(document) for document in documents]


def words_of(text: str) -> np.ndarray:
    """Hashes of the words of a text [W], without signs, case and compatibility forms."""
    return words(normalize("NFKC", text).lower(), signs=False)[0]


def read_items(config: DecontaminateConfig) -> Items:
    """All texts of the evaluation sets.

    Raises:
        UserError: a line that cannot be read, or nothing to look for.
    """
    items = Items()
    parts: dict[int, tuple[list[np.ndarray], list[np.ndarray]]] = {}
    short = 0
    for name, text in _texts(config):
        ids = words_of(text)
        if len(ids) < config.min_words:
            short += 1
            continue
        length = min(config.ngram, len(ids))
        hashes = ngram_hashes(ids, length)
        known = parts.setdefault(length, ([], []))
        known[0].append(hashes)
        known[1].append(np.full(len(hashes), len(items.names)))
        items.names.append(name)
    if not items.names:
        raise UserError(f"eval: no text of {config.min_words} words in {', '.join(config.eval)}; lower min_words")
    for length in sorted(parts):
        hashes, item = (np.concatenate(column) for column in parts[length])
        order = np.argsort(hashes, kind="stable")
        items.hashes[length], items.item[length] = hashes[order], item[order]
    return Items(items.hashes, items.item, items.names, short)


def _texts(config: DecontaminateConfig) -> Iterator[tuple[str, str]]:
    """(`file:line`, text) of every text; one item may have several."""
    for name in config.eval:
        with Path(name).open(encoding="utf-8") as stream:
            for number, line in enumerate(stream, start=1):
                if not line.strip():
                    continue
                try:
                    record = json.loads(line)
                except ValueError:
                    raise UserError(f"{name}:{number}: not JSON; mend or remove the line") from None
                if config.eval_fields is not None and isinstance(record, dict):
                    record = {key: record.get(key) for key in config.eval_fields}
                yield from ((f"{Path(name).name}:{number}", text) for text in _strings(record))


def _strings(value: Any) -> Iterator[str]:
    if isinstance(value, str):
        yield value
    elif isinstance(value, dict | list):
        for inner in value.values() if isinstance(value, dict) else value:
            yield from _strings(inner)

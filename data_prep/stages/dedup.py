"""`llmrecipes data dedup`: duplicates across all files and sources, exact and near, with a map of what stood for what.

Three passes, each resumable: signatures of every document (file by file), a plan (one process), the results (file by
file). Near duplicates are found by MinHash over n-grams of characters (code points: Japanese needs no segmenter, and
bytes would cut characters) with locality-sensitive hashing, and every pair is checked on the whole signature: what is
removed resembles the very document that is kept for it, not only a chain of others.
"""

from __future__ import annotations

import csv
import gzip
import hashlib
import io
import json
import os
from collections.abc import Callable, Iterator
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any, NamedTuple

import numpy as np

from data_prep.frame.config import Finding, StageConfig
from data_prep.frame.extras import need
from data_prep.frame.map import BATCH_CHARACTERS, Judge, Verdict, map_pass
from data_prep.frame.records import Broken, Document, partial_name, read_documents, write_json
from data_prep.frame.shards import Advance, Shard, find_shards, open_output, run_shards

_FACTOR = np.uint64(0x9E3779B97F4A7C15)


@dataclass(frozen=True, kw_only=True)
class MinHash:
    """How near duplicates are found.

    A pair of similarity s becomes a candidate with probability 1 - (1 - s^rows)^bands: with 21 bands of 6 rows 0.998 at
    s = 0.8. It is then removed when the estimate on all bands x rows hashes reaches the threshold.

    Args:
        ngram: characters in an n-gram; white space does not count.
        bands: groups of hashes; one equal group makes a candidate.
        rows: hashes in a group.
        threshold: smallest estimated Jaccard similarity; its standard deviation is 0.044 at 0.5 and 0.036 at 0.8.
    """

    ngram: int = 5
    bands: int = 21
    rows: int = 6
    threshold: float = 0.7


@dataclass(frozen=True, kw_only=True)
class DedupConfig(StageConfig):
    """Recipe of `data dedup`.

    Args:
        near: near duplicates; null removes only documents that are equal but for white space.
        priority: beginnings of names of inputs, best first: of duplicates the one from the best source is kept; then
            the longest.
    """

    near: MinHash | None = field(default_factory=MinHash)
    priority: list[str] = field(default_factory=list)

    def problems(self) -> Iterator[Finding]:
        """Numbers that cannot be, and priorities that name nothing."""
        yield from super().problems()
        if self.near and min(self.near.ngram, self.near.bands, self.near.rows) < 1:
            yield ("near",), "near: ngram, bands and rows must be positive", "write 5, 21 and 6"
        if self.near and not 0 < self.near.threshold <= 1:
            yield ("near", "threshold"), f"near.threshold: {self.near.threshold} is no similarity", "write 0.7"


class Signatures(NamedTuple):
    """What is known of documents: line [D], length in characters [D], hashes of text and line [D], MinHash [D, H]."""

    line: np.ndarray
    length: np.ndarray
    exact: np.ndarray
    tie: np.ndarray
    minhash: np.ndarray


class Plan(NamedTuple):
    """For each document [D]: index of the one that is kept for it (or its own), and the estimated similarity."""

    kept: np.ndarray
    similarity: np.ndarray


def dedup(config: DedupConfig) -> None:
    """Removes duplicates, and writes `removed.csv.gz`: every removed document and the one that is kept for it."""
    shards = find_shards(config.input)
    output = open_output("dedup", config, shards)
    done = run_shards(_write_signatures, "signatures", config, shards, output)
    if done is None:
        print("run the same command again when the other tasks are done: the plan needs all signatures")
        return
    key = hashlib.sha256(json.dumps(done, sort_keys=True).encode()).hexdigest()
    if not _plan_is_of(output, key):
        _write_plan(config, shards, output, key)
    map_pass("dedup", config, make_judge, shards, output, {"removed": "removed.csv.gz"})


def _signature_file(output: Path, shard: Shard) -> Path:
    return output / ".done" / "signatures" / f"{shard.name}.npz"


def _plan_file(output: Path, shard: Shard) -> Path:
    return output / ".done" / "plan" / f"{shard.name}.npz"


def _write_signatures(config: DedupConfig, shard: Shard, output: Path, advance: Advance) -> dict[str, Any]:
    """Signatures of one file's documents; broken lines are left to the last pass to report."""
    sketch = minhasher(config.near)
    parts, batch, size = list[Signatures](), list[Document](), 0
    for document in read_documents(shard.path, config.field, config.max_document_mb * 1e6, advance):
        if isinstance(document, Broken):
            continue
        batch.append(document)
        size += len(document.text)
        if size >= BATCH_CHARACTERS:
            parts.append(sign(batch, sketch))
            batch, size = [], 0
    parts.append(sign(batch, sketch))
    both = Signatures(*(np.concatenate(columns) for columns in zip(*parts, strict=True)))
    file = _signature_file(output, shard)
    file.parent.mkdir(parents=True, exist_ok=True)
    save_arrays(file, both._asdict())
    return {"documents": len(both.line), "sha256": hashlib.sha256(file.read_bytes()).hexdigest()}


def sign(documents: list[Document], sketch: Callable[[list[str]], np.ndarray]) -> Signatures:
    """Signatures of some documents."""
    packed = ["".join(document.text.split()) for document in documents]
    return Signatures(
        np.array([document.line for document in documents], dtype=np.int64),
        np.array([len(document.text) for document in documents], dtype=np.int64),
        np.array([_hash(text.encode()) for text in packed], dtype="S16"),
        np.array([_hash(document.raw) for document in documents], dtype="S16"),
        sketch(packed),
    )


def _hash(data: bytes) -> bytes:
    return hashlib.blake2b(data, digest_size=8).hexdigest().encode()  # hexadecimal: numpy cuts zero bytes off the end


def minhasher(near: MinHash | None) -> Callable[[list[str]], np.ndarray]:
    """A function from texts to their MinHash [D, bands * rows], uint32."""
    if near is None:
        return lambda texts: np.zeros((len(texts), 0), dtype=np.uint32)
    os.environ.setdefault("RAYON_NUM_THREADS", "1")  # one core for each worker
    rensa = need("rensa")
    num_hashes = near.bands * near.rows

    def sketch(texts: list[str]) -> np.ndarray:
        if not texts:
            return np.zeros((0, num_hashes), dtype=np.uint32)
        hashes = [ngram_hashes(text, near.ngram) for text in texts]
        offsets = np.cumsum([0, *map(len, hashes)], dtype=np.uint64)
        rows = rensa.RMinHash.digest_matrix_from_flat_token_hashes(np.concatenate(hashes), offsets, num_hashes, 1)
        return np.array(rows.to_rows(), dtype=np.uint32)

    return sketch


def ngram_hashes(text: str, n: int) -> np.ndarray:
    """A 64-bit hash of every n-gram of characters; a shorter text is one n-gram, filled up."""
    codes = np.frombuffer(text.encode("utf-32-le"), dtype=np.uint32).astype(np.uint64)
    if len(codes) < n:
        codes = np.pad(codes, (0, n - len(codes)))
    size = len(codes) - n + 1
    hashes = codes[:size].copy()
    for offset in range(1, n):
        hashes *= _FACTOR
        hashes ^= codes[offset : size + offset]
    hashes ^= hashes >> np.uint64(32)
    hashes *= np.uint64(0xD6E8FEB86659FD93)
    hashes ^= hashes >> np.uint64(32)
    return hashes


def _plan_is_of(output: Path, key: str) -> bool:
    file = output / ".done" / "plan.json"
    return file.is_file() and json.loads(file.read_text())["key"] == key


def _write_plan(config: DedupConfig, shards: list[Shard], output: Path, key: str) -> None:
    """Decides over all documents at once: about 600 bytes of memory for each."""
    signatures = [Signatures(**np.load(_signature_file(output, shard))) for shard in shards]
    ranks = [_priority(shard.name, config.priority) for shard in shards]
    priority = np.repeat(np.array(ranks, dtype=np.int64), [len(s.line) for s in signatures])
    everything = Signatures(*(np.concatenate(columns) for columns in zip(*signatures, strict=True)))
    plan = decide(everything, priority, config.near)
    equal = everything.exact == everything.exact[plan.kept]
    starts = np.cumsum([0, *(len(s.line) for s in signatures)])
    for shard, start, end in zip(shards, starts, starts[1:], strict=False):
        gone = np.flatnonzero(plan.kept[start:end] != np.arange(start, end))
        file = _plan_file(output, shard)
        file.parent.mkdir(parents=True, exist_ok=True)
        save_arrays(file, {"line": everything.line[start:end][gone], "equal": equal[start:end][gone]})
    _write_removed(output / "removed.csv.gz", shards, starts, everything.line, plan)
    write_json(output / ".done" / "plan.json", {"key": key})


def _priority(name: str, best_first: list[str]) -> int:
    return next((place for place, start in enumerate(best_first) if name.startswith(start)), len(best_first))


def decide(documents: Signatures, priority: np.ndarray, near: MinHash | None) -> Plan:
    """Which documents stay: best source first, then the longest, then by hash; their order does not matter."""
    count = len(documents.line)
    kept, similarity = np.arange(count), np.ones(count)
    order = np.lexsort((np.arange(count), documents.tie, documents.exact, -documents.length, priority))
    # Equal texts: the first in order stands for all.
    _, first, member = np.unique(documents.exact[order], return_index=True, return_inverse=True)
    kept[order] = order[first[member]]
    if near is None or not count:
        return Plan(kept, similarity)
    distinct = order[kept[order] == order]
    groups = _candidate_groups(documents.minhash[distinct], near)
    standing: dict[int, list[int]] = {}  # for each group, the documents of it that stay
    for place, its_groups in groups.items():
        document = int(distinct[place])
        others = sorted({other for group in its_groups for other in standing.get(group, ())})
        if others:
            agree = (documents.minhash[distinct[others]] == documents.minhash[document]).mean(axis=1)
            best = int(agree.argmax())
            if agree[best] >= near.threshold:
                kept[document], similarity[document] = distinct[others[best]], agree[best]
                continue
        for joined in its_groups:
            standing.setdefault(joined, []).append(place)
    # An equal text of a near duplicate follows it to the document that is kept.
    return Plan(kept[kept], similarity * similarity[kept])


def _candidate_groups(minhash: np.ndarray, near: MinHash) -> dict[int, list[int]]:
    """For each document (in order) that shares a band with another: numbers of the groups it is in."""
    found: dict[int, list[int]] = {}
    number = 0
    for band in range(near.bands):
        rows = minhash[:, band * near.rows : (band + 1) * near.rows].astype(np.uint64)
        keys = np.zeros(len(rows), dtype=np.uint64)
        for column in rows.T:
            keys = (keys ^ column) * _FACTOR
            keys ^= keys >> np.uint64(29)
        order = np.argsort(keys, kind="stable")
        same = keys[order[1:]] == keys[order[:-1]]
        in_group = np.concatenate(([False], same)) | np.concatenate((same, [False]))
        starts = in_group & ~np.concatenate(([False], same))
        numbers = number + np.cumsum(starts) - 1
        number += int(starts.sum())
        for place, group in zip(order[in_group].tolist(), numbers[in_group].tolist(), strict=True):
            found.setdefault(place, []).append(group)
    return dict(sorted(found.items()))


def _write_removed(path: Path, shards: list[Shard], starts: np.ndarray, line: np.ndarray, plan: Plan) -> None:
    def place(document: int) -> tuple[str, int]:
        shard = int(np.searchsorted(starts, document, side="right")) - 1
        return shards[shard].name, int(line[document])

    text = io.StringIO()
    table = csv.writer(text)
    table.writerow(("removed_file", "removed_line", "kept_file", "kept_line", "similarity"))
    for document in np.flatnonzero(plan.kept != np.arange(len(plan.kept))).tolist():
        table.writerow((*place(document), *place(int(plan.kept[document])), f"{plan.similarity[document]:.3f}"))
    partial = partial_name(path)
    partial.write_bytes(gzip.compress(text.getvalue().encode(), mtime=0))
    partial.replace(path)


def make_judge(config: DedupConfig, shard: Shard) -> Judge:
    """The judge of one file's documents: what the plan says of each line."""
    with np.load(_plan_file(Path(config.output), shard)) as plan:
        reasons = {
            line: "equal" if equal else "near_duplicate"
            for line, equal in zip(plan["line"].tolist(), plan["equal"].tolist(), strict=True)
        }
    return lambda documents: [Verdict(document.text, reasons.get(document.line)) for document in documents]


def save_arrays(file: Path, arrays: dict[str, np.ndarray]) -> None:
    """An .npz file, whole or not at all."""
    partial = partial_name(file)
    with partial.open("wb") as stream:
        np.savez(stream, **arrays)  # type: ignore[arg-type]
        stream.flush()
        os.fsync(stream.fileno())
    partial.replace(file)

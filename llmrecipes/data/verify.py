"""Checks a shard against its manifest before step 1.

CRC-32 (zlib), not SHA-256: chance is the enemy here, not malice, and it is faster (2.1 against 1.4 GB per CPU-second).
"""

from __future__ import annotations

import random
import zlib
from collections.abc import Iterator
from pathlib import Path

import numpy as np

from llmrecipes.data.manifest import Manifest, file_crc32
from llmrecipes.data.shards import IndexedShard
from llmrecipes.errors import UserError

WHOLE_BYTES = 4 * 2**30
_SAMPLED_BLOCKS = 8
_SAMPLED_DOCUMENTS = 256


def check_manifest(shard: IndexedShard, manifest: Manifest) -> list[str]:
    """Problems visible without reading the shard: counts and ids that contradict each other."""
    path = f"{shard.prefix}.json"
    problems = [
        f"{path}: {name} is {said}, the shard has {has}; they do not belong together, tokenize again"
        for name, said, has in (
            ("num_tokens", manifest.num_tokens, shard.num_tokens),
            ("num_documents", manifest.num_documents, shard.num_documents),
            ("dtype", manifest.dtype, shard.dtype.name),
        )
        if said != has
    ]
    if not 0 <= manifest.max_id < manifest.vocab_size:
        problems.append(f"{path}: max_id {manifest.max_id} is not below the vocabulary size {manifest.vocab_size}")
    if not 0 <= manifest.eos_id < manifest.vocab_size:
        problems.append(f"{path}: eos_id {manifest.eos_id}: the documents have no EOS; tokenize again with EOS")
    return problems


def verify(prefix: str | Path, full: bool = False, vocab_size: int | None = None) -> list[str]:
    """Check one shard; up to 4 GiB whole, beyond that a few blocks drawn with a fixed seed unless ``full``.

    Without a manifest (Megatron's own shards) the ids are scanned instead, as far as ``vocab_size`` is known.

    Returns:
        Notes: what could not be checked, and why.

    Raises:
        UserError: every problem of this shard.
    """
    shard = IndexedShard(prefix)
    manifest = Manifest.read(prefix)
    whole = full or shard.bin_path.stat().st_size + shard.idx_path.stat().st_size <= WHOLE_BYTES
    if manifest is None:
        return _verify_bare(shard, whole, vocab_size)
    blocks = range(len(manifest.bin_crc32))
    chosen = list(blocks) if whole else _choose(blocks)
    problems = check_manifest(shard, manifest)
    if vocab_size is not None and manifest.max_id >= vocab_size:
        problems.append(f"{shard.bin_path}: id {manifest.max_id} is not below the vocabulary size {vocab_size}")
    notes: list[str] = []
    if not problems:
        problems += _check_blocks(shard, manifest, chosen)
        if whole and file_crc32(shard.idx_path) != manifest.idx_crc32:
            problems.append(
                f"{shard.idx_path}: wrong checksum: the file was changed or damaged; copy or tokenize it again"
            )
        if not problems:
            problems += _check_ends(shard, manifest.eos_id)
    if problems:
        raise UserError(*problems)
    if not whole:
        notes.append(f"{shard.bin_path}: above 4 GiB: {len(chosen)} of {len(blocks)} blocks checked")
    return notes


def _choose(blocks: range) -> list[int]:
    """The ends, where a broken copy shows first, and some between by a fixed seed, so that a failure repeats."""
    inner = random.Random(0).sample(blocks, min(len(blocks), _SAMPLED_BLOCKS - 2))
    return sorted({*blocks[:1], *blocks[-1:], *inner})


def _check_blocks(shard: IndexedShard, manifest: Manifest, chosen: list[int]) -> list[str]:
    size = shard.bin_path.stat().st_size
    expected = -(-size // manifest.block_bytes)
    if len(manifest.bin_crc32) != expected:
        return [f"{shard.prefix}.json: {len(manifest.bin_crc32)} checksums, the .bin has {expected} blocks"]
    with shard.bin_path.open("rb") as file:
        for block in chosen:
            file.seek(block * manifest.block_bytes)
            crc, left = 0, min(manifest.block_bytes, size - block * manifest.block_bytes)
            while left:
                piece = file.read(min(left, 2**20))
                crc, left = zlib.crc32(piece, crc), left - len(piece)
            if crc != manifest.bin_crc32[block]:
                place = f"bytes {block * manifest.block_bytes:,} on"
                return [f"{shard.bin_path}: wrong checksum at {place}: changed or damaged; copy or tokenize it again"]
    return []


def _check_ends(shard: IndexedShard, eos_id: int) -> list[str]:
    """Whether documents end with EOS, on a sample with a fixed seed."""
    chosen = random.Random(0).sample(range(shard.num_documents), min(shard.num_documents, _SAMPLED_DOCUMENTS))
    for document in sorted(chosen):
        start, stop = shard.document_range(document, document + 1)
        if start == stop or shard.read(stop - 1, stop)[0] != eos_id:
            return [
                f"{shard.bin_path}: document {document} does not end with EOS (id {eos_id}); tokenize again with EOS"
            ]
    return []


def _verify_bare(shard: IndexedShard, whole: bool, vocab_size: int | None) -> list[str]:
    notes = [f"{shard.prefix}: no manifest: tokenizer and checksums not verified"]
    if not whole:
        return [*notes, f"{shard.bin_path}: above 4 GiB: ids are checked as they are read"]
    problems = []
    positions = shard.document_positions(np.arange(shard.num_documents + 1))
    if (np.diff(positions) < 0).any() or positions[-1] != shard.num_tokens:
        problems.append(f"{shard.idx_path}: damaged: document positions do not rise")
    for start, ids in _chunks(shard):
        low, high = int(ids.min()), int(ids.max())
        if low < 0 or (vocab_size is not None and high >= vocab_size):
            wrong = low if low < 0 else high
            problems.append(
                f"{shard.bin_path}: id {wrong} among tokens {start:,} on is not below the vocabulary size {vocab_size}"
            )
            break
    if problems:
        raise UserError(*problems)
    return notes


def _chunks(shard: IndexedShard, size: int = 2**20) -> Iterator[tuple[int, np.ndarray]]:
    for start in range(0, shard.num_tokens, size):
        yield start, shard.read(start, min(start + size, shard.num_tokens))

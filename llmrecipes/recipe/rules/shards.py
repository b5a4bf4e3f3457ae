"""Token shards on disk against the recipe: files, vocabulary, tokenizer, length.

Paths start from the current folder.
"""

from __future__ import annotations

import json
from collections.abc import Iterator
from pathlib import Path
from typing import Any

from llmrecipes.recipe.problem import Path as Keys
from llmrecipes.recipe.rules.facts import CONFIG, DATA, Facts, Finding

# Bytes of an id by the type code that Megatron stores in the .idx, after the 9 bytes of magic and 8 of the version.
_ID_BYTES = {1: 1, 3: 2, 4: 4, 5: 8, 8: 2}
_CODE_OFFSET = 17


def shard_problems(facts: Facts) -> Iterator[Finding]:
    """Missing files, a vocabulary or sequence too large for them, sources of different tokenizers."""
    if not str(facts.get("data", "class_path")).endswith("PackedShards"):
        return
    tokenizers: dict[str, str] = {}
    for path, prefix in _sources(facts):
        missing = [f"{prefix}{suffix}" for suffix in (".bin", ".idx") if not _is_file(f"{prefix}{suffix}")]
        if missing:
            folder = _is_folder(prefix)
            hint = (
                "this is a folder: write <folder>/<name of the shard>"
                if folder
                else "make it: llmrecipes data tokenize"
            )
            yield Finding(path, f"missing file{'s' if len(missing) > 1 else ''} {' and '.join(missing)}", hint)
            continue
        manifest = _manifest(prefix)
        yield from _against_shard(facts, prefix, manifest)
        sha = manifest.get("tokenizer_sha256")
        if isinstance(sha, str) and sha:
            tokenizers[prefix] = sha
            first = next(iter(tokenizers))
            if tokenizers[first] != sha:
                yield Finding(path, f"{prefix} and {first} were made with different tokenizers", "tokenize one again")
    tokenizer = facts.get(*DATA, "tokenizer")
    if isinstance(tokenizer, str) and not _is_folder(tokenizer):
        yield Finding((*DATA, "tokenizer"), f"missing folder {tokenizer} (the tokenizer)")


def _against_shard(facts: Facts, prefix: str, manifest: dict[str, Any]) -> Iterator[Finding]:
    vocabulary, needed = facts.integer(*CONFIG, "vocab_size"), manifest.get("vocab_size")
    if vocabulary is not None and isinstance(needed, int) and vocabulary < needed:
        what = f"the model's vocab_size {vocabulary:,} is smaller than the tokenizer's of {prefix}, {needed:,}"
        yield Finding((*CONFIG, "vocab_size"), what, f"use {needed} or more")
    length, tokens = facts.integer(*DATA, "seq_len"), manifest.get("num_tokens", _count_tokens(prefix))
    if length is not None and isinstance(tokens, int) and length + 1 > tokens:
        what = f"data.init_args.seq_len {length:,} is too long for {prefix}, which holds {tokens:,} tokens"
        yield Finding((*DATA, "seq_len"), what, f"use at most {max(1, tokens - 1)}")


def _sources(facts: Facts) -> list[tuple[Keys, str]]:
    train: list[tuple[Keys, str]] = [((*DATA, "train", prefix), prefix) for prefix in facts.mapping(*DATA, "train")]
    valid = facts.mapping(*DATA, "valid").items()
    train += [((*DATA, "valid", name), prefix) for name, prefix in valid if isinstance(prefix, str)]
    listed = facts.get(*DATA, "valid_from")
    others = enumerate(listed) if isinstance(listed, list) else ()
    return train + [((*DATA, "valid_from", i), prefix) for i, prefix in others if isinstance(prefix, str)]


def _manifest(prefix: str) -> dict[str, Any]:
    """The sidecar; empty where there is none (Megatron's own shards) or it cannot be read (the loader says why)."""
    try:
        content = json.loads(Path(f"{prefix}.json").read_text(encoding="utf-8"))
    except (OSError, ValueError, RecursionError):
        return {}
    return content if isinstance(content, dict) else {}


def _count_tokens(prefix: str) -> int | None:
    try:
        with Path(f"{prefix}.idx").open("rb") as file:
            header = file.read(_CODE_OFFSET + 1)
        width = _ID_BYTES.get(header[_CODE_OFFSET]) if len(header) > _CODE_OFFSET else None
        return Path(f"{prefix}.bin").stat().st_size // width if width else None
    except OSError:
        return None


def _is_file(name: str) -> bool:
    try:
        return Path(name).is_file()
    except (OSError, ValueError):  # a name too long, or with a zero byte
        return False


def _is_folder(name: str) -> bool:
    try:
        return Path(name).is_dir()
    except (OSError, ValueError):
        return False

"""Nested sets of examples: chance is a hash of the seed and the example. Torch-free."""

from __future__ import annotations

import hashlib
from collections.abc import Sequence
from pathlib import Path

from llmrecipes.errors import UserError
from llmrecipes.lines import read_bytes


def read_examples(files: Sequence[str]) -> list[bytes]:
    """Every line of the files that holds something, each text once.

    Raises:
        UserError: a file is missing or broken.
    """
    missing = [f"{name}: no such file" for name in files if not Path(name).is_file()]
    if missing:
        raise UserError(*missing)
    lines = [line.strip() for name in files for line in read_bytes(Path(name)).splitlines()]
    return list(dict.fromkeys(line for line in lines if line))


def in_order(examples: Sequence[bytes], seed: int) -> list[bytes]:
    """The examples in an order of the seed's, whatever order they stand in: its first n are the set of n."""
    return sorted(examples, key=lambda line: hashlib.sha256(f"{seed}:".encode() + line).digest())


def write_subset(path: Path, examples: Sequence[bytes], seed: int, count: int) -> None:
    """Write the set of ``count``, in the order that the files had.

    Raises:
        UserError: there are fewer examples.
    """
    if count > len(examples):
        raise UserError(f"examples: {count} are asked for, but there are {len(examples)}; leave the number out")
    chosen = set(in_order(examples, seed)[:count])
    path.parent.mkdir(parents=True, exist_ok=True)
    data = b"".join(line + b"\n" for line in examples if line in chosen)
    if path.exists() and path.read_bytes() == data:
        return
    temporary = path.with_name(f".{path.name}")
    temporary.write_bytes(data)
    temporary.replace(path)

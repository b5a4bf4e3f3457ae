"""Files that are on the disk when the call returns, with the checksum of what was meant to be written."""

from __future__ import annotations

import hashlib
import os
from collections.abc import Iterable
from pathlib import Path
from typing import IO, Any, TypedDict


class FileRecord(TypedDict):
    """What a manifest says of a file."""

    bytes: int
    sha256: str


def write_file(path: Path, pieces: Iterable[Any]) -> FileRecord:
    """Write ``pieces`` (bytes or arrays of bytes) one after the other, and flush to disk.

    Returns:
        Size and checksum of the pieces, computed from memory: reading the file again tells whether the disk kept them.
    """
    digest, size = hashlib.sha256(), 0
    with path.open("wb") as file:
        for piece in pieces:
            put(file, piece)
            digest.update(piece)
            size += memoryview(piece).nbytes
        file.flush()
        os.fsync(file.fileno())
    return {"bytes": size, "sha256": digest.hexdigest()}


def put(file: IO[bytes], piece: Any) -> None:
    """The one place through which bytes of a checkpoint reach the disk."""
    file.write(piece)


def difference(path: Path, expected: FileRecord) -> str | None:
    """How a file differs from its record, or None.

    Raises:
        OSError: it cannot be read.
    """
    size = path.stat().st_size
    if size != expected["bytes"]:
        return f"has {size} bytes, {expected['bytes']} were written"
    with path.open("rb") as file:
        found = hashlib.file_digest(file, "sha256").hexdigest()
    return None if found == expected["sha256"] else "has a wrong checksum"


def sync_folder(path: Path) -> None:
    """Flush the names in a folder to disk."""
    descriptor = os.open(path, os.O_RDONLY)
    try:
        os.fsync(descriptor)
    finally:
        os.close(descriptor)

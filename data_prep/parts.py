"""Finished parts of a long job on disk, so that a job that was killed goes on where it was."""

from __future__ import annotations

import fcntl
import json
import os
import shutil
import zipfile
from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path
from types import TracebackType

import numpy as np

from llmrecipes.errors import UserError


@dataclass(frozen=True)
class Part:
    """The tokenized documents of one chunk.

    Attributes:
        tokens: ids of all documents, one after another, in the shard's dtype.
        lengths: tokens of each document [D], int64.
        characters: characters of each document [D], int64.
        num_bytes: UTF-8 bytes of all documents.
        num_empty: documents left out because they hold no text.
    """

    tokens: np.ndarray
    lengths: np.ndarray
    characters: np.ndarray
    num_bytes: int
    num_empty: int

    def save(self, file: Path) -> None:
        """Writes the part; under its name it is complete or absent."""
        partial = file.with_name(f".{file.name}.{os.getpid()}.tmp")
        with partial.open("wb") as stream:
            counts = np.array([self.num_bytes, self.num_empty], dtype=np.int64)
            np.savez(stream, tokens=self.tokens, lengths=self.lengths, characters=self.characters, counts=counts)
            stream.flush()
            os.fsync(stream.fileno())
        partial.replace(file)

    @classmethod
    def load(cls, file: Path) -> Part:
        """Reads a part; numpy checks its CRC."""
        with np.load(file) as saved:
            num_bytes, num_empty = (int(count) for count in saved["counts"])
            return cls(saved["tokens"], saved["lengths"], saved["characters"], num_bytes, num_empty)


class Parts:
    """The folder `<prefix>.parts`: numbered parts, the key of the job they belong to, and a lock.

    Use as a context manager: one process at a time may hold it.

    Args:
        prefix: path of the result without its ending.
        key: hash of everything that decides the bytes of the parts.
        overwrite: throw away the parts of another job.
    """

    def __init__(self, prefix: Path, key: str, overwrite: bool) -> None:
        self.prefix = prefix
        self.folder = Path(f"{prefix}.parts")
        self._key = key
        self._overwrite = overwrite

    def __enter__(self) -> Parts:
        """Raises UserError when another process works here, or the parts belong to another job."""
        self.folder.mkdir(parents=True, exist_ok=True)
        # Held until the process ends, however it ends; the file is in the folder, so it goes with it.
        self._lock = (self.folder / "lock").open("w")
        try:
            fcntl.flock(self._lock, fcntl.LOCK_EX | fcntl.LOCK_NB)
        except OSError:
            self._lock.close()
            raise UserError(f"{self.folder}: another process is making {self.prefix} now; wait for it") from None
        job = self.folder / "job.json"
        begun = json.loads(job.read_text())["key"] if job.is_file() else None
        if begun not in (None, self._key):
            if not self._overwrite:
                self._lock.close()
                raise UserError(
                    f"{self.folder}: begun with other inputs or options; finish with those, or say --overwrite true"
                )
            job.unlink()
        if begun != self._key:
            for stale in self.folder.glob("*.npz"):
                stale.unlink()
            partial = self.folder / "job.json.tmp"
            partial.write_text(json.dumps({"key": self._key}))
            partial.replace(job)
        for unfinished in self.folder.glob(".*.tmp"):
            unfinished.unlink()
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        self._lock.close()

    def file(self, number: int) -> Path:
        """Where part `number` is, or will be."""
        return self.folder / f"{number:06d}.npz"

    def has(self, number: int) -> bool:
        """Whether part `number` is finished; a damaged one is not."""
        return zipfile.is_zipfile(self.file(number))

    def num_done(self) -> int:
        """How many parts are there."""
        return len(list(self.folder.glob("*.npz")))

    def read(self, num_parts: int) -> Iterator[Part]:
        """Parts 0 .. num_parts - 1, in order.

        Raises:
            UserError: a part was damaged on disk; it is removed, so that the next run makes it again.
        """
        for number in range(num_parts):
            try:
                yield Part.load(self.file(number))
            except zipfile.BadZipFile:
                self.file(number).unlink()
                raise UserError(f"{self.file(number)}: damaged and removed; run the same command again") from None

    def remove(self) -> None:
        """Deletes the folder, once its contents are in the result."""
        shutil.rmtree(self.folder)

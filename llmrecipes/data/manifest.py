"""The JSON sidecar of a shard, ``<prefix>.json``: what Megatron's two files cannot say of themselves."""

from __future__ import annotations

import json
import zlib
from collections.abc import Sequence
from dataclasses import asdict, dataclass, field, fields
from pathlib import Path

from llmrecipes.errors import UserError

FORMAT = 1
BLOCK_BYTES = 64 * 2**20


@dataclass(frozen=True, kw_only=True)
class Manifest:
    """What is known of a shard.

    Args:
        vocab_size: number of ids of the tokenizer; every id is below it.
        eos_id: id of the piece that ends each document.
        tokenizer_sha256: hash of the tokenizer's vocabulary file (``Tokenizer.sha256``).
        tokenizer: name of the tokenizer's folder, without its path.
        dtype: numpy name of the stored ids.
        num_documents, num_tokens: counts; EOS is a token.
        num_characters: characters of the text, without EOS; 0 when unknown.
        max_id: largest id in the shard.
        sources: the files the text came from, ``{"name": ..., "sha256" or "bytes": ...}``.
        config_hash: hash of the options that made the shard.
        bin_crc32: CRC-32 of each block of ``block_bytes`` of the ``.bin``; a block can be checked alone.
        idx_crc32: CRC-32 of the whole ``.idx``.
    """

    vocab_size: int
    eos_id: int
    tokenizer_sha256: str
    tokenizer: str
    dtype: str
    num_documents: int
    num_tokens: int
    max_id: int
    bin_crc32: Sequence[int]
    idx_crc32: int
    num_characters: int = 0
    sources: Sequence[dict[str, str | int]] = field(default_factory=tuple)
    config_hash: str = ""
    block_bytes: int = BLOCK_BYTES
    format: int = FORMAT

    def write(self, path: Path) -> None:
        """Write as JSON to ``path``; the caller renames it into place."""
        path.write_text(json.dumps(asdict(self), indent=1, ensure_ascii=False) + "\n", encoding="utf-8")

    @classmethod
    def read(cls, prefix: str | Path) -> Manifest | None:
        """The manifest of a shard, or None where there is none (Megatron's own shards).

        Raises:
            UserError: the file is not a manifest, or of a later format.
        """
        path = Path(f"{prefix}.json")
        if not path.exists():
            return None
        try:
            content = json.loads(path.read_text(encoding="utf-8"))
            version = content["format"]
        except (ValueError, KeyError, TypeError) as error:
            raise UserError(f"{path}: not the manifest of a shard ({error}); delete it or tokenize again") from None
        if version != FORMAT:
            raise UserError(f"{path}: manifest format {version}, this version reads {FORMAT}; tokenize again or update")
        known = {f.name for f in fields(cls)}
        try:
            return cls(**{key: value for key, value in content.items() if key in known})
        except TypeError as error:
            raise UserError(f"{path}: the manifest is incomplete ({error}); tokenize again") from None


class BlockChecksum:
    """CRC-32 of each block of a stream, fed in pieces of any size."""

    def __init__(self, block_bytes: int = BLOCK_BYTES) -> None:
        self.block_bytes = block_bytes
        self._done: list[int] = []
        self._crc = 0
        self._filled = 0

    def update(self, data: bytes | memoryview) -> None:
        """Take the next bytes of the stream."""
        view = memoryview(data).cast("B")
        while len(view):
            piece = view[: self.block_bytes - self._filled]
            self._crc = zlib.crc32(piece, self._crc)
            self._filled += len(piece)
            view = view[len(piece) :]
            if self._filled == self.block_bytes:
                self._done.append(self._crc)
                self._crc = self._filled = 0

    @property
    def blocks(self) -> list[int]:
        """Checksums so far; the last block may be short."""
        return [*self._done, self._crc] if self._filled else list(self._done)


def file_crc32(path: Path) -> int:
    """CRC-32 of a whole file, read 1 MiB at a time."""
    crc = 0
    with path.open("rb") as file:
        while piece := file.read(2**20):
            crc = zlib.crc32(piece, crc)
    return crc

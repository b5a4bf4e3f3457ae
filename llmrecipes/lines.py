"""Lines and bytes of files, plain, .gz or .zst by the name's ending: the one place that uncompresses. Torch-free."""

from __future__ import annotations

import gzip
import zlib
from collections.abc import Iterator
from pathlib import Path
from typing import IO

from llmrecipes.errors import UserError

BLOCK_BYTES = 1 << 20


def read_lines(path: Path) -> Iterator[tuple[bytes, int]]:
    """Lines without their newline, and the position in the (compressed) file after each.

    Raises:
        UserError: a truncated or corrupt archive.
    """
    with path.open("rb") as file:
        rest = list[bytes]()
        for block in uncompressed_blocks(path, file):
            head, *more = block.split(b"\n")
            rest.append(head)
            if more:
                position = file.tell()
                yield b"".join(rest), position
                for line in more[:-1]:
                    yield line, position
                rest = [more[-1]]
        if any(rest):
            yield b"".join(rest), file.tell()


def read_bytes(path: Path) -> bytes:
    """The whole of a file, uncompressed by its name's ending.

    Raises:
        UserError: a truncated or corrupt archive.
    """
    with path.open("rb") as file:
        return b"".join(uncompressed_blocks(path, file))


def uncompressed_blocks(path: Path, file: IO[bytes]) -> Iterator[bytes]:
    """Blocks of what is in ``file``, open for reading, by the ending of its name.

    Raises:
        UserError: a truncated or corrupt archive.
    """
    try:
        if path.suffix == ".zst":
            yield from _zstd_blocks(file)
        elif path.suffix == ".gz":
            with gzip.open(file) as stream:
                while block := stream.read(BLOCK_BYTES):
                    yield block
        else:
            while block := file.read(BLOCK_BYTES):
                yield block
    except (EOFError, zlib.error, gzip.BadGzipFile) as error:
        raise UserError(f"{path}: broken archive ({error}); copy or download the file again") from None


def _zstd_blocks(file: IO[bytes]) -> Iterator[bytes]:
    """Blocks of all zstd frames. The library's own stream reader takes a truncated frame for a short file."""
    import zstandard

    inflater = None
    while data := file.read(BLOCK_BYTES):
        while data:
            inflater = inflater or zstandard.ZstdDecompressor().decompressobj()
            try:
                block = inflater.decompress(data)
            except zstandard.ZstdError as error:
                raise EOFError(str(error)) from None
            data = b""
            if inflater.eof:
                data, inflater = inflater.unused_data, None
            if block:
                yield block
    if inflater is not None:
        raise EOFError("the last frame is not complete")

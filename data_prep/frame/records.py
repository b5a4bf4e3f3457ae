"""Documents out of JSONL and into JSONL. Whatever cannot be read is reported with its place and counted, never raised.

(`data_prep.jsonl` is the strict reader of the stages that must not miss a line: tokenizer and tokenize.)
"""

from __future__ import annotations

import glob
import gzip
import json
import os
from collections.abc import Callable, Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import IO, Any, Literal

from llmrecipes.errors import UserError
from llmrecipes.lines import uncompressed_blocks

Format = Literal["zst", "gz", "plain"]
ENDINGS = {"zst": ".jsonl.zst", "gz": ".jsonl.gz", "plain": ".jsonl"}
READABLE = (".jsonl", ".jsonl.gz", ".jsonl.zst")


@dataclass(slots=True)
class Document:
    """One line: its text and UTF-8 size, its record with all fields, the line's number (from 1) and the line itself."""

    text: str
    num_bytes: int
    record: dict[str, Any]
    line: int
    raw: bytes


@dataclass(slots=True)
class Broken:
    """A line that is no document: why in one word, why in one sentence, where, and how many bytes it has."""

    reason: str
    detail: str
    line: int
    num_bytes: int


def read_documents(
    path: Path,
    field: str,
    max_bytes: float,
    advance: Callable[[int], None] | None = None,
    conversation: bool = False,
) -> Iterator[Document | Broken]:
    """Every line of a file, blank ones aside.

    Args:
        path: plain, .gz or .zst.
        field: name of the field with the text.
        max_bytes: longer lines are `too_large`, and are never held in memory.
        advance: called with the number of (compressed) bytes consumed since the last call.
        conversation: the field holds messages (role, content); the document's text is all of them.
    """
    for number, line in enumerate(_lines(path, max_bytes, advance), start=1):
        if isinstance(line, Broken):
            line.line = number
            yield line
        elif line and not line.isspace():
            yield _document(line, field, number, conversation)


def _document(line: bytes, field: str, number: int, conversation: bool) -> Document | Broken:
    try:
        record = json.loads(line)
        if not isinstance(record, dict):
            return Broken("not_an_object", f"a JSON {type(record).__name__}, not an object", number, len(line))
        if field not in record:
            has = ", ".join(list(record)[:8]) or "none"
            return Broken("no_text_field", f"no field {field!r} (fields here: {has})", number, len(line))
        text = _joined(record[field]) if conversation else record[field]
        if text is None and conversation:
            return Broken("no_conversation", f"field {field!r} is no list of role and content", number, len(line))
        if not isinstance(text, str):
            kind = type(text).__name__
            return Broken("text_is_no_string", f"field {field!r} is a {kind}, not a string", number, len(line))
        num_bytes = len(text.encode())  # half of a surrogate pair passes JSON but is no text
    except (UnicodeDecodeError, UnicodeEncodeError) as error:
        return Broken("invalid_utf8", f"not valid UTF-8 ({error.reason})", number, len(line))
    except (ValueError, RecursionError) as error:
        return Broken("not_json", f"not JSON ({str(error)[:80]})", number, len(line))
    if not text or text.isspace():
        return Broken("empty", "no text", number, len(line))
    return Document(text, num_bytes, record, number, line)


def _joined(messages: Any) -> str | None:
    """The messages of a conversation as one text; None for what is none."""
    if not isinstance(messages, list) or not all(
        isinstance(m, dict) and isinstance(m.get("role"), str) and isinstance(m.get("content"), str) for m in messages
    ):
        return None
    return "\n".join(f"{message['role']}: {message['content']}" for message in messages)


def _lines(path: Path, max_bytes: float, advance: Callable[[int], None] | None) -> Iterator[bytes | Broken]:
    """Lines without their newline; a line that is too long is thrown away while it is read."""
    rest, size, position = list[bytes](), 0, 0

    def finished() -> bytes | Broken:
        if size > max_bytes:
            limit = f"{max_bytes / 1e6:g}"
            return Broken("too_large", f"{size / 1e6:.1f} MB in a line; max_document_mb is {limit}", 0, size)
        return b"".join(rest)

    with path.open("rb") as file:
        try:
            for block in uncompressed_blocks(path, file):
                head, *more = block.split(b"\n")
                for piece in (head, *more):
                    if piece is not head:
                        yield finished()
                        rest, size = [], 0
                    size += len(piece)
                    if size <= max_bytes:
                        rest.append(piece)
                    else:
                        rest = []
                if advance:
                    advance(file.tell() - position)
                    position = file.tell()
        except UserError as error:
            yield Broken("broken_archive", f"{str(error).partition(': ')[2]}; what follows is lost", 0, size)
            return
        if size:
            yield finished()


class JsonlWriter:
    """Writes one JSONL file; under its name it is complete or absent, and its bytes depend on the records only.

    Use as a context manager. An exception leaves nothing behind.
    """

    def __init__(self, path: Path, format: Format) -> None:
        self.path = path
        self.num_lines = 0
        path.parent.mkdir(parents=True, exist_ok=True)
        self._partial = partial_name(path)
        self._raw = self._partial.open("wb")
        self._stream = _compressed(self._raw, format)

    def write(self, record: dict[str, Any]) -> None:
        """Appends one record."""
        line = json.dumps(record, ensure_ascii=False)
        try:
            data = line.encode()
        except UnicodeEncodeError:  # half of a surrogate pair in another field than the text
            data = json.dumps(record).encode()
        self.write_line(data)

    def write_line(self, line: bytes) -> None:
        """Appends a line that is JSON already."""
        self._stream.write(line + b"\n")
        self.num_lines += 1

    def __enter__(self) -> JsonlWriter:
        return self

    def __exit__(self, kind: type[BaseException] | None, error: object, trace: object) -> None:
        if self._stream is not self._raw:
            self._stream.close()
        if kind is None:
            self._raw.flush()
            os.fsync(self._raw.fileno())
        self._raw.close()
        if kind is None:
            self._partial.replace(self.path)
        else:
            self._partial.unlink(missing_ok=True)


def _compressed(raw: IO[bytes], format: Format) -> IO[bytes]:
    if format == "gz":  # no name and no time in the header: the same records give the same bytes
        return gzip.GzipFile(filename="", mode="wb", compresslevel=6, fileobj=raw, mtime=0)  # type: ignore[return-value]
    if format == "zst":
        import zstandard

        return zstandard.ZstdCompressor(level=3, write_checksum=True).stream_writer(raw, closefd=False)  # type: ignore[return-value]
    return raw


def partial_name(path: Path) -> Path:
    """The name of `path` while it is being written by this process."""
    return path.with_name(f".{path.name}.{os.uname().nodename}.{os.getpid()}.tmp")


def write_json(path: Path, value: Any) -> None:
    """A JSON file, whole or not at all."""
    path.parent.mkdir(parents=True, exist_ok=True)
    partial = partial_name(path)
    with partial.open("w") as stream:
        stream.write(json.dumps(value, ensure_ascii=False, indent=1) + "\n")
        stream.flush()
        os.fsync(stream.fileno())
    partial.replace(path)


def remove_leftovers(path: Path) -> None:
    """Deletes what dead processes of this machine had begun to write for `path`, whatever its ending."""
    for leftover in path.parent.glob(f".{glob.escape(path.name)}.*{os.uname().nodename}.*.tmp"):
        pid = leftover.name.split(".")[-2]
        if pid.isdecimal() and not Path(f"/proc/{pid}").exists():
            leftover.unlink(missing_ok=True)

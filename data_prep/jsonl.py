"""Documents out of JSONL files (plain, .gz, .zst) and Hugging Face dataset folders, in chunks of known place.

All or nothing: a broken line or a missing field is the user's mistake, named `file:line`; nothing is silently skipped.
Chunks hold undecoded lines, so that the costly parsing happens in the process that needs the texts.
"""

from __future__ import annotations

import hashlib
import json
from collections.abc import Iterator
from dataclasses import dataclass, field
from pathlib import Path

from llmrecipes.errors import UserError
from llmrecipes.lines import read_lines


@dataclass(frozen=True)
class Chunk:
    """Consecutive lines of one input.

    Attributes:
        source: the file or folder, as the user named it.
        first: number of the first line (from 1), or of the first row (from 0) of a dataset folder.
        lines: JSON lines, or the UTF-8 texts themselves when `is_text`.
        is_text: whether the lines are texts (dataset folder) and not JSON.
        position: about how many of the input's `input_size` bytes are consumed after this chunk, for a progress bar.
    """

    source: str
    first: int
    lines: list[bytes]
    is_text: bool
    position: int


@dataclass
class Texts:
    """The non-empty documents of a chunk; `num_empty` counts those skipped because they hold no text."""

    texts: list[str] = field(default_factory=list)
    num_empty: int = 0


def check_inputs(inputs: list[str]) -> list[Path]:
    """The inputs as paths.

    Raises:
        UserError: one line for every input that is missing, repeated or neither JSONL nor a dataset folder.
    """
    problems = [] if inputs else ["no input: name one or more .jsonl, .jsonl.gz, .jsonl.zst files with --input"]
    for place, name in enumerate(inputs):
        path = Path(name)
        if name in inputs[:place]:
            problems.append(f"{name}: given twice: its documents would count double; name it once")
        elif not path.exists():
            problems.append(f"{name}: no such file or folder" + _neighbours(path))
        elif path.is_dir() and not is_dataset_folder(path):
            problems.append(f"{name}: a folder, but no dataset written by save_to_disk; name the files in it instead")
    if problems:
        raise UserError(*problems)
    return [Path(name) for name in inputs]


def is_dataset_folder(path: Path) -> bool:
    """Whether `path` was written by `datasets.Dataset.save_to_disk` (one split)."""
    return (path / "dataset_info.json").is_file() and (path / "state.json").is_file()


def stem(path: Path) -> str:
    """The name without its endings: `ja_wiki` for `raw/ja_wiki.jsonl.gz`."""
    return path.name.removesuffix(".gz").removesuffix(".zst").removesuffix(".jsonl").removesuffix(".json")


def input_files(path: Path) -> list[Path]:
    """The file itself, or the data files of a dataset folder in its order."""
    if not path.is_dir():
        return [path]
    state = json.loads((path / "state.json").read_text())
    return [path / entry["filename"] for entry in state["_data_files"]]


def input_size(path: Path) -> int:
    """Bytes on disk: the end of `Chunk.position`."""
    return sum(file.stat().st_size for file in input_files(path))


def fingerprint(path: Path) -> str:
    """SHA-256 of the contents (not the name) of an input; a gigabyte takes a second or two."""
    digest = hashlib.sha256()
    for file in input_files(path):
        with file.open("rb") as stream:
            digest.update(hashlib.file_digest(stream, "sha256").digest())
    return digest.hexdigest()


def chunks(path: Path, text_field: str = "text", chunk_bytes: int = 8 << 20) -> Iterator[Chunk]:
    """Cuts one input into chunks of at least `chunk_bytes` of lines (the last may be less).

    The cuts depend on the contents and `chunk_bytes` only, so chunk number i is the same in every run.

    Raises:
        UserError: a truncated or corrupt archive; a dataset folder without the column.
    """
    source, lines, size, first = str(path), list[bytes](), 0, 0 if path.is_dir() else 1
    position = 0
    for line, position in _rows(path, text_field) if path.is_dir() else read_lines(path):
        lines.append(line)
        size += len(line)
        if size >= chunk_bytes:
            yield Chunk(source, first, lines, path.is_dir(), position)
            first, lines, size = first + len(lines), [], 0
    if lines:
        yield Chunk(source, first, lines, path.is_dir(), position)


def parse(chunk: Chunk, text_field: str = "text") -> Texts:
    """Decodes a chunk.

    Raises:
        UserError: every broken line of the chunk (the first 20), each `file:line: what: what to do`.
    """
    found, problems = Texts(), list[str]()
    for offset, line in enumerate(chunk.lines):
        where = f"{chunk.source}:{chunk.first + offset}"
        try:
            text = line.decode() if chunk.is_text else _text_of(line, text_field)
            text.encode()  # half of a surrogate pair passes JSON but is no text
        except ValueError as error:
            problems.append(f"{where}: {_reason(error)}")
            continue
        if text and not text.isspace():
            found.texts.append(text)
        else:
            found.num_empty += 1
    if problems:
        rest = [f"{chunk.source}: and {len(problems) - 20} more broken lines near here"] if len(problems) > 20 else []
        raise UserError(*problems[:20], *rest)
    return found


def documents(path: Path, text_field: str = "text") -> Iterator[str]:
    """Every non-empty document of one input, in order (see `parse` for errors)."""
    for chunk in chunks(path, text_field):
        yield from parse(chunk, text_field).texts


def _text_of(line: bytes, text_field: str) -> str:
    """The text of one JSON line; an empty line is an empty document. Raises ValueError with the reason."""
    if not line.strip():
        return ""
    record = json.loads(line)
    if not isinstance(record, dict):
        raise ValueError(f"a JSON {type(record).__name__}, but one object a line is expected")
    if text_field not in record:
        has = ", ".join(list(record)[:8]) or "none"
        raise ValueError(f"no field {text_field!r} (fields here: {has}); name the right one with --field")
    if not isinstance(record[text_field], str):
        kind = type(record[text_field]).__name__
        raise ValueError(f"field {text_field!r} is a {kind}, not a string; mend the line or choose another --field")
    return record[text_field]


def _reason(error: ValueError) -> str:
    if isinstance(error, json.JSONDecodeError):
        return f"not JSON ({error.msg} at column {error.colno}); mend or remove the line"
    if isinstance(error, UnicodeDecodeError | UnicodeEncodeError):
        return f"not valid UTF-8 ({error.reason}); mend or remove the line"
    return str(error)


def _neighbours(path: Path) -> str:
    import difflib

    names = sorted(p.name for p in path.parent.iterdir()) if path.parent.is_dir() else []
    close = difflib.get_close_matches(path.name, names, n=1)
    return f" - did you mean {str(path.parent / close[0])!r}?" if close else ""


def _rows(path: Path, text_field: str) -> Iterator[tuple[bytes, int]]:
    """Texts of a dataset folder's column as UTF-8, and the position after each."""
    import datasets

    rows = datasets.load_from_disk(str(path))
    if text_field not in rows.column_names:
        raise UserError(f"{path}: no column {text_field!r} (columns: {', '.join(rows.column_names)}); use --field")
    done, num_bytes = 0, input_size(path)
    for batch in rows.select_columns([text_field]).iter(batch_size=1000):
        for text in batch[text_field]:
            if not isinstance(text, str):
                raise UserError(f"{path}: row {done} of column {text_field!r} is a {type(text).__name__}, not a string")
            done += 1
            yield text.encode("utf-8", "surrogatepass"), num_bytes * done // len(rows)

"""`llmrecipes data import`: whatever text comes in, as JSONL in files of one size, with its source and licence."""

from __future__ import annotations

import csv
import json
import re
from collections.abc import Callable, Iterator
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any, Literal

from data_prep.frame.config import Finding, StageConfig
from data_prep.frame.map import count_broken, token_counter, write_manifest
from data_prep.frame.records import ENDINGS, READABLE, Broken, Document, JsonlWriter, read_documents
from data_prep.frame.shards import Advance, Shard, open_output, run_shards
from data_prep.frame.tally import Flow, Tally
from data_prep.jsonl import is_dataset_folder
from llmrecipes.errors import UserError

OTHER = (".parquet", ".csv", ".tsv", ".txt")
_WIKI40B = re.compile(r"\s*_START_(ARTICLE|SECTION|PARAGRAPH)_\s*")


@dataclass(frozen=True, kw_only=True)
class ImportConfig(StageConfig):
    """Recipe of `data import`: its inputs may also be .parquet, .csv, .tsv, .txt and folders of save_to_disk.

    Args:
        columns: other fields to keep; null keeps all.
        add: fields to add to every record, such as source, licence and lang.
        marks: wiki40b turns its marks (_START_ARTICLE_, _NEWLINE_ and so on) into line ends.
        split: where a document of a .txt ends: at the end of the file, at an empty line, or at every line.
        shard_mb: a result file is closed when it holds this much text, so that later stages can share the work.
    """

    columns: list[str] | None = None
    add: dict[str, str] = field(default_factory=dict)
    marks: Literal["none", "wiki40b"] = "none"
    split: Literal["file", "paragraph", "line"] = "paragraph"
    shard_mb: float = 256.0

    def problems(self) -> Iterator[Finding]:
        """A size that would never close a file, and a field that would overwrite the text."""
        yield from super().problems()
        if self.shard_mb <= 0:
            yield ("shard_mb",), f"shard_mb: {self.shard_mb} is no size", "write 256"
        if self.field in self.add:
            yield ("add", self.field), f"add: {self.field} is the text itself", "name another field"


def run(config: ImportConfig) -> None:
    """Imports every input, and counts what could not be read."""
    shards = find_inputs(config.input)
    output = open_output("import", config, shards)
    counts = run_shards(_import_one, "import", config, shards, output)
    if counts is None:
        return
    tally = Tally()
    for shard in shards:
        tally.merge(Tally.from_json(counts[shard.name]["tally"]), config.samples)
    write_manifest("import", config, shards, output, tally, {})


def find_inputs(inputs: list[str]) -> list[Shard]:
    """The inputs, each under the name of its results.

    Raises:
        UserError: an input is missing, of no known kind, given twice, or two would have one name.
    """
    found, problems = list[Shard](), list[str]()
    for name in inputs:
        path = Path(name)
        if path.is_dir() and (path / "dataset_dict.json").is_file():
            splits = json.loads((path / "dataset_dict.json").read_text())["splits"]
            found += [Shard(path / split, f"{path.name}-{split}") for split in splits]
        elif path.is_dir() and not is_dataset_folder(path):
            files = sorted(p for p in path.rglob("*") if p.name.endswith((*READABLE, *OTHER)))
            if not files:
                problems.append(f"{name}: nothing to import in this folder: {', '.join((*READABLE, *OTHER))}")
            found += [Shard(p, _stem("-".join(p.relative_to(path).parts))) for p in files]
        elif not path.exists():
            problems.append(f"{name}: no such file or folder")
        elif path.is_file() and not path.name.endswith((*READABLE, *OTHER)):
            problems.append(f"{name}: of no known kind: {', '.join((*READABLE, *OTHER))}, or a folder of save_to_disk")
        else:
            found.append(Shard(path, _stem(path.name)))
    by_name = dict[str, Path]()
    for shard in found:
        if shard.name in by_name:
            problems.append(f"{by_name[shard.name]} and {shard.path}: both would become {shard.name}; import one apart")
        by_name[shard.name] = shard.path
    if problems:
        raise UserError(*problems)
    return sorted(found, key=lambda shard: shard.name)


def _stem(name: str) -> str:
    for ending in (*READABLE[::-1], *OTHER):
        name = name.removesuffix(ending)
    return name


def _import_one(config: ImportConfig, shard: Shard, output: Path, advance: Advance) -> dict[str, Any]:
    tally, count, part = Tally(), token_counter(config.tokenizer), 0
    rows = documents(shard.path, config, advance)
    more = True
    while more:
        file = output / f"{shard.name}-{part:05d}{ENDINGS[config.format]}"
        with JsonlWriter(file, config.format) as writer:
            more = _fill(writer, rows, config, shard, tally, count)
        part += 1
    tally.check()
    return {"tally": tally.to_json(), "parts": part}


def _fill(
    writer: JsonlWriter, rows: Iterator[Document | Broken], config: ImportConfig, shard: Shard, tally: Tally, count: Any
) -> bool:
    """Writes until the file is full (True) or the input ends (False)."""
    size = 0
    for row in rows:
        if isinstance(row, Broken):
            count_broken(row, shard, tally, config.samples)
            continue
        text = without_wiki40b_marks(row.text) if config.marks == "wiki40b" else row.text
        before = Flow(1, len(row.text), row.num_bytes, count(row.text))
        tally.read.add(before)
        if not text:
            tally.reject("empty_without_marks", before, row.text, config.samples)
            continue
        kept = before if text == row.text else Flow(1, len(text), len(text.encode()), count(text))
        tally.kept.add(kept)
        if len(text) != len(row.text):
            tally.trim("marks", len(row.text) - len(text))
        others = {k: v for k, v in row.record.items() if k != config.field and _is_wanted(k, config.columns)}
        writer.write({config.field: text, **others, **config.add})
        size += kept.num_bytes
        if size >= config.shard_mb * 1e6:
            return True
    return False


def _is_wanted(column: str, columns: list[str] | None) -> bool:
    return columns is None or column in columns


def without_wiki40b_marks(text: str) -> str:
    """Titles, section titles and paragraphs of wiki40b, each on a line of its own, with its own line ends restored."""
    return _WIKI40B.sub("\n", text).replace("_NEWLINE_", "\n").strip()


def documents(path: Path, config: ImportConfig, advance: Advance) -> Iterator[Document | Broken]:
    """Every document of one input, of whatever kind."""
    limit = config.max_document_mb * 1e6
    if path.name.endswith(READABLE):
        yield from read_documents(path, config.field, limit, advance)
        return
    kinds: dict[str, Callable[[Path, ImportConfig], Iterator[Any]]] = {
        ".parquet": _parquet,
        ".csv": _csv,
        ".tsv": _csv,
        ".txt": _txt,
    }
    rows: Callable[[Path, ImportConfig], Iterator[Any]] = _dataset_folder if path.is_dir() else kinds[path.suffix]
    for number, row in enumerate(rows(path, config), start=1):
        yield _document(row, config.field, number, limit)
    advance(sum(p.stat().st_size for p in path.rglob("*")) if path.is_dir() else path.stat().st_size)


def _document(row: dict[str, Any] | bytes, name: str, number: int, limit: float) -> Document | Broken:
    """A row, or the raw bytes of a text, as a document."""
    text = row if isinstance(row, bytes) else row.get(name)
    try:
        if isinstance(text, bytes):
            text = text.decode()
        if not isinstance(text, str):
            return Broken("text_is_no_string", f"{name!r} is a {type(text).__name__}, not a string", number, 0)
        size = len(text.encode())
    except UnicodeError as error:
        return Broken("invalid_utf8", f"not valid UTF-8 ({error.reason})", number, 0)  # type: ignore[attr-defined]
    if size > limit:
        return Broken("too_large", f"{size / 1e6:.1f} MB; max_document_mb is {limit / 1e6:g}", number, size)
    if not text or text.isspace():
        return Broken("empty", "no text", number, size)
    others = {} if isinstance(row, bytes) else {key: _plain(value) for key, value in row.items()}
    return Document(text, size, others, number, b"")


def _plain(value: Any) -> Any:
    """A value that JSON can hold; dates and the like as text."""
    try:
        json.dumps(value)
    except (TypeError, ValueError):
        return str(value)
    return value


def _check_column(path: Path, name: str, columns: list[str]) -> None:
    if name not in columns:
        raise UserError(f"{path}: no column {name!r} (columns: {', '.join(columns)}); name the right one with --field")


def _parquet(path: Path, config: ImportConfig) -> Iterator[dict[str, Any]]:
    import pyarrow
    import pyarrow.parquet

    try:
        file = pyarrow.parquet.ParquetFile(path)
        _check_column(path, config.field, file.schema_arrow.names)
        wanted = [n for n in file.schema_arrow.names if n == config.field or _is_wanted(n, config.columns)]
        for batch in file.iter_batches(batch_size=1000, columns=wanted):
            yield from batch.to_pylist()
    except pyarrow.ArrowException as error:
        raise UserError(f"{path}: not a readable parquet file ({str(error).splitlines()[0]}); copy it again") from None


def _dataset_folder(path: Path, config: ImportConfig) -> Iterator[dict[str, Any]]:
    import datasets

    rows = datasets.load_from_disk(str(path))
    _check_column(path, config.field, rows.column_names)
    for batch in rows.iter(batch_size=1000):
        yield from (dict(zip(batch, values, strict=True)) for values in zip(*batch.values(), strict=True))


def _csv(path: Path, config: ImportConfig) -> Iterator[dict[str, Any]]:
    csv.field_size_limit(1 << 30)
    # Bytes that are no UTF-8 become surrogates, which `_document` reports row by row.
    with path.open(encoding="utf-8-sig", errors="surrogateescape", newline="") as stream:
        table = csv.DictReader(stream, delimiter="\t" if path.suffix == ".tsv" else ",")
        if table.fieldnames is None:
            return
        _check_column(path, config.field, list(table.fieldnames))
        for row in table:
            row.pop(None, None)  # type: ignore[call-overload]  # what stands beyond the last column
            yield dict(row)


def _txt(path: Path, config: ImportConfig) -> Iterator[bytes]:
    if config.split == "file":
        yield path.read_bytes()
        return
    paragraph = list[bytes]()
    with path.open("rb") as stream:
        for line in stream:
            line = line.rstrip(b"\r\n")
            if config.split == "line":
                yield line
            elif line.strip():
                paragraph.append(line)
            elif paragraph:
                yield b"\n".join(paragraph)
                paragraph = []
    if paragraph:
        yield b"\n".join(paragraph)

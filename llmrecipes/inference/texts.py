"""Documents and lines out of text and JSONL files, plain, .gz or .zst. Torch-free."""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import dataclass
from itertools import islice
from pathlib import Path

from data_prep.jsonl import check_inputs, documents
from llmrecipes.errors import UserError
from llmrecipes.lines import read_bytes

TEXT_ENDINGS = (".txt", ".md", "")


@dataclass(frozen=True)
class Document:
    """A text to be scored.

    Attributes:
        name: where it is from, for people: ``file#3`` is the third document of a file.
        corpus: the file, or ``--text``.
        text: the text.
    """

    name: str
    corpus: str
    text: str


def not_text(text: str) -> str | None:
    """Why no tokenizer can read ``text``, or None: bytes that are not UTF-8, or half of a surrogate pair."""
    try:
        text.encode("utf-8")
    except UnicodeEncodeError as error:
        return f"not valid UTF-8 at character {error.start}; mend it first"
    return None


def is_text(path: Path) -> bool:
    """Whether the name says plain text: the whole file is then one document."""
    return Path(path.name.removesuffix(".gz").removesuffix(".zst")).suffix in TEXT_ENDINGS


def read_text(path: Path) -> str:
    """The whole of a text file.

    Raises:
        UserError: it is missing, a broken archive, or not UTF-8.
    """
    if not path.is_file():
        raise UserError(f"{path}: no such file")
    try:
        return read_bytes(path).decode("utf-8")
    except UnicodeDecodeError as error:
        raise UserError(f"{path}: not valid UTF-8 at byte {error.start}; convert it first") from None


def read_lines(path: Path) -> Iterator[tuple[str, str]]:
    """``(file:line, line)`` of every line that is not empty."""
    for number, line in enumerate(read_text(path).split("\n"), 1):
        if line.strip():
            yield f"{path}:{number}", line.removesuffix("\r")


def read_documents(texts: list[str], inputs: list[str], field: str, limit: int | None) -> Iterator[Document]:
    """Each ``--text``, then the documents of each input.

    Args:
        texts: given on the command line.
        inputs: text files (one document each), JSONL files and Hugging Face dataset folders (many).
        field: name of the text in a JSON line.
        limit: at most so many documents of each input; None = all.

    Raises:
        UserError: inputs that are missing or broken, or a text that is empty.
    """
    paths = check_inputs(inputs) if inputs or not texts else []
    for number, text in enumerate(texts, 1):
        if not text.strip():
            raise UserError(f"--text (number {number}): empty; there is nothing to score")
        if reason := not_text(text):
            raise UserError(f"--text (number {number}): {reason}")
        yield Document(f"text {number}", "--text", text)
    for path in paths:
        found = iter([read_text(path)]) if path.is_file() and is_text(path) else documents(path, field)
        count = 0
        for text in islice(found, limit):
            if text.strip():
                count += 1
                yield Document(f"{path}#{count}", str(path), text)
        if count == 0:
            raise UserError(f"{path}: no text in it")

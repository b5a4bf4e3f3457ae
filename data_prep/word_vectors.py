"""Word vectors that others have trained: a word2vec text file, or those inside an installed spaCy package."""

from __future__ import annotations

import gzip
import importlib.util
from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path

import numpy as np

from data_prep.frame.extras import need
from llmrecipes.errors import UserError


@dataclass(frozen=True)
class WordVectors:
    """Words, each with its row of `matrix` [rows, size], which holds vectors of length 1 in half precision."""

    rows: dict[str, int]
    matrix: np.ndarray


def read_vectors(source: str) -> WordVectors:
    """The vectors of a word2vec text file (also .gz), or of a spaCy package such as ja_ginza.

    Raises:
        UserError: neither is there, or the file is no word2vec text.
    """
    path = Path(source)
    if path.is_file():
        return _from_text(path)
    if source.isidentifier() and (found := importlib.util.find_spec(source)) and found.origin:
        return _from_spacy(source, Path(found.origin).parent)
    raise UserError(
        f"vectors: {source!r} is neither a file nor an installed package; name a word2vec text file, or "
        "pip install 'llmrecipes[noise]' and write vectors: ja_ginza"
    )


def _from_text(path: Path) -> WordVectors:
    rows, vectors = dict[str, int](), list[np.ndarray]()
    for number, word, numbers in _lines(path):
        try:
            vector = np.array(numbers, dtype=np.float32)
        except ValueError:
            raise UserError(f"{path}:{number}: not a word and numbers; give a word2vec text file") from None
        if vectors and len(vector) != len(vectors[0]):
            raise UserError(f"{path}:{number}: {len(vector)} numbers where the first line has {len(vectors[0])}")
        if word not in rows:
            rows[word] = len(vectors)
            vectors.append(vector)
    if not vectors or not len(vectors[0]):
        raise UserError(f"{path}: no word vectors in it; give a word2vec text file")
    return WordVectors(rows, _unit(np.stack(vectors)))


def _lines(path: Path) -> Iterator[tuple[int, str, list[str]]]:
    with gzip.open(path, "rt", encoding="utf-8") if path.suffix == ".gz" else path.open(encoding="utf-8") as stream:
        for number, line in enumerate(stream, start=1):
            word, *numbers = line.rstrip().split(" ")
            if number > 1 or len(numbers) != 1:  # the first line may say how many words and how long the vectors
                yield number, word, numbers


def _from_spacy(name: str, folder: Path) -> WordVectors:
    if not (places := sorted(folder.glob(f"{name}-*/vocab/vectors"))):
        raise UserError(f"vectors: the package {name} holds no word vectors; ja_ginza does")
    vocab = places[-1].parent
    strings_of = need("spacy.strings", "spacy", "noise").StringStore
    vectors_of = need("spacy.vectors", "spacy", "noise").Vectors
    strings = strings_of().from_disk(vocab / "strings.json")
    rows = vectors_of(strings=strings).from_disk(vocab)
    known = {word: row for word in strings if (row := rows.key2row.get(strings[word])) is not None}
    return WordVectors(known, _unit(np.asarray(rows.data)))


def _unit(matrix: np.ndarray) -> np.ndarray:
    found: np.ndarray = (matrix / (np.linalg.norm(matrix, axis=1, keepdims=True) + 1e-9)).astype(np.float16)
    return found

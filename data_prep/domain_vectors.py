"""Texts as points, and how near they are to each domain: tf-idf words, a projection (SVD), unit length, centres.

The length that tf-idf vectors are brought to cancels when the projection is brought to length 1, so the point of a text
is the sum over its words of ``idf * projection``, at length 1: a text that grows needs one more addition a word.
"""

from __future__ import annotations

import json
import re
from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from pathlib import Path

import numpy as np

from llmrecipes.errors import UserError

VECTORS, VOCABULARY = "vectors.npz", "vocabulary.json"
# Runs of one script, as `data cluster` has them, and numbers, which all count as one word.
_WORDS = re.compile(
    "[\u3041-\u309f]{2,}|[\u30a1-\u30ff]+|[\u3400-\u4dbf\u4e00-\u9fff\u3005]+|[A-Za-z\u00c0-\u024f]+|[0-9]+"
)
NUMBER = "#"


def spans(text: str) -> Iterator[tuple[str, int, int]]:
    """The words of a text in lower case, with beginning and end."""
    for match in _WORDS.finditer(text):
        word = match[0]
        yield NUMBER if word[0].isdigit() else word.lower(), *match.span()


def words(text: str) -> list[str]:
    """The words of a text."""
    return [word for word, _, _ in spans(text)]


@dataclass(frozen=True)
class Domains:
    """What tells domains apart.

    Attributes:
        vocabulary: word -> row. directions: idf times projection of each word, [V, D]. centers: of the domains, [K, D].
    """

    vocabulary: dict[str, int]
    directions: np.ndarray
    centers: np.ndarray

    def points(self, texts: Sequence[str]) -> np.ndarray:
        """Each text as a point of length 1, [N, D]; zeros where no word of it is known."""
        sums = np.zeros((len(texts), self.directions.shape[1]))
        for row, text in enumerate(texts):
            known = [self.vocabulary[word] for word in words(text) if word in self.vocabulary]
            sums[row] = self.directions[known].sum(axis=0)
        return _unit(sums)

    def prefix_points(self, text: str, ends: Sequence[int]) -> np.ndarray:
        """The points of ``text[:end]`` for each end, [N, D], in one pass; `points` of the prefixes gives the same.

        A word that an end cuts counts as far as it goes.
        """
        found = list(spans(text))
        rows = [self.vocabulary.get(word, -1) for word, _, _ in found]
        steps = np.array([self.directions[row] if row >= 0 else np.zeros(self.directions.shape[1]) for row in rows])
        sums = np.concatenate(
            [np.zeros((1, self.directions.shape[1])), np.cumsum(steps.reshape(len(rows), -1), axis=0)]
        )
        stops = np.array([stop for _, _, stop in found])
        whole = np.searchsorted(stops, ends, side="right")
        points = sums[whole]
        for place, (end, number) in enumerate(zip(ends, whole.tolist(), strict=True)):
            if number < len(found) and found[number][1] < end:
                for word in words(text[found[number][1] : end]):
                    if word in self.vocabulary:
                        points[place] += self.directions[self.vocabulary[word]]
        return _unit(points)

    def save(self, folder: Path) -> None:
        """Write `VECTORS` and `VOCABULARY`."""
        np.savez(folder / VECTORS, directions=self.directions, centers=self.centers)
        (folder / VOCABULARY).write_text(json.dumps(self.vocabulary, ensure_ascii=False), encoding="utf-8")

    @classmethod
    def read(cls, folder: Path) -> Domains:
        """What `save` wrote.

        Raises:
            UserError: it is not there, or damaged.
        """
        try:
            with np.load(folder / VECTORS, allow_pickle=False) as saved:
                directions, centers = saved["directions"], saved["centers"]
            vocabulary = json.loads((folder / VOCABULARY).read_text(encoding="utf-8"))
        except FileNotFoundError:
            raise UserError(f"{folder}: no domains in it ({VECTORS}); make them with llmrecipes data domains") from None
        except Exception as error:  # numpy and zipfile raise whatever they like on a damaged file
            raise UserError(f"{folder}: damaged ({error}); make it again with llmrecipes data domains") from None
        return cls(vocabulary, directions, centers)


def distances(points: np.ndarray, centers: np.ndarray) -> np.ndarray:
    """Squared distances, [N, D] and [K, D] to [N, K]."""
    squares = (points**2).sum(axis=1)[:, None] + (centers**2).sum(axis=1) - 2 * points @ centers.T
    return np.maximum(squares, 0)


def domain_weights(points: np.ndarray, centers: np.ndarray, temperature: float, top_k: int | None = None) -> np.ndarray:
    """How much each domain's expert has to say, ``softmax(-d^2 / temperature)`` (2303.14177), [N, D] to [N, K].

    Args:
        points: zeros where nothing is known: all experts then count alike.
        temperature: small: the nearest alone; large: all alike.
        top_k: only so many nearest, renormalized; None = all.
    """
    scores = -distances(points, centers) / temperature
    scores[~np.any(points, axis=1)] = 0
    if top_k is not None and top_k < len(centers):
        order = np.argsort(-scores, axis=1, kind="stable")
        known = np.any(points, axis=1)[:, None]
        np.put_along_axis(scores, order[:, top_k:], np.where(known, -np.inf, 0.0), axis=1)
    weights = np.exp(scores - scores.max(axis=1, keepdims=True))
    return weights / weights.sum(axis=1, keepdims=True)


def _unit(points: np.ndarray) -> np.ndarray:
    lengths = np.linalg.norm(points, axis=1, keepdims=True)
    return np.divide(points, lengths, out=np.zeros_like(points), where=lengths > 1e-12)

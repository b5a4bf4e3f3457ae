"""How much of a text repeats itself: the measures of Gopher (arXiv:2112.11446, table A1), without a dictionary.

Japanese has no spaces; a word here is a run of one script, which cuts much like a morphological analyser and ten times
faster: 学習/した/モデル/は.
"""

from __future__ import annotations

from collections.abc import Sequence
from functools import cache

import numpy as np

# n -> largest share of characters; 2-4: in the most frequent n-gram; 5-10: in all n-grams that occur more than once.
LIMITS = {2: 0.20, 3: 0.18, 4: 0.16, 5: 0.15, 6: 0.14, 7: 0.13, 8: 0.12, 9: 0.11, 10: 0.10}
FEWEST_WORDS = 10  # of a text that can be said to repeat itself


_SIGN, _SPACE = 4, 5
_ZERO = np.zeros(1, dtype=np.int64)
_FACTOR = np.uint64(0x9E3779B97F4A7C15)


def duplicate_share(parts: Sequence[str]) -> tuple[float, float]:
    """Of lines or paragraphs that occurred before: (share of parts, share of characters). Empty ones do not count."""
    parts = [part for part in parts if part]
    if not parts:
        return 0.0, 0.0
    seen, again, characters = set[str](), 0, 0
    for part in parts:
        if part in seen:
            again, characters = again + 1, characters + len(part)
        seen.add(part)
    return again / len(parts), characters / sum(map(len, parts))


def repeated_ngram(text: str) -> int | None:
    """The smallest n (2 to 10) whose n-grams repeat beyond `LIMITS`; None for a text that does not."""
    ids, lengths = words(text)
    if len(ids) < FEWEST_WORDS:
        return None
    ends = np.concatenate((_ZERO, lengths.cumsum()))
    total = int(ends[-1])
    for n, limit in LIMITS.items():
        if n > len(ids):
            return None
        hashes = ngram_hashes(ids, n)
        share = (_top_share if n <= 4 else _duplicated_share)(hashes, ends, n, limit * total)
        if share > limit * total:
            return n
        if n >= 5 and share <= min(LIMITS.values()) * total:
            return None  # what longer n-grams cover, shorter ones cover too
    return None


def words(text: str, signs: bool = True) -> tuple[np.ndarray, np.ndarray]:
    """Hash [W] and length [W] of every word: a run of hiragana, katakana, kanji, or Latin letters and digits.

    Other signs are words of their own (unless `signs` is False), spaces are none.
    """
    codes = np.frombuffer(text.encode("utf-32-le"), dtype=np.uint32)
    kinds = _kinds()[np.minimum(codes, 0xFFFF)]
    first = np.empty(len(codes), dtype=bool)
    first[:1] = True
    np.not_equal(kinds[1:], kinds[:-1], out=first[1:])
    first |= kinds == _SIGN
    starts = first.nonzero()[0]
    if not len(starts):
        return np.empty(0, dtype=np.uint64), np.empty(0, dtype=np.int64)
    lengths = np.concatenate((starts[1:], (len(codes),))) - starts
    places = np.arange(len(codes)) - np.repeat(starts, lengths)  # of each character in its word
    mixed = codes.astype(np.uint64) + (places.astype(np.uint64) << np.uint64(32))
    mixed *= _FACTOR
    mixed ^= mixed >> np.uint64(31)
    mixed *= _FACTOR
    is_word = kinds[starts] != _SPACE if signs else kinds[starts] < _SIGN
    return np.add.reduceat(mixed, starts)[is_word], lengths[is_word]


@cache
def _kinds() -> np.ndarray:
    """The kind of each character of the basic plane [65536], uint8."""
    table = np.full(1 << 16, _SIGN, dtype=np.uint8)
    for kind, runs in enumerate(
        (((0x3041, 0x309F),), ((0x30A1, 0x30FF),), ((0x3400, 0x4DBF), (0x4E00, 0x9FFF), (0x3005, 0x3005)),
         ((0x30, 0x39), (0x41, 0x5A), (0x61, 0x7A), (0xC0, 0x24F)))
    ):  # fmt: skip
        for low, high in runs:
            table[low : high + 1] = kind
    table[[0x20, 0x09, 0x0A, 0x0D, 0xA0, 0x3000]] = _SPACE
    return table


def ngram_hashes(ids: np.ndarray, n: int) -> np.ndarray:
    """A 64-bit hash of every n-gram [W - n + 1]."""
    size = len(ids) - n + 1
    hashes = ids[:size].copy()
    for offset in range(1, n):
        hashes *= _FACTOR
        hashes += ids[offset : size + offset]
    return hashes


def _top_share(hashes: np.ndarray, ends: np.ndarray, n: int, limit: float) -> int:
    """Characters covered by the most frequent n-gram, which must occur twice; 0 when that cannot reach `limit`."""
    ordered = np.sort(hashes)
    borders = np.concatenate((_ZERO, (ordered[1:] != ordered[:-1]).nonzero()[0] + 1, (len(ordered),)))
    counts = borders[1:] - borders[:-1]
    top = int(counts.argmax())
    if counts[top] == 1:
        return 0
    starts = (hashes == ordered[borders[top]]).nonzero()[0]
    if len(starts) * (ends[starts[0] + n] - ends[starts[0]]) <= limit:
        return 0
    return _covered(starts, ends, n)


def _duplicated_share(hashes: np.ndarray, ends: np.ndarray, n: int, limit: float) -> int:
    """Characters in n-grams that occurred before, each character once; 0 when that cannot matter."""
    # The last byte of a hash gives way to the length of its n-gram, so that sorting brings the lengths along.
    lengths = ends[n:] - ends[:-n]
    hashes = (hashes & ~np.uint64(0xFF)) | np.minimum(lengths, 0xFF).astype(np.uint64)
    ordered = np.sort(hashes)
    repeated = ordered[1:][ordered[1:] == ordered[:-1]] & np.uint64(0xFF)
    at_most = int(repeated.sum()) if not (repeated == 0xFF).any() else int(ends[-1])
    if at_most <= min(limit, min(LIMITS.values()) * int(ends[-1])):
        return 0
    values = np.unique(ordered[1:][ordered[1:] == ordered[:-1]])
    places = np.minimum(np.searchsorted(values, hashes), len(values) - 1)
    several = (values[places] == hashes).nonzero()[0]
    order = several[np.argsort(hashes[several], kind="stable")]
    again = hashes[order[1:]] == hashes[order[:-1]]
    return _covered(order[1:][again], ends, n)


def _covered(starts: np.ndarray, ends: np.ndarray, n: int) -> int:
    """Characters of words that are in one of the n-grams which begin at `starts`."""
    marks = np.zeros(len(ends), dtype=np.int64)
    np.add.at(marks, starts, 1)
    np.add.at(marks, starts + n, -1)
    return int((ends[1:] - ends[:-1])[marks.cumsum()[:-1] > 0].sum())

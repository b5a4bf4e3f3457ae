"""Which script a text is written in, by counting characters: no model, no download."""

from __future__ import annotations

import re

_HIRAGANA = re.compile("[\u3041-\u309f]+")
_JAPANESE = re.compile("[\u3041-\u309f\u30a1-\u30ff\u3400-\u4dbf\u4e00-\u9fff\uff66-\uff9f\u3005]+")
_LATIN = re.compile("[A-Za-z\u00c0-\u024f]+")
_LETTERS = re.compile(r"[^\W\d_]+")


def _count(pattern: re.Pattern[str], text: str) -> int:
    return sum(map(len, pattern.findall(text)))


def japanese_share(text: str) -> float:
    """Kana and kanji among all letters, from 0 to 1; 0 without any hiragana, which Chinese has none of."""
    if not _HIRAGANA.search(text):
        return 0.0
    japanese = _count(_JAPANESE, text)
    return japanese / max(1, japanese + _count(_LATIN, text))


def english_share(text: str) -> float:
    """Latin letters among all letters, from 0 to 1."""
    return _count(_LATIN, text) / max(1, _count(_LETTERS, text))

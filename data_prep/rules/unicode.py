"""Unicode normalization that skips what it would not change: most of a Japanese text."""

from __future__ import annotations

import re
import unicodedata
from functools import lru_cache
from typing import Literal

# ASCII, kana, kanji and their punctuation are normalized as they are, and never join the character before them. What
# is left is normalized together with the character before it, which a combining mark may belong to.
_INERT = "\x00-\x7f\u3001-\u3003\u3005-\u3015\u3041-\u3096\u30a1-\u30fc\u4e00-\u9fff"
_OTHER = re.compile(f"[{_INERT}]?[^{_INERT}]+")


def normalize(form: Literal["NFC", "NFKC"], text: str) -> str:
    """`unicodedata.normalize`, several times faster for Japanese."""
    part = _nfkc if form == "NFKC" else _nfc
    return _OTHER.sub(lambda found: part(found[0]), text)


@lru_cache(1 << 12)
def _nfkc(text: str) -> str:
    return unicodedata.normalize("NFKC", text)


@lru_cache(1 << 12)
def _nfc(text: str) -> str:
    return unicodedata.normalize("NFC", text)

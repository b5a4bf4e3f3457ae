"""Japanese words by fugashi (MeCab) and unidic-lite."""

from __future__ import annotations

from typing import Any

from data_prep.frame.extras import need


def tagger() -> Any:
    """A tagger whose words have `surface`, `white_space` and `feature.pos1`."""
    fugashi = need("fugashi")
    need("unidic_lite", "unidic-lite")
    return fugashi.Tagger()

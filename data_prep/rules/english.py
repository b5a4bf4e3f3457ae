"""Gopher's rules of quality (arXiv:2112.11446, appendix A1.1) for texts with spaces between words."""

from __future__ import annotations

import re

STOP_WORDS = frozenset(("the", "be", "to", "of", "and", "that", "have", "with"))
_LETTER = re.compile(r"[^\W\d_]")
BULLETS = ("•", "‣", "-", "*", "◦", "●")


def gopher_reason(text: str) -> str | None:
    """Why a text is no prose, in one word; None when it may be."""
    words = text.split()
    if not words:
        return "no_words"
    mean = sum(map(len, words)) / len(words)
    if not 3 <= mean <= 10:
        return "mean_word_length"
    if (text.count("#") + text.count("…") + text.count("...")) / len(words) > 0.1:
        return "symbols"
    lines = [line.strip() for line in text.split("\n") if line.strip()]
    if sum(line.startswith(BULLETS) for line in lines) / len(lines) > 0.9:
        return "bullets"
    if sum(line.endswith(("...", "…")) for line in lines) / len(lines) > 0.3:
        return "ellipses"
    # Most words are letters only, which is quickly told; only where they are not enough is each word looked into.
    if sum(map(str.isalpha, words)) / len(words) < 0.8 and len(list(filter(_LETTER.search, words))) / len(words) < 0.8:
        return "few_letters"
    if len(STOP_WORDS.intersection(map(str.lower, set(words)))) < 2:
        return "no_stop_words"
    return None

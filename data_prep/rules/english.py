"""Gopher's rules of quality (arXiv:2112.11446, appendix A1.1) for texts with spaces between words."""

from __future__ import annotations

STOP_WORDS = frozenset(("the", "be", "to", "of", "and", "that", "have", "with"))
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
    if sum(any(c.isalpha() for c in word) for word in words) / len(words) < 0.8:
        return "few_letters"
    if len(STOP_WORDS.intersection(word.lower() for word in words)) < 2:
        return "no_stop_words"
    return None

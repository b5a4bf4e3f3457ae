"""Perplexities as a table for people, of one model or of two side by side. Torch-free but for the scores' type."""

from __future__ import annotations

import math

from llmrecipes.inference.perplexity import Score

HEADS = ("texts", "tokens", "characters", "bytes", "ppl/token", "ppl/char", "bits/byte")
NAME_WIDTH = 40


def table(scores: list[Score]) -> str:
    """One line for each score."""
    rows = [("", *HEADS), *map(_cells, scores)]
    return _align(rows)


def side_by_side(names: tuple[str, str], first: list[Score], second: list[Score]) -> str:
    """Bits per byte of the same texts under two models, and which one needs fewer."""
    rows: list[tuple[str, ...]] = [("bits/byte", "1", "2", "2 - 1", "better")]
    for a, b in zip(first, second, strict=True):
        difference = b.bits_per_byte - a.bits_per_byte
        better = "-" if not difference or math.isnan(difference) else "1" if difference > 0 else "2"
        rows.append(
            (_short(a.name), *(f"{x:.4f}" for x in (a.bits_per_byte, b.bits_per_byte)), f"{difference:+.4f}", better)
        )
    return f"1 = {names[0]}\n2 = {names[1]}\n" + _align(rows)


def _cells(score: Score) -> tuple[str, ...]:
    counts = (score.texts, score.tokens, score.characters, score.num_bytes)
    values = (_number(score.per_token), _number(score.per_character), f"{score.bits_per_byte:.4f}")
    return (_short(score.name), *(f"{count:,}" for count in counts), *values)


def _number(value: float) -> str:
    return f"{value:,.3f}" if value < 1e6 or math.isnan(value) else f"{value:.3e}"


def _short(name: str) -> str:
    return name if len(name) <= NAME_WIDTH else "…" + name[1 - NAME_WIDTH :]


def _align(rows: list[tuple[str, ...]]) -> str:
    widths = [max(len(row[i]) for row in rows) for i in range(len(rows[0]))]
    lines = []
    for row in rows:
        cells = [row[0].ljust(widths[0]), *(cell.rjust(width) for cell, width in zip(row[1:], widths[1:], strict=True))]
        lines.append("  ".join(cells).rstrip())
    return "\n".join(lines)

"""How a text longer than the model's window is cut: overlapping windows, each token scored once. Torch-free."""

from __future__ import annotations

from dataclasses import dataclass


@dataclass(frozen=True)
class Window:
    """Part of a text that the model reads at once.

    Attributes:
        start, stop: its tokens are ``start .. stop - 1`` of the text.
        first: tokens ``first .. stop - 1`` are scored; those before are context only.
    """

    start: int
    stop: int
    first: int


def windows(num_tokens: int, size: int, stride: int) -> list[Window]:
    """Windows over a text; together they score tokens ``1 .. num_tokens - 1`` once each.

    The first window scores all it can, each later one the ``stride`` tokens (the last one: what is left) that come
    after those already scored. So every token but those of the first window has at least ``size - stride`` tokens
    before it; the first token of a text has nothing before it and is never scored.

    Args:
        num_tokens: length of the text.
        size: most tokens in a window, at least 2.
        stride: tokens scored by each window after the first, 1 to ``size - 1``.
    """
    assert size >= 2 and 1 <= stride < size, (size, stride)
    found = []
    first = 1
    while first < num_tokens:
        stop = min(size if first == 1 else first + stride, num_tokens)
        found.append(Window(max(0, stop - size), stop, first))
        first = stop
    return found

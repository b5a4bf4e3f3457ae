"""Texts of different lengths side by side: the shorter ones stand behind padding, so that all end together."""

from __future__ import annotations

import torch
from torch import Tensor


def padded_positions(padding: Tensor, start: int, length: int) -> Tensor:
    """Place of columns ``start .. start + length - 1`` in their own text, [B, length]; 0 on the padding.

    ``padding`` [B]: columns of padding to the left of each text.
    """
    columns = torch.arange(start, start + length, device=padding.device)
    return (columns - padding[:, None]).clamp_min_(0)


def visible_keys(padding: Tensor, start: int, length: int) -> Tensor:
    """True where query ``start + i`` may look at key ``j``, [B, 1, length, start + length].

    Causal, and never at padding; a padding query sees itself, because a softmax over nothing is not a number.
    """
    keys = torch.arange(start + length, device=padding.device)
    queries = keys[start:, None]
    real = (keys >= padding[:, None])[:, None]
    return ((keys <= queries) & real | (keys == queries))[:, None]

"""Attention with linear biases (2108.12409)."""

from __future__ import annotations

import math

import torch
from torch import Tensor


def alibi_slopes(num_heads: int) -> list[float]:
    """Slope of each head: a geometric sequence from ``2 ** (-8 / n)`` for n a power of two.

    Otherwise the slopes of the power of two below, then every other slope of the power of two above, as the paper's
    code and BLOOM do.
    """

    def geometric(count: int) -> list[float]:
        return [2.0 ** (-8.0 * (i + 1) / count) for i in range(count)]

    below = 2 ** int(math.log2(num_heads))
    return geometric(below) + geometric(2 * below)[0::2][: num_heads - below]


def alibi_bias(num_heads: int, length: int, start: int, dtype: torch.dtype, device: torch.device) -> Tensor:
    """Bias of the scores of queries ``start .. length - 1`` and keys ``0 .. length - 1``, [heads, queries, keys].

    ``-slope * distance`` to the left, minus infinity to the right.
    """
    keys = torch.arange(length, device=device)
    distance = (keys[start:, None] - keys[None, :]).to(dtype)
    slopes = torch.tensor(alibi_slopes(num_heads), dtype=dtype, device=device)
    bias = -slopes[:, None, None] * distance
    return bias.masked_fill_(distance < 0, -math.inf)

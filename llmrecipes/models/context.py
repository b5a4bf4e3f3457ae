"""What every layer needs to know of the sequences in a batch, worked out once per forward pass."""

from __future__ import annotations

from dataclasses import dataclass

import torch
from torch import Tensor

from llmrecipes.models.alibi import alibi_bias
from llmrecipes.models.cache import KVCache
from llmrecipes.models.padding import padded_positions, visible_keys
from llmrecipes.models.rotary import inverse_frequencies, rotary_table
from llmrecipes.recipe.model_config import ModelConfig


@dataclass(frozen=True)
class SequenceContext:
    """Positions and borders of the documents in a batch [B, T].

    Attributes:
        positions: place of each token in its document, [B, T], or [1, T] when every row is one document from column 0.
        lengths: length of each document, row after row (they sum to B * T); None = one document per row.
        cos, sin: rotary angles, [B|1, T, width / 2], fp32 (fp64 for fp64 models); None without rotary positions.
        window_rotary: the same for layers with a sliding window, where these have a base of their own.
        bias: ALiBi bias of the longest document, [heads, queries, keys]; None without ALiBi.
        window: what a query of the longest document sees in layers with a sliding window, [queries, keys]; None when
            that is all before it.
        cu_seqlens: borders of the documents for the CUDA kernel, [documents + 1] int32; None elsewhere.
        cache: keys and values of earlier tokens, or None.
        visible: which keys each query may see where rows begin with padding, [B, 1, T, keys]; None without padding.
    """

    positions: Tensor
    lengths: list[int] | None = None
    cos: Tensor | None = None
    sin: Tensor | None = None
    bias: Tensor | None = None
    window: Tensor | None = None
    cu_seqlens: Tensor | None = None
    cache: KVCache | None = None
    visible: Tensor | None = None
    window_rotary: tuple[Tensor, Tensor] | None = None


def _flat_lengths(document_lengths: list[list[int]] | None, rows: int, row_length: int) -> list[int] | None:
    if document_lengths is None or all(len(row) == 1 for row in document_lengths):
        return None
    assert len(document_lengths) == rows, f"{len(document_lengths)} rows of document lengths for {rows} rows of tokens"
    for row in document_lengths:
        assert sum(row) == row_length, f"documents of {sum(row)} tokens in a row of {row_length}"
    return [length for row in document_lengths for length in row if length]


def window_mask(window: int | None, length: int, start: int, device: torch.device) -> Tensor | None:
    """True where query ``start .. length - 1`` sees key ``0 .. length - 1``: the last ``window`` keys up to itself.

    None where every query sees all keys before it anyway.
    """
    if window is None or window >= length:
        return None
    keys = torch.arange(length, device=device)
    distance = keys[start:, None] - keys[None, :]
    return (distance >= 0) & (distance < window)


def make_context(
    config: ModelConfig,
    tokens: Tensor,
    dtype: torch.dtype,
    document_lengths: list[list[int]] | None = None,
    cache: KVCache | None = None,
) -> SequenceContext:
    """Work out the context of ``tokens`` [B, T]; angles and biases are computed in ``dtype`` (fp32 or fp64)."""
    rows, row_length = tokens.shape
    device = tokens.device
    lengths = _flat_lengths(document_lengths, rows, row_length)
    start = cache.length if cache is not None else 0
    assert cache is None or lengths is None, "a cache holds one document per row"
    positions = torch.arange(start, start + row_length, device=device)[None]
    visible = None
    if cache is not None and cache.padding is not None:
        positions = padded_positions(cache.padding, start, row_length)
        visible = visible_keys(cache.padding, start, row_length)
    longest = start + row_length
    if lengths is not None:
        longest = max(lengths, default=0)
        sizes = torch.tensor(lengths)
        starts = torch.repeat_interleave(sizes.cumsum(0) - sizes, sizes)
        positions = (torch.arange(rows * row_length) - starts).view(rows, row_length).to(device, non_blocking=True)
    cos = sin = bias = cu_seqlens = window_rotary = None
    if config.positions == "rope":
        scaling, width = config.rope_scaling, config.rotary_width
        inverse = inverse_frequencies(width, config.rope_theta, scaling, dtype, device)
        cos, sin = rotary_table(inverse, positions, 1.0 if scaling is None else scaling.amplitude)
        if config.window_rope_theta is not None:
            inverse = inverse_frequencies(width, config.window_rope_theta, None, dtype, device)
            window_rotary = rotary_table(inverse, positions)
    elif config.positions == "alibi":
        bias = alibi_bias(config.num_heads, longest, start, dtype, device)
    window = window_mask(config.sliding_window, longest, start, device)
    if lengths is not None and device.type == "cuda":
        borders = torch.nn.functional.pad(torch.tensor(lengths).cumsum(0), (1, 0)).int()
        cu_seqlens = borders.to(device, non_blocking=True)
    return SequenceContext(positions, lengths, cos, sin, bias, window, cu_seqlens, cache, visible, window_rotary)

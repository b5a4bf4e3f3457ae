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
        prefixes: how many first tokens of the document before it each document goes on from; None = none does.
        cos, sin: rotary angles, [B|1, T, width / 2], fp32 (fp64 for fp64 models); None without rotary positions.
        window_rotary: the same for layers with a sliding window, where these have a base of their own.
        bias: ALiBi bias of the longest document, prefix included, [heads, queries, keys]; None without ALiBi.
        window: what a query of the longest document sees in layers with a sliding window, [queries, keys]; None when
            that is all before it.
        cu_seqlens: borders of the documents, prefixes included, for kernels that take all at once, [documents + 1]:
            int32 on CUDA, for packed documents only; int64 on a CPU, for rows of one document too; None with a cache.
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
    prefixes: list[int] | None = None

    @property
    def spans(self) -> list[int]:
        """Tokens of each document, its prefix included."""
        assert self.lengths is not None
        if self.prefixes is None:
            return self.lengths
        return [length + prefix for length, prefix in zip(self.lengths, self.prefixes, strict=True)]


def _flat_lengths(document_lengths: list[list[int]] | None, rows: int, row_length: int) -> list[int] | None:
    if document_lengths is None or all(len(row) == 1 for row in document_lengths):
        return None
    assert len(document_lengths) == rows, f"{len(document_lengths)} rows of document lengths for {rows} rows of tokens"
    for row in document_lengths:
        assert sum(row) == row_length, f"documents of {sum(row)} tokens in a row of {row_length}"
    return [length for row in document_lengths for length in row if length]


def _flat_prefixes(
    document_prefixes: list[list[int]] | None, document_lengths: list[list[int]] | None
) -> list[int] | None:
    if document_prefixes is None or not any(map(any, document_prefixes)):
        return None
    assert document_lengths is not None, "prefixes of documents without their lengths"
    flat = []
    for lengths, prefixes in zip(document_lengths, document_prefixes, strict=True):
        before = 0
        for length, prefix in zip(lengths, prefixes, strict=True):
            assert prefix <= before, f"a document goes on from {prefix} tokens of one that has {before}"
            flat += [prefix] * (length > 0)
            before = 0 if prefix else length  # nothing goes on from what goes on itself
    return flat


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
    document_prefixes: list[list[int]] | None = None,
) -> SequenceContext:
    """Work out the context of ``tokens`` [B, T]; angles and biases are computed in ``dtype`` (fp32 or fp64)."""
    rows, row_length = tokens.shape
    device = tokens.device
    lengths = _flat_lengths(document_lengths, rows, row_length)
    prefixes = _flat_prefixes(document_prefixes, document_lengths)
    assert prefixes is None or lengths is not None
    spans: list[int] = []
    start = cache.length if cache is not None else 0
    assert cache is None or lengths is None, "a cache holds one document per row"
    positions = torch.arange(start, start + row_length, device=device)[None]
    visible = None
    if cache is not None and cache.padding is not None:
        positions = padded_positions(cache.padding, start, row_length)
        visible = visible_keys(cache.padding, start, row_length)
    longest = start + row_length
    if lengths is not None:
        spans = lengths if prefixes is None else [n + p for n, p in zip(lengths, prefixes, strict=True)]
        longest = max(spans, default=0)
        sizes = torch.tensor(lengths)
        before = sizes.cumsum(0) - sizes
        shifted = before if prefixes is None else before - torch.tensor(prefixes)
        starts = torch.repeat_interleave(shifted, sizes, output_size=rows * row_length)
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
    if lengths is not None and device.type in ("cuda", "cpu"):
        borders = torch.nn.functional.pad(torch.tensor(spans).cumsum(0), (1, 0))
        cu_seqlens = borders.int().to(device, non_blocking=True) if device.type == "cuda" else borders
    elif device.type == "cpu" and cache is None:
        cu_seqlens = torch.arange(rows + 1) * row_length
    return SequenceContext(
        positions, lengths, cos, sin, bias, window, cu_seqlens, cache, visible, window_rotary, prefixes
    )

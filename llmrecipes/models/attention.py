"""Grouped-query attention over packed documents."""

from __future__ import annotations

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from llmrecipes.kernels.attention import attention, fits_kernel
from llmrecipes.models.context import SequenceContext
from llmrecipes.models.layers import make_norm
from llmrecipes.models.lora import Routes, apply_linear, make_linear
from llmrecipes.models.rotary import apply_rotary
from llmrecipes.recipe.model_config import ModelConfig


class Attention(nn.Module):
    """Causal self-attention; each document sees only itself.

    One fused projection ``qkv`` (rows: all query heads, all key heads, all value heads) and the projection ``out``.
    """

    def __init__(self, config: ModelConfig, layer: int) -> None:
        super().__init__()
        self.layer, self.window = layer, config.window_of(layer)
        self.num_heads, self.kv_heads, self.width = config.num_heads, config.kv_heads, config.head_width
        query, key = self.num_heads * self.width, self.kv_heads * self.width
        self.qkv = make_linear(config, layer, config.dim, {"q": query, "k": key, "v": key}, config.qkv_bias)
        self.out = make_linear(config, layer, query, {"o": config.dim}, config.has_out_bias)
        self.norm_per_head = config.qk_norm_scope == "head"
        widths = (1, 1) if self.norm_per_head else (self.num_heads, self.kv_heads)
        self.q_norm = make_norm(config, widths[0] * self.width) if config.qk_norm else None
        self.k_norm = make_norm(config, widths[1] * self.width) if config.qk_norm else None
        self.dropout, self.scale = config.dropout, config.attention_scale
        self.rotary, self.window_theta = config.is_rotary_layer(layer), config.uses_window_theta(layer)

    def forward(self, x: Tensor, context: SequenceContext, routes: Routes | None = None) -> Tensor:
        """Mix ``x`` [B, T, dim] along T; returns [B, T, dim]. Routers of adapters write down in ``routes``."""
        rows, length, _ = x.shape
        q_size, kv_size = self.num_heads * self.width, self.kv_heads * self.width
        query, key, value = apply_linear(self.qkv, x, routes).split([q_size, kv_size, kv_size], dim=-1)
        if not self.norm_per_head:
            query, key = self._normed(query, key)
        query = query.view(rows, length, self.num_heads, self.width)
        key = key.view(rows, length, self.kv_heads, self.width)
        value = value.view(rows, length, self.kv_heads, self.width)
        if self.norm_per_head:
            query, key = self._normed(query, key)
        if self.rotary:
            cos, sin = self._angles(context)
            query, key = apply_rotary(query, cos, sin), apply_rotary(key, cos, sin)
        if context.cache is not None:
            key, value = context.cache.extend(self.layer, key, value)
        mixed = attend(query, key, value, context, self.window, self.dropout if self.training else 0.0, self.scale)
        return apply_linear(self.out, mixed.reshape(rows, length, q_size), routes)

    def _angles(self, context: SequenceContext) -> tuple[Tensor, Tensor]:
        if self.window_theta:
            assert context.window_rotary is not None
            return context.window_rotary
        assert context.cos is not None and context.sin is not None
        return context.cos, context.sin

    def _normed(self, query: Tensor, key: Tensor) -> tuple[Tensor, Tensor]:
        if self.q_norm is None or self.k_norm is None:
            return query, key
        return self.q_norm(query), self.k_norm(key)


def attend(
    query: Tensor,
    key: Tensor,
    value: Tensor,
    context: SequenceContext,
    window: int | None = None,
    dropout: float = 0.0,
    scale: float | None = None,
) -> Tensor:
    """Causal attention inside each document, by the fastest kernel that fits.

    Args:
        query: [B, T, heads, width]. key, value: [B, S, kv_heads, width]; S > T only with a cache.
        context: borders of the documents, ALiBi bias, mask of the sliding window.
        window: tokens that a token sees, itself included; None = all before it.
        dropout: probability of dropping an attention weight.
        scale: of the scores; None = 1 / sqrt(width).

    Returns:
        [B, T, heads, width].
    """
    if context.lengths is not None:
        return _attend_documents(query, key, value, context, window, dropout, scale)
    if _on_cpu_kernel(value, context, dropout):
        q, k, v = (x.flatten(0, 1) for x in (query, key, value))
        return _attend_on_cpu(q, k, v, context, window, scale).view(query.shape)
    return _attend_rows(query, key, value, _mask(context, window), dropout, scale)


def _takes_all_at_once(x: Tensor, context: SequenceContext, dropout: float, device: str) -> bool:
    return x.device.type == device and context.cu_seqlens is not None and context.bias is None and dropout == 0.0


def _on_cuda_kernel(query: Tensor, context: SequenceContext, dropout: float) -> bool:
    return _takes_all_at_once(query, context, dropout, "cuda") and query.dtype in (torch.bfloat16, torch.float16)


def _on_cpu_kernel(value: Tensor, context: SequenceContext, dropout: float) -> bool:
    return _takes_all_at_once(value, context, dropout, "cpu") and fits_kernel(value.dtype, value.shape[-1])


def _mask(context: SequenceContext, window: int | None) -> Tensor | None:
    """Of the longest document, [..., queries, keys]: bias added to the scores, or True where a key is seen."""
    seen = context.visible
    if window is not None and context.window is not None:
        seen = context.window if seen is None else context.window & seen
    if context.bias is None or seen is None:
        return seen if context.bias is None else context.bias
    return context.bias.masked_fill(~seen, -torch.inf)


@torch.compiler.disable  # the borders change with every batch; compiled code would be rebuilt for each
def _attend_documents(
    query: Tensor,
    key: Tensor,
    value: Tensor,
    context: SequenceContext,
    window: int | None,
    dropout: float,
    scale: float | None,
) -> Tensor:
    assert context.lengths is not None
    varlen = _on_cuda_kernel(query, context, dropout)
    if varlen or _on_cpu_kernel(value, context, dropout):
        q, k, v = (_flat_documents(x, context.lengths, context.prefixes) for x in (query, key, value))
        together = (_attend_varlen if varlen else _attend_on_cpu)(q, k, v, context, window, scale)
        if context.prefixes is None:
            return together.view(query.shape)
        mixed = list(together.split(context.spans))
    else:
        # One call per document costs far less than one call with a [T, T] mask, and the borders are known on the host.
        mask = _mask(context, window)
        documents = [_documents(x, context.lengths, context.prefixes) for x in (query, key, value)]
        # Under autocast, rotated queries and keys are fp32; the values tell in what the kernel would compute.
        attend_one = _attend_ragged if value.device.type == "cpu" and value.dtype == torch.bfloat16 else _attend_rows
        rows = [attend_one(q, k, v, mask, dropout, scale) for q, k, v in zip(*documents, strict=True)]
        mixed = [row.squeeze(0) for row in rows]
    if context.prefixes is not None:
        mixed = [part[prefix:] for part, prefix in zip(mixed, context.prefixes, strict=True)]
    return torch.cat(mixed).view(query.shape)


def _flat_documents(x: Tensor, lengths: list[int], prefixes: list[int] | None) -> Tensor:
    """All documents of ``x``, prefixes included, one after the other, [S, heads, width]."""
    return x.flatten(0, 1) if prefixes is None else torch.cat(_documents(x, lengths, prefixes), dim=1).squeeze(0)


def _documents(x: Tensor, lengths: list[int], prefixes: list[int] | None) -> list[Tensor]:
    """Each document of ``x`` [B, T, heads, width] as [1, n, heads, width], with what it goes on from before it.

    The prefix takes part as queries too, for nothing: scores are the small part of a layer, and every kernel and mask
    then fits as it is.
    """
    parts = list(x.flatten(0, 1).unsqueeze(0).split(lengths, dim=1))
    if prefixes is None:
        return parts
    return [
        torch.cat([parts[i - 1][:, :prefix], part], dim=1) if prefix else part
        for i, (part, prefix) in enumerate(zip(parts, prefixes, strict=True))
    ]


# A CPU's bf16 kernels are built anew for each number of rows, which takes longer than short documents do in fp32.
_FP32_UP_TO, _BLOCK = 512, 64


def _attend_ragged(
    query: Tensor, key: Tensor, value: Tensor, mask: Tensor | None, dropout: float, scale: float | None
) -> Tensor:
    """A document of any length in bf16 on a CPU: a short one in fp32, a long one with rows added behind it.

    Causal attention sees nothing of what is behind. Documents of 60 to 400 tokens take half the time so, of 20 to 200
    a fifth (docs/log.md).
    """
    length, dtype = query.shape[1], value.dtype
    if length > _FP32_UP_TO and mask is not None:
        return _attend_rows(query, key, value, mask, dropout, scale)
    with torch.autocast("cpu", enabled=False):
        if length <= _FP32_UP_TO:
            return _attend_rows(query.float(), key.float(), value.float(), mask, dropout, scale).to(dtype)
        query, key, value = (F.pad(x.to(dtype), (0, 0, 0, 0, 0, -length % _BLOCK)) for x in (query, key, value))
        return _attend_rows(query, key, value, None, dropout, scale)[:, :length]


def _attend_rows(
    query: Tensor, key: Tensor, value: Tensor, mask: Tensor | None, dropout: float, scale: float | None
) -> Tensor:
    """Attention over rows that are one document each; the last query sits on the last key."""
    queries, keys = query.shape[1], key.shape[1]
    if mask is not None:
        mask = mask[..., :queries, :keys]
        mask = mask if mask.dtype == torch.bool else mask.to(query.dtype)
    elif 1 < queries < keys:
        mask = torch.ones(queries, keys, dtype=torch.bool, device=query.device).tril(keys - queries)
    mixed = F.scaled_dot_product_attention(
        query.transpose(1, 2),
        key.transpose(1, 2),
        value.transpose(1, 2),
        attn_mask=mask,
        dropout_p=dropout,
        is_causal=mask is None and queries == keys,
        scale=scale,
        enable_gqa=query.shape[2] != key.shape[2],
    )
    return mixed.transpose(1, 2)


def _attend_on_cpu(
    query: Tensor, key: Tensor, value: Tensor, context: SequenceContext, window: int | None, scale: float | None
) -> Tensor:
    """All documents, [S, heads, width] one after the other, by the kernel of our own."""
    assert context.cu_seqlens is not None
    # Under autocast, rotated queries and keys may be fp32; the values tell in what to compute.
    query, key = query.to(value.dtype), key.to(value.dtype)
    return attention(query, key, value, context.cu_seqlens, window, query.shape[-1] ** -0.5 if scale is None else scale)


def _attend_varlen(
    query: Tensor, key: Tensor, value: Tensor, context: SequenceContext, window: int | None, scale: float | None
) -> Tensor:
    """All documents, [S, heads, width] one after the other, in one launch of FlashAttention (CUDA, half precision)."""
    from torch.nn.attention.varlen import varlen_attn

    assert context.cu_seqlens is not None
    longest = max(context.spans)
    mixed = varlen_attn(
        query,
        key,
        value,
        context.cu_seqlens,
        context.cu_seqlens,
        longest,
        longest,
        scale=scale,
        window_size=(-1 if window is None else window - 1, 0),  # nothing to the right: causal
        enable_gqa=query.shape[1] != key.shape[1],
    )
    assert isinstance(mixed, Tensor)
    return mixed

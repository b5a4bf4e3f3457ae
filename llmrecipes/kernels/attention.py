"""Causal attention over packed documents on a CPU, as operators of torch: ``cpp/attention.cpp``."""

from __future__ import annotations

import ctypes
from typing import Any

import torch
from torch import Tensor

from llmrecipes.kernels.library import OPERATORS, has_kernels, kernel

_LANES = 16  # heads are as wide as so many numbers or a multiple
_ALL_BEFORE = 1 << 40


def fits_kernel(dtype: torch.dtype, width: int) -> bool:
    """Whether this machine computes attention over heads of ``width`` in ``dtype`` by ``attention`` below."""
    return width % _LANES == 0 and has_kernels(dtype)


def attention(query: Tensor, key: Tensor, value: Tensor, borders: Tensor, window: int | None, scale: float) -> Tensor:
    """Each token sees the tokens of its document up to itself (flash attention, 2205.14135).

    Args:
        query: [tokens, heads, width], fp32 or bf16, on a CPU.
        key, value: [tokens, kv_heads, width] of the same type; ``kv_heads`` divides ``heads``.
        borders: where documents begin, and the end of the last, [documents + 1] int64, from 0 to ``tokens``.
        window: tokens that a token sees, itself included; None = all before it.
        scale: of the scores.

    Returns:
        [tokens, heads, width]. Sums are in fp32, and the same whatever the number of threads.
    """
    mixed, _ = torch.ops.llmrecipes.attention(query, key, value, borders, window or _ALL_BEFORE, scale)
    assert isinstance(mixed, Tensor)
    return mixed


class _Tensor(ctypes.Structure):
    _fields_ = (("at", ctypes.c_void_p), ("token_stride", ctypes.c_int64), ("head_stride", ctypes.c_int64))


class _Work(ctypes.Structure):
    _fields_ = (
        ("borders", ctypes.c_void_p),
        *((name, ctypes.c_int64) for name in ("documents", "tokens", "heads", "kv_heads", "width", "window")),
        ("scale", ctypes.c_float),
        ("threads", ctypes.c_int),
    )


def _call(backward: bool, tensors: list[Tensor], lse: Tensor, borders: Tensor, window: int, scale: float) -> None:
    query, key = tensors[:2]
    tokens, heads, width = query.shape
    work = _Work(
        borders.data_ptr(),
        len(borders) - 1,
        tokens,
        heads,
        key.shape[1],
        width,
        window,
        scale,
        torch.get_num_threads(),
    )
    described = [_Tensor(x.data_ptr(), x.stride(0), x.stride(1)) for x in tensors]
    run = kernel("attention_backward" if backward else "attention_forward", query.dtype)
    if run(ctypes.byref(work), (_Tensor * len(described))(*described), ctypes.c_void_p(lse.data_ptr())):
        raise MemoryError("no memory for the working space of attention")


def _check(query: Tensor, key: Tensor, value: Tensor, borders: Tensor) -> None:
    tokens, heads, width = query.shape
    assert key.shape == value.shape == (tokens, key.shape[1], width), "keys and values do not fit the queries"
    assert heads % key.shape[1] == 0, f"{heads} heads of queries do not divide into {key.shape[1]} of keys"
    assert query.dtype == key.dtype == value.dtype, "queries, keys and values differ in type"
    assert borders.dtype == torch.int64, "borders are int64"
    assert borders.is_contiguous(), "borders lie side by side"
    places = borders.tolist()
    assert places[0] == 0, "the first document begins at 0"
    assert places[-1] == tokens, f"documents of {places[-1]} tokens in all, and {tokens} tokens"
    assert places == sorted(places), "a document ends before it begins"


def _readable(x: Tensor) -> Tensor:
    """``x`` with the numbers of one head side by side, and each head where whole words of 32 bits begin."""
    even = all(x.stride(i) % 2 == 0 for i in (0, 1)) and x.data_ptr() % 4 == 0
    return x if x.stride(2) == 1 and even else x.contiguous()


def _forward(
    query: Tensor, key: Tensor, value: Tensor, borders: Tensor, window: int, scale: float
) -> tuple[Tensor, Tensor]:
    _check(query, key, value, borders)
    mixed = torch.empty(query.shape, dtype=query.dtype)
    lse = torch.empty(query.shape[1], query.shape[0])
    operands = [_readable(x) for x in (query, key, value)]
    _call(False, [*operands, mixed], lse, borders, window, scale)
    return mixed, lse


def _backward(
    grad: Tensor,
    query: Tensor,
    key: Tensor,
    value: Tensor,
    mixed: Tensor,
    lse: Tensor,
    borders: Tensor,
    window: int,
    scale: float,
) -> tuple[Tensor, Tensor, Tensor]:
    found = [torch.empty(x.shape, dtype=x.dtype) for x in (query, key, value)]
    operands = [_readable(x) for x in (query, key, value, mixed, grad.to(query.dtype))]
    _call(True, [*operands, *found], lse, borders, window, scale)
    return found[0], found[1], found[2]


def _fake_forward(query: Tensor, *_: Any) -> tuple[Tensor, Tensor]:
    return query.new_empty(query.shape), query.new_empty((query.shape[1], query.shape[0]), dtype=torch.float32)


def _fake_backward(_: Tensor, query: Tensor, key: Tensor, value: Tensor, *__: Any) -> tuple[Tensor, Tensor, Tensor]:
    return query.new_empty(query.shape), key.new_empty(key.shape), value.new_empty(value.shape)


def _keep(ctx: Any, inputs: tuple[Any, ...], output: tuple[Tensor, Tensor]) -> None:
    *tensors, ctx.window, ctx.scale = inputs
    ctx.save_for_backward(*tensors, *output)
    ctx.set_materialize_grads(False)


def _gradients(ctx: Any, grad: Tensor, _: Tensor | None) -> tuple[Tensor | None, ...]:
    query, key, value, borders, mixed, lse = ctx.saved_tensors
    found = torch.ops.llmrecipes.attention_backward(grad, query, key, value, mixed, lse, borders, ctx.window, ctx.scale)
    return *found, None, None, None


_operands = "Tensor query, Tensor key, Tensor value"
OPERATORS.define(f"attention({_operands}, Tensor borders, int window, float scale) -> (Tensor, Tensor)")
OPERATORS.define(
    f"attention_backward(Tensor grad, {_operands}, Tensor mixed, Tensor lse, Tensor borders, int window, float scale)"
    " -> (Tensor, Tensor, Tensor)"
)
OPERATORS.impl("attention", _forward, "CPU")
OPERATORS.impl("attention_backward", _backward, "CPU")
torch.library.register_fake("llmrecipes::attention", _fake_forward, lib=OPERATORS)
torch.library.register_fake("llmrecipes::attention_backward", _fake_backward, lib=OPERATORS)
torch.library.register_autograd("llmrecipes::attention", _gradients, setup_context=_keep, lib=OPERATORS)

# What activation checkpointing knows the forward pass by.
OPERATOR = torch.ops.llmrecipes.attention.default

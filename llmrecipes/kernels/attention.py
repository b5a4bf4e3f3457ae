"""Causal attention over packed documents on a CPU, as operators of torch: ``attention.cpp``."""

from __future__ import annotations

import ctypes
from collections.abc import Iterator
from contextlib import contextmanager
from functools import cache
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from llmrecipes.kernels.build import load_kernels, processor_features

_FP32 = ["avx512f", "avx512bw", "avx512dq", "avx512vl", "fma"]
_NAMES = {torch.float32: "fp32", torch.bfloat16: "bf16"}
_LANES = 16  # heads are as wide as so many numbers or a multiple
_ALL_BEFORE = 1 << 40

_allowed = True


@contextmanager
def without_kernels() -> Iterator[None]:
    """Torch's own attention within."""
    global _allowed
    before, _allowed = _allowed, False
    try:
        yield
    finally:
        _allowed = before


@torch.compiler.assume_constant_result
def has_kernel(dtype: torch.dtype, width: int) -> bool:
    """Whether this machine computes attention over heads of ``width`` in ``dtype`` by ``attention`` below."""
    return _allowed and width % _LANES == 0 and dtype in _kernels()


@cache
def _kernels() -> dict[torch.dtype, tuple[Any, Any]]:
    """Forward and backward pass for each type."""
    features = processor_features()
    if not features.issuperset(_FP32):
        return {}
    halves = ["avx512bf16"] if "avx512_bf16" in features else []
    library = load_kernels(Path(__file__).with_name("attention.cpp"), _FP32 + halves)
    if library is None:
        return {}
    names = {dtype: name for dtype, name in _NAMES.items() if name == "fp32" or halves}
    return {
        dtype: (library[f"attention_forward_{name}"], library[f"attention_backward_{name}"])
        for dtype, name in names.items()
    }


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
    kernel = _kernels()[query.dtype][backward]
    if kernel(ctypes.byref(work), (_Tensor * len(described))(*described), ctypes.c_void_p(lse.data_ptr())):
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


def _fake_forward(
    query: Tensor, key: Tensor, value: Tensor, borders: Tensor, window: int, scale: float
) -> tuple[Tensor, Tensor]:
    return query.new_empty(query.shape), query.new_empty((query.shape[1], query.shape[0]), dtype=torch.float32)


def _fake_backward(grad: Tensor, query: Tensor, key: Tensor, value: Tensor, *_: Any) -> tuple[Tensor, Tensor, Tensor]:
    return query.new_empty(query.shape), key.new_empty(key.shape), value.new_empty(value.shape)


def _keep(ctx: Any, inputs: tuple[Any, ...], output: tuple[Tensor, Tensor]) -> None:
    *tensors, ctx.window, ctx.scale = inputs
    ctx.save_for_backward(*tensors, *output)
    ctx.set_materialize_grads(False)


def _gradients(ctx: Any, grad: Tensor, _: Tensor | None) -> tuple[Tensor | None, ...]:
    query, key, value, borders, mixed, lse = ctx.saved_tensors
    found = torch.ops.llmrecipes.attention_backward(
        grad, query, key, value, mixed, lse, borders, ctx.window, ctx.scale
    )
    return *found, None, None, None


_operands = "Tensor query, Tensor key, Tensor value"
_library = torch.library.Library("llmrecipes", "DEF")
_library.define(f"attention({_operands}, Tensor borders, int window, float scale) -> (Tensor, Tensor)")
_library.define(
    f"attention_backward(Tensor grad, {_operands}, Tensor mixed, Tensor lse, Tensor borders, int window, float scale)"
    " -> (Tensor, Tensor, Tensor)"
)
_library.impl("attention", _forward, "CPU")
_library.impl("attention_backward", _backward, "CPU")
torch.library.register_fake("llmrecipes::attention", _fake_forward, lib=_library)
torch.library.register_fake("llmrecipes::attention_backward", _fake_backward, lib=_library)
torch.library.register_autograd("llmrecipes::attention", _gradients, setup_context=_keep, lib=_library)

# What activation checkpointing knows the forward pass by.
OPERATOR = torch.ops.llmrecipes.attention.default

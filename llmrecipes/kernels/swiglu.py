"""SwiGLU and its gradient on a CPU, each in one pass over memory: ``cpp/swiglu.cpp``."""

from __future__ import annotations

import ctypes
import math
from typing import Any

import torch
from torch import Tensor

from llmrecipes.kernels.library import OPERATORS, has_kernels, kernel


def fits_swiglu(gate_up: Tensor) -> bool:
    """Whether the functions below take ``gate_up``."""
    return gate_up.device.type == "cpu" and has_kernels(gate_up.dtype)


def swiglu(gate_up: Tensor) -> Tensor:
    """``silu(gate) * up`` of ``gate_up`` [..., 2F], gate first: [..., F]."""
    hidden = torch.ops.llmrecipes.swiglu(gate_up)
    assert isinstance(hidden, Tensor)
    return hidden


def swiglu_again(grad: Tensor, gate_up: Tensor) -> tuple[Tensor, Tensor, Tensor]:
    """For the gradient ``grad`` of ``hidden = swiglu(gate_up)``: hidden once more, and what follows from it.

    Returns:
        hidden [..., F], the gradient of ``gate_up`` [..., 2F], and ``<hidden, grad>`` of each row, [...] fp32.
    """
    hidden, found, products = torch.ops.llmrecipes.swiglu_again(grad, gate_up)
    return hidden, found, products


class _SwiGLU(ctypes.Structure):
    _fields_ = (
        *((name, ctypes.c_void_p) for name in ("gate_up", "hidden", "grad", "grad_gate_up", "products")),
        ("rows", ctypes.c_int64),
        ("width", ctypes.c_int64),
        ("threads", ctypes.c_int),
    )


def _call(name: str, gate_up: Tensor, *others: Tensor | None) -> None:
    rows, width = math.prod(gate_up.shape[:-1]), gate_up.shape[-1] // 2
    at = [None if x is None else x.data_ptr() for x in (gate_up, *others)]
    kernel(name, gate_up.dtype)(ctypes.byref(_SwiGLU(*at, rows, width, torch.get_num_threads())))


def _hidden_shape(gate_up: Tensor) -> tuple[int, ...]:
    assert gate_up.shape[-1] % 2 == 0, f"{gate_up.shape[-1]} columns are not a gate and an equal number for up"
    return (*gate_up.shape[:-1], gate_up.shape[-1] // 2)


def _hidden_like(gate_up: Tensor) -> Tensor:
    return gate_up.new_empty(_hidden_shape(gate_up))


def _forward(gate_up: Tensor) -> Tensor:
    hidden = _hidden_like(gate_up)
    _call("swiglu_forward", gate_up.contiguous(), hidden, None, None, None)
    return hidden


def _fitting(grad: Tensor, gate_up: Tensor) -> Tensor:
    assert grad.shape == _hidden_shape(gate_up), f"gradient {tuple(grad.shape)} of {tuple(gate_up.shape)}"
    return grad.to(gate_up.dtype).contiguous()


def _backward(grad: Tensor, gate_up: Tensor) -> Tensor:
    grad, gate_up = _fitting(grad, gate_up), gate_up.contiguous()
    found = torch.empty_like(gate_up)
    _call("swiglu_backward", gate_up, None, grad, found, None)
    return found


def _again(grad: Tensor, gate_up: Tensor) -> tuple[Tensor, Tensor, Tensor]:
    grad, gate_up = _fitting(grad, gate_up), gate_up.contiguous()
    hidden, found = torch.empty_like(grad), torch.empty_like(gate_up)
    products = grad.new_empty(grad.shape[:-1], dtype=torch.float32)
    _call("swiglu_backward", gate_up, hidden, grad, found, products)
    return hidden, found, products


def _fake_again(grad: Tensor, gate_up: Tensor) -> tuple[Tensor, Tensor, Tensor]:
    products = grad.new_empty(grad.shape[:-1], dtype=torch.float32)
    return _hidden_like(gate_up), torch.empty_like(gate_up), products


def _define(schema: str, run: Any, fake: Any) -> None:
    name = schema.partition("(")[0]
    OPERATORS.define(schema)
    OPERATORS.impl(name, run, "CPU")
    torch.library.register_fake(f"llmrecipes::{name}", fake, lib=OPERATORS)


def _keep(ctx: Any, inputs: tuple[Tensor], output: Tensor) -> None:  # noqa: ARG001
    ctx.save_for_backward(inputs[0])


def _gradient(ctx: Any, grad: Tensor) -> Tensor:
    found = torch.ops.llmrecipes.swiglu_backward(grad, *ctx.saved_tensors)
    assert isinstance(found, Tensor)
    return found


_define("swiglu(Tensor gate_up) -> Tensor", _forward, _hidden_like)
_define(
    "swiglu_backward(Tensor grad, Tensor gate_up) -> Tensor", _backward, lambda _, gate_up: torch.empty_like(gate_up)
)
_define("swiglu_again(Tensor grad, Tensor gate_up) -> (Tensor, Tensor, Tensor)", _again, _fake_again)
torch.library.register_autograd("llmrecipes::swiglu", _gradient, setup_context=_keep, lib=OPERATORS)

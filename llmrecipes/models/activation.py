"""The non-linearity of a feed-forward network, with its backward written out.

``gate_up`` is the output of the fused projection: [rows, 2F] for ``swiglu`` and ``geglu`` (gate first, then up), [rows,
F] otherwise.
Written out because its gradient then lands in one tensor without a copy, and the experts need save ``gate_up`` only.
"""

from __future__ import annotations

from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor

from llmrecipes.kernels.swiglu import fits_swiglu, swiglu, swiglu_again
from llmrecipes.recipe.model_config import Activation


def _approximation(kind: Activation) -> str:
    return "none" if kind == "gelu" else "tanh"


def activate(gate_up: Tensor, kind: Activation) -> Tensor:
    """The hidden features [..., F]: ``silu(gate) * up`` or ``gelu(gate) * up`` (2002.05202), or GELU."""
    if kind == "swiglu":
        if fits_swiglu(gate_up):
            return swiglu(gate_up)
        gate, up = gate_up.chunk(2, dim=-1)
        return F.silu(gate).mul_(up)
    if kind == "geglu":
        gate, up = gate_up.chunk(2, dim=-1)
        return F.gelu(gate, approximate="tanh") * up
    return F.gelu(gate_up, approximate=_approximation(kind))


def activate_again(grad: Tensor, gate_up: Tensor, kind: Activation) -> tuple[Tensor, Tensor, Tensor | None]:
    """The hidden features once more, and the gradient of ``gate_up`` from their gradient: both need silu(gate).

    The third is ``<hidden, grad>`` of each row, [...] fp32, where it comes for nothing; else None.
    """
    if kind == "swiglu" and fits_swiglu(gate_up):
        return swiglu_again(grad, gate_up)
    if kind == "geglu":
        gate, up = gate_up.chunk(2, dim=-1)
        squashed = F.gelu(gate, approximate="tanh")
        grad_gate = torch.ops.aten.gelu_backward(grad * up, gate, approximate="tanh")
        return squashed * up, torch.cat((grad_gate, grad * squashed), dim=-1), None
    if kind != "swiglu":
        grad_in = torch.ops.aten.gelu_backward(grad, gate_up, approximate=_approximation(kind))
        return activate(gate_up, kind), grad_in, None
    gate, up = gate_up.chunk(2, dim=-1)
    out = torch.empty_like(gate_up, memory_format=torch.contiguous_format)
    out_gate, out_up = out.chunk(2, dim=-1)
    squashed = F.silu(gate)
    torch.mul(grad, squashed, out=out_up)
    torch.ops.aten.silu_backward.grad_input(grad * up, gate, grad_input=out_gate)
    return squashed.mul_(up), out, None


class _SwiGLU(torch.autograd.Function):
    """Saves silu(gate) too: recomputing it in the backward pass costs more than reading it."""

    @staticmethod
    def forward(ctx: Any, gate_up: Tensor) -> Tensor:
        gate, up = gate_up.chunk(2, dim=-1)
        squashed = F.silu(gate)
        ctx.save_for_backward(gate_up, squashed)
        return squashed * up

    @staticmethod
    def backward(ctx: Any, grad: Tensor) -> Tensor:  # type: ignore[override]
        gate_up, squashed = ctx.saved_tensors
        gate, up = gate_up.chunk(2, dim=-1)
        out = torch.empty_like(gate_up, memory_format=torch.contiguous_format)
        out_gate, out_up = out.chunk(2, dim=-1)
        torch.mul(grad, squashed, out=out_up)
        torch.ops.aten.silu_backward.grad_input(grad * up, gate, grad_input=out_gate)
        return out


def activation(gate_up: Tensor, kind: Activation) -> Tensor:
    """``activate`` with a gradient; under ``torch.compile`` the plain expression, which it fuses by itself."""
    if kind != "swiglu":
        return activate(gate_up, kind)
    if torch.compiler.is_compiling():
        gate, up = gate_up.chunk(2, dim=-1)
        return F.silu(gate) * up
    return swiglu(gate_up) if fits_swiglu(gate_up) else _SwiGLU.apply(gate_up)

"""Normalisation layers."""

from __future__ import annotations

from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from llmrecipes.recipe.model_config import ModelConfig


class _RMSNorm(torch.autograd.Function):
    """For a CPU, where torch has no kernel of its own for it: few passes over ``x``, and only ``x`` is saved."""

    @staticmethod
    def forward(ctx: Any, x: Tensor, weight: Tensor, eps: float) -> Tensor:
        square = torch.linalg.vector_norm(x, dim=-1, keepdim=True).square_()
        inverse = square.div_(x.shape[-1]).add_(eps).rsqrt_()
        ctx.save_for_backward(x, weight, inverse)
        return torch.mul(x, inverse).mul_(weight)

    @staticmethod
    def backward(ctx: Any, grad: Tensor) -> tuple[Tensor | None, Tensor | None, None]:  # type: ignore[override]
        # With r = 1 / rms: dx = r g w - x r^3 mean(g w x), dw = sum of r g x over the rows.
        x, weight, inverse = ctx.saved_tensors
        rows, width = x.view(-1, x.shape[-1]), x.shape[-1]
        inverse, grad = inverse.view(-1, 1), grad.reshape(-1, width)
        product = grad * rows
        of_weight = (inverse.t() @ product).view(-1) if ctx.needs_input_grad[1] else None
        if not ctx.needs_input_grad[0]:
            return None, of_weight, None
        share = (product @ weight).unsqueeze(-1).mul_(inverse.pow(3)).div_(-width)
        of_x = torch.mul(grad, weight, out=product).mul_(inverse).addcmul_(rows, share)
        return of_x.view(x.shape), of_weight, None


def _rms_norm(x: Tensor, weight: Tensor, eps: float) -> Tensor:
    """Both of one type, fp32 or fp64. ``torch.compile`` and a GPU have a fused kernel for the plain expression."""
    if x.device.type == "cpu" and x.is_contiguous() and not torch.compiler.is_compiling():
        return _RMSNorm.apply(x, weight, eps)
    return F.rms_norm(x, weight.shape, weight, eps)


class RMSNorm(nn.Module):
    """``x / sqrt(mean(x^2) + eps) * weight`` over the last dimension (1910.07467).

    The mean is taken in fp32 for half-precision input and in fp64 for fp64 input, as Llama in transformers does.
    With ``plus_one`` the factor is ``1 + weight``, in fp32 too, as in Gemma.
    """

    def __init__(self, width: int, eps: float, plus_one: bool = False) -> None:
        super().__init__()
        self.weight = nn.Parameter(torch.zeros(width) if plus_one else torch.ones(width))
        self.eps, self.plus_one = eps, plus_one

    def forward(self, x: Tensor) -> Tensor:
        """Normalise ``x`` [..., width]; the result has the type of ``x``."""
        if self.plus_one:
            wide = x.to(torch.promote_types(x.dtype, torch.float32))
            return F.rms_norm(wide, self.weight.shape, 1 + self.weight.to(wide.dtype), self.eps).to(x.dtype)
        if x.dtype == self.weight.dtype and x.dtype in (torch.float32, torch.float64):
            return _rms_norm(x, self.weight, self.eps)
        return self.weight.to(x.dtype) * F.rms_norm(x.float(), self.weight.shape, None, self.eps).to(x.dtype)


class LayerNorm(nn.Module):
    """Layer normalisation with weight and bias (1607.06450)."""

    def __init__(self, width: int, eps: float) -> None:
        super().__init__()
        self.weight = nn.Parameter(torch.ones(width))
        self.bias = nn.Parameter(torch.zeros(width))
        self.eps = eps

    def forward(self, x: Tensor) -> Tensor:
        """Normalise ``x`` [..., width]; the result has the type of ``x``."""
        weight, bias = self.weight.to(x.dtype), self.bias.to(x.dtype)
        return F.layer_norm(x, self.weight.shape, weight, bias, self.eps)


def make_norm(config: ModelConfig, width: int) -> RMSNorm | LayerNorm:
    """The norm that ``config`` asks for, over ``width`` features."""
    if config.norm == "layer":
        return LayerNorm(width, config.norm_eps)
    return RMSNorm(width, config.norm_eps, config.norm_plus_one)

"""Normalisation layers."""

from __future__ import annotations

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from llmrecipes.recipe.model_config import ModelConfig


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
            return F.rms_norm(x, self.weight.shape, self.weight, self.eps)
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

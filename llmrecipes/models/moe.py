"""Mixture of experts: a router, stacked experts, and what every token uses beside them."""

from __future__ import annotations

from collections.abc import Callable

import torch
from torch import Tensor, nn

from llmrecipes.models.dispatch import run_experts
from llmrecipes.models.mlp import MLP
from llmrecipes.models.router import Router, Routing
from llmrecipes.recipe.model_config import ModelConfig
from llmrecipes.recipe.moe_config import MoEConfig

__all__ = ["Experts", "MoE", "Router", "Routing"]


class Experts(nn.Module):
    """E feed-forward networks as two stacked tensors.

    ``gate_up_proj`` is [E, 2F, D] (gate rows first; [E, F, D] for GELU), ``down_proj`` [E, D, F].

    Stacked, not a list: every expert has a gradient and optimizer state, also when no token came to it.
    """

    def __init__(self, config: ModelConfig, moe: MoEConfig) -> None:
        super().__init__()
        assert moe.num_experts is not None
        self.kind = config.activation
        self.gate_up_proj = nn.Parameter(torch.empty(moe.num_experts, config.maps_in * moe.ffn_dim, config.dim))
        self.down_proj = nn.Parameter(torch.empty(moe.num_experts, config.dim, moe.ffn_dim))
        nn.init.normal_(self.gate_up_proj, std=0.02)
        nn.init.normal_(self.down_proj, std=0.02)
        # Replaced from outside where experts live on several processes.
        self.run: Callable[..., Tensor] = run_experts

    def forward(self, x: Tensor, weights: Tensor, experts: Tensor, may_drop: bool = False) -> Tensor:
        """Weighted sum of the chosen experts' outputs for ``x`` [T, D]; ``weights``, ``experts`` [T, k].

        With ``may_drop`` an expert may be E: nobody's, which adds nothing.
        """
        return self.run(x, weights, experts, self.gate_up_proj, self.down_proj, self.kind, may_drop)


class MoE(nn.Module):
    """A router and its experts, in place of the feed-forward network, with what every token uses beside them.

    Args:
        config: the decoder.
        layer: its block, from 0.
    """

    def __init__(self, config: ModelConfig, layer: int = 0) -> None:
        super().__init__()
        moe = config.moe_of(layer)
        assert moe is not None
        self.gate = Router(config.dim, moe)
        self.experts = Experts(config, moe)
        shared = moe.shared_ffn_dim
        self.residual = MLP(config) if moe.residual else None
        self.coefficient = nn.Linear(config.dim, 2) if moe.residual else None
        self.shared = None if shared is None else MLP(config, shared)
        self.shared_gate = None if shared is None else nn.Linear(config.dim, 1, bias=False)

    def forward(self, x: Tensor, token_mask: Tensor | None = None, dropless: bool = False) -> tuple[Tensor, Routing]:
        """Map ``x`` [B, T, D] to itself; ``token_mask`` [B, T] is True for real tokens, ``dropless`` as in `Router`."""
        flat = x.reshape(-1, x.shape[-1])
        mask = None if token_mask is None else token_mask.reshape(-1)
        weights, experts, routing = self.gate(flat, mask, dropless)
        out = self.experts(flat, weights, experts, self.gate.factor(dropless) is not None)
        return self._beside(flat, out).view(x.shape), routing

    def _beside(self, x: Tensor, out: Tensor) -> Tensor:
        """The experts' output ``out`` [T, D] together with that of the networks that every token uses."""
        if self.residual is not None and self.coefficient is not None:
            share = self.coefficient(x).softmax(-1)
            out = out * share[:, :1] + self.residual(x) * share[:, 1:]
        if self.shared is not None and self.shared_gate is not None:
            out = out + self.shared_gate(x).sigmoid() * self.shared(x)
        return out

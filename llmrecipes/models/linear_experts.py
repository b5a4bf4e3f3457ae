"""Experts of single linear maps: gate, up and down have a router each, as mergoo composes whole models."""

from __future__ import annotations

import torch
from torch import Tensor, nn

from llmrecipes.models.activation import activation
from llmrecipes.models.dispatch import block_rows
from llmrecipes.models.lora import Routes
from llmrecipes.models.low_rank import (
    collect_rows,
    grouped_linear,
    in_product_type,
    row_weights,
    scatter_rows,
    sort_pairs,
)
from llmrecipes.models.router import Router
from llmrecipes.recipe.model_config import ModelConfig
from llmrecipes.recipe.moe_config import MoEConfig


class ExpertLinear(nn.Module):
    """``sum over top-k of weight_e * W_e x`` with a router on ``x``; W is [E, out, in]."""

    def __init__(self, d_in: int, d_out: int, moe: MoEConfig) -> None:
        super().__init__()
        assert moe.num_experts is not None
        self.weight = nn.Parameter(torch.empty(moe.num_experts, d_out, d_in))
        nn.init.normal_(self.weight, std=0.02)
        self.router = Router(d_in, moe)

    @torch.compiler.disable  # the fake kernel of grouped_mm knows bf16 only
    def forward(self, x: Tensor, routes: Routes) -> Tensor:
        """Map ``x`` [T, in] to [T, out]; what the router did is added to ``routes``."""
        weights, experts, routing = self.router(x, routes.mask)
        routes.found.append(routing)
        x, stack = in_product_type(x, self.weight)
        top_k = experts.shape[1]
        pairs = sort_pairs(experts, stack.shape[0], null_expert=False, multiple=block_rows(x))
        rows = grouped_linear(scatter_rows(x, pairs, top_k), stack, pairs.ends)
        return collect_rows(rows * row_weights(weights, pairs).to(rows.dtype), pairs, top_k)


class LinearExperts(nn.Module):
    """The three maps of a SwiGLU network (two of a plain one)."""

    def __init__(self, config: ModelConfig, moe: MoEConfig) -> None:
        super().__init__()
        self.kind = config.activation
        self.gate_proj = ExpertLinear(config.dim, moe.ffn_dim, moe) if config.maps_in == 2 else None
        self.up_proj = ExpertLinear(config.dim, moe.ffn_dim, moe)
        self.down_proj = ExpertLinear(moe.ffn_dim, config.dim, moe)

    def forward(self, x: Tensor, routes: Routes) -> Tensor:
        """Map ``x`` [T, dim] to [T, dim]."""
        inner = [projection for projection in (self.gate_proj, self.up_proj) if projection is not None]
        hidden = torch.cat([projection(x, routes) for projection in inner], dim=-1)
        return self.down_proj(activation(hidden, self.kind), routes)


class LinearMoE(nn.Module):
    """A feed-forward network whose every linear map chooses its experts by itself."""

    def __init__(self, config: ModelConfig, layer: int) -> None:
        super().__init__()
        moe = config.moe_of(layer)
        assert moe is not None
        self.experts = LinearExperts(config, moe)

    def forward(self, x: Tensor, routes: Routes | None = None) -> Tensor:
        """Map ``x`` [..., dim] to [..., dim]; routers write down in ``routes`` what they did."""
        return self.experts(x.reshape(-1, x.shape[-1]), routes or Routes()).view(x.shape)

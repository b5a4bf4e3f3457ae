"""Low-rank adapters (2106.09685) on the decoder's fused linear maps, one or many with routers between them.

A fused map has an adapter for each of its parts: that is what PEFT computes on the separate maps of transformers.
"""

from __future__ import annotations

import itertools
from collections.abc import Iterator
from contextlib import contextmanager

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from llmrecipes.models.activation import activation
from llmrecipes.models.dispatch import block_rows
from llmrecipes.models.low_rank import (
    Pairs,
    adapted_linear,
    collect_rows,
    in_product_type,
    product_type,
    routed_update,
    row_weights,
    scatter_rows,
    sort_pairs,
    update_rows,
)
from llmrecipes.models.router import Router, Routing
from llmrecipes.recipe.lora_config import LoraConfig, LoraExperts
from llmrecipes.recipe.model_config import ModelConfig
from llmrecipes.recipe.moe_config import MoEConfig

# Which part of a fused map is which of theirs.
THEIRS = {
    "q": "self_attn.q_proj",
    "k": "self_attn.k_proj",
    "v": "self_attn.v_proj",
    "o": "self_attn.o_proj",
    "gate": "mlp.gate_proj",
    "up": "mlp.up_proj",
    "down": "mlp.down_proj",
}


def is_adapter(name: str) -> bool:
    """Whether a tensor of that name is A or B of a low-rank adapter."""
    return ".lora." in name and name.endswith((".a", ".b"))


class Routes:
    """What the routers of one block did in one forward pass, in order: made per pass, so that recomputing counts once.

    Args:
        token_mask: [B, T], True for real tokens; None = all.
    """

    def __init__(self, token_mask: Tensor | None = None) -> None:
        self.mask = None if token_mask is None else token_mask.reshape(-1)
        self.found: list[Routing] = []


class Adapter(nn.Module):
    """``scale * B A drop(x)``: A [r, in] is drawn, B [out, r] begins at zero, so that the update begins as nothing.

    Holds the matrices; `AdaptedLinear` adds the updates of all its parts to its output.
    """

    def __init__(self, d_in: int, d_out: int, lora: LoraConfig) -> None:
        super().__init__()
        self.scale, self.dropout = lora.scale, lora.dropout
        self.a = nn.Parameter(torch.empty(lora.rank, d_in))
        self.b = nn.Parameter(torch.zeros(d_out, lora.rank))
        nn.init.uniform_(self.a, -(d_in**-0.5), d_in**-0.5)


class AdapterStack(nn.Module):
    """N adapters of one map: A [N, r, in], B [N, out, r]."""

    def __init__(self, d_in: int, d_out: int, lora: LoraConfig) -> None:
        super().__init__()
        self.scale, self.dropout = lora.scale, lora.dropout
        self.a = nn.Parameter(torch.empty(lora.stacks, lora.rank, d_in))
        self.b = nn.Parameter(torch.zeros(lora.stacks, d_out, lora.rank))
        nn.init.uniform_(self.a, -(d_in**-0.5), d_in**-0.5)

    def forward(self, rows: Tensor, pairs: Pairs) -> Tensor:
        """The updates of sorted ``rows`` [R, in], each by its own adapter: [R, out]."""
        rows, a, b = in_product_type(rows, self.a, self.b)
        return update_rows(rows, a, b, self.scale, self.dropout if self.training else 0.0, pairs.ends)


class RoutedAdapters(nn.Module):
    """N adapters of one map and a router on the map's own input.

    ``sum over top-k of softmax(top-k logits) * scale * B_e A_e drop(x)``; the null expert, the last, adds nothing.
    """

    def __init__(self, d_in: int, d_out: int, lora: LoraConfig, routing: MoEConfig) -> None:
        super().__init__()
        assert lora.experts is not None
        self.scale, self.dropout, self.null_expert = lora.scale, lora.dropout, lora.experts.null_expert
        self.a = nn.Parameter(torch.empty(lora.stacks, lora.rank, d_in))
        self.b = nn.Parameter(torch.zeros(lora.stacks, d_out, lora.rank))
        nn.init.uniform_(self.a, -(d_in**-0.5), d_in**-0.5)
        self.router = Router(d_in, routing)

    def forward(self, x: Tensor, routes: Routes) -> Tensor:
        """The update of ``x`` [..., in], [..., out]; what the router did is added to ``routes``."""
        flat = x.reshape(-1, x.shape[-1])
        weights, experts, routing = self.router(flat, routes.mask)
        routes.found.append(routing)
        dropout = self.dropout if self.training else 0.0
        update = routed_update(flat, weights, experts, self.a, self.b, self.scale, dropout, self.null_expert)
        return update.view(*x.shape[:-1], -1)


class AdaptedLinear(nn.Linear):
    """A linear map, of which some parts (blocks of rows) have adapters.

    Args:
        parts: rows of each part, in order.
        adapted: names of the parts with adapters.
    """

    def __init__(self, d_in: int, parts: dict[str, int], adapted: list[str], config: ModelConfig, bias: bool) -> None:
        super().__init__(d_in, sum(parts.values()), bias=bias)
        assert config.lora is not None
        self.parts = parts
        ends = dict(zip(parts, itertools.accumulate(parts.values()), strict=True))
        self.columns = [slice(ends[name] - parts[name], ends[name]) for name in parts if name in adapted]
        self.plain = config.lora.experts is None
        self.switched_on = True
        self.lora = nn.ModuleDict()
        for name in adapted:
            if config.lora.experts is None:
                self.lora[name] = Adapter(d_in, parts[name], config.lora)
            else:
                assert config.routing is not None
                self.lora[name] = RoutedAdapters(d_in, parts[name], config.lora, config.routing)

    def forward(self, x: Tensor, routes: Routes | None = None) -> Tensor:  # type: ignore[override]
        """Map ``x`` [..., in] to [..., out]."""
        if not self.switched_on:
            return super().forward(x)
        if self.plain:
            return self._adapted(x.reshape(-1, x.shape[-1])).view(*x.shape[:-1], -1)
        routes, out = routes or Routes(), super().forward(x)
        found = {name: module(x, routes) for name, module in self.lora.items()}
        if len(self.parts) == 1:
            (update,) = found.values()
            return out + update
        pieces = zip(self.parts, out.split(list(self.parts.values()), dim=-1), strict=True)
        return torch.cat([piece + found[name] if name in found else piece for name, piece in pieces], dim=-1)

    def _adapted(self, x: Tensor) -> Tensor:
        """Map ``x`` [T, in] to [T, out]."""
        adapters: list[Adapter] = list(self.lora.values())  # type: ignore[arg-type]
        first = adapters[0]
        a = hidden = None
        if first.dropout and self.training:  # each part has its own mask
            hidden = torch.cat([F.linear(F.dropout(x, first.dropout), adapter.a) for adapter in adapters], dim=-1)
        else:
            a = torch.cat([adapter.a for adapter in adapters])
        b = [adapter.b for adapter in adapters]
        return adapted_linear(x, self.weight, self.bias, self.columns, first.scale, b, a, hidden)


@contextmanager
def adapters_off(model: nn.Module) -> Iterator[None]:
    """The model beneath its adapters, for as long as it lasts."""
    adapted = [module for module in model.modules() if isinstance(module, AdaptedLinear)]
    for module in adapted:
        module.switched_on = False
    try:
        yield
    finally:
        for module in adapted:
            module.switched_on = True


def make_linear(config: ModelConfig, layer: int | None, d_in: int, parts: dict[str, int], bias: bool) -> nn.Linear:
    """A linear map whose rows are ``parts``, with adapters where ``config.lora`` wants them in that block, if any."""
    chosen = {} if layer is None else config.adapted(layer)
    adapted = [name for name in parts if THEIRS[name] in chosen]
    if not adapted:
        return nn.Linear(d_in, sum(parts.values()), bias=bias)
    return AdaptedLinear(d_in, parts, adapted, config, bias)


def apply_linear(linear: nn.Linear, x: Tensor, routes: Routes | None) -> Tensor:
    """``linear(x)``; one with adapters also writes down what its routers did."""
    return linear(x, routes) if isinstance(linear, AdaptedLinear) else linear(x)


class RoutedMLP(nn.Module):
    """A feed-forward network with N sets of adapters and one router: a mixture of N (+ 1) whole networks, exactly.

    Expert e is the network with weights ``W + scale * B_e A_e``; the null expert, the last, has none added. All base
    products are computed once per token: gate and up before tokens go to their experts, and down, because it is
    linear, after the experts' hidden features came back and were added.
    """

    def __init__(self, config: ModelConfig, layer: int) -> None:
        super().__init__()
        assert config.lora is not None
        assert config.lora.experts is not None
        assert config.ffn_dim is not None
        assert config.routing is not None
        self.kind = config.activation
        self.experts: LoraExperts = config.lora.experts
        self.inner = ("gate", "up") if config.maps_in == 2 else ("up",)
        projection = nn.Linear(config.dim, len(self.inner) * config.ffn_dim, bias=config.bias)
        if config.maps_in == 2:
            self.gate_up = projection
        else:
            self.up = projection
        self.down = nn.Linear(config.ffn_dim, config.dim, bias=config.bias)
        self.ffn_dim = config.ffn_dim
        self.lora = nn.ModuleDict()
        for name in (*self.inner, "down"):
            if widths := config.adapted(layer).get(THEIRS[name]):
                self.lora[name] = AdapterStack(*widths, config.lora)
        self.router = Router(config.dim, config.routing)

    @torch.compiler.disable  # the fake kernel of grouped_mm knows bf16 only
    def forward(self, x: Tensor, routes: Routes | None = None) -> Tensor:
        """Map ``x`` [..., dim] to [..., dim]."""
        routes = routes or Routes()
        flat = x.reshape(-1, x.shape[-1])
        weights, experts, routing = self.router(flat, routes.mask)
        routes.found.append(routing)
        top_k, multiple = experts.shape[1], block_rows(flat.new_empty(0, dtype=product_type(flat)))
        # Rows of the null expert come last and have hidden features too: of the base alone.
        everyone = sort_pairs(experts, self.experts.num_choices, null_expert=False, multiple=multiple)
        hidden = scatter_rows((self.up if len(self.inner) == 1 else self.gate_up)(flat), everyone, top_k)
        adapted = int(everyone.ends[self.experts.num_experts - 1]) if self.experts.null_expert else len(hidden)
        pairs = everyone._replace(ends=everyone.ends[: self.experts.num_experts])
        if any(name in self.lora for name in self.inner):
            rows = scatter_rows(flat, everyone, top_k)[:adapted]
            update = [
                self.lora[name](rows, pairs) if name in self.lora else rows.new_zeros(adapted, self.ffn_dim)
                for name in self.inner
            ]
            hidden = torch.cat([hidden[:adapted] + torch.cat(update, dim=-1), hidden[adapted:]])
        hidden = activation(hidden, self.kind)
        hidden = hidden * row_weights(weights, everyone).to(hidden.dtype)
        out = self.down(collect_rows(hidden, everyone, top_k))
        if "down" in self.lora:
            update_down = self.lora["down"](hidden[:adapted], pairs)
            update_down = F.pad(update_down, (0, 0, 0, len(hidden) - adapted))
            out = out + collect_rows(update_down, everyone, top_k)
        return out.view(*x.shape[:-1], -1)


def has_routed_mlp(config: ModelConfig, layer: int) -> bool:
    """Whether a block's feed-forward network is a `RoutedMLP`."""
    return config.lora is not None and config.lora.routes_mlps and bool(config.adapted(layer))

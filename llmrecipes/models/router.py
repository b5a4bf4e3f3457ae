"""The router: in fp32, with the statistics that balancing needs, and a capacity where there is one."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any, NamedTuple

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from llmrecipes.models.capacity import dropped_pairs, expert_capacity
from llmrecipes.recipe.moe_config import MoEConfig


class Routing(NamedTuple):
    """What one layer's router did, summed over real tokens, so that micro-batches and ranks add.

    Returned, never accumulated by the module: a block recomputed under activation checkpointing counts once.

    Attributes:
        counts: token-expert pairs of each expert, [E] int64, no gradient; those that it had no room for included.
        prob_sum: sum of the router's probabilities, [E] fp32, with gradient.
        z_sum: sum of logsumexp(logits)^2, scalar, with gradient.
        entropy_sum: sum of the entropy of each token's probabilities (nats), scalar, no gradient.
        num_tokens: real tokens, scalar int64 tensor (no wait for the device).
        dropped: pairs that their expert had no room for, scalar int64.
    """

    counts: Tensor
    prob_sum: Tensor
    z_sum: Tensor
    entropy_sum: Tensor
    num_tokens: Tensor
    dropped: Tensor


class _WideLinear(torch.autograd.Function):
    """``x`` times the router's weight in a wider type, of which only ``x`` as it came is kept for the backward pass.

    A copy in fp32 would be twice as large as ``x`` in bf16, which the layer keeps anyway.
    """

    @staticmethod
    def forward(ctx: Any, x: Tensor, weight: Tensor, dtype: torch.dtype) -> Tensor:
        ctx.save_for_backward(x, weight)
        return F.linear(x.to(dtype), weight.to(dtype))

    @staticmethod
    def backward(ctx: Any, grad: Tensor) -> tuple[Tensor | None, Tensor | None, None]:  # type: ignore[override]
        x, weight = ctx.saved_tensors
        of_x = (grad @ weight.to(grad.dtype)).to(x.dtype) if ctx.needs_input_grad[0] else None
        of_weight = (grad.t() @ x.to(grad.dtype)).to(weight.dtype) if ctx.needs_input_grad[1] else None
        return of_x, of_weight, None


class Router(nn.Module):
    """Chooses k experts per token: score all, choose by score + bias, weigh by the unbiased score.

    With a capacity some of the choices come to nothing; weights are then made to sum to one over those that remain.
    ``bias`` [E] is a persistent buffer that only the choice sees (2408.15664); it stays fp32 under ``.bfloat16()``.
    """

    bias: Tensor

    def __init__(self, dim: int, moe: MoEConfig) -> None:
        super().__init__()
        assert moe.num_experts is not None
        self.top_k, self.score, self.renormalize = moe.top_k, moe.score, moe.renormalize
        self.scaling = moe.routed_scaling_factor
        self.capacity_factor, self.eval_capacity_factor = moe.capacity_factor, moe.eval_capacity_factor
        self.min_capacity = 4 if moe.min_capacity is None else moe.min_capacity
        self.drop_policy = moe.drop_policy or "random"
        self.weight = nn.Parameter(torch.empty(moe.num_experts, dim))
        self.register_buffer("bias", torch.zeros(moe.num_experts, dtype=torch.float32))
        nn.init.normal_(self.weight, std=0.02)

    def _apply(self, fn: Callable[[Tensor], Tensor], recurse: bool = True) -> Router:
        kept = self.bias
        super()._apply(fn, recurse)
        moved = self.bias
        if moved.dtype != torch.float32:
            on_device = torch.zeros_like(moved, dtype=torch.float32) if kept.is_meta else kept.to(moved.device)
            self.bias = on_device
        return self

    def factor(self, dropless: bool = False) -> float | None:
        """The capacity factor in force; None where no pair is dropped."""
        if dropless:
            return None
        return self.capacity_factor if self.training else self.eval_capacity_factor

    def forward(
        self, x: Tensor, token_mask: Tensor | None = None, dropless: bool = False
    ) -> tuple[Tensor, Tensor, Routing]:
        """Route ``x`` [T, D]; ``token_mask`` [T] is True for real tokens, which alone enter the statistics.

        ``dropless`` takes every pair, whatever the capacity.

        Returns:
            weights [T, k] (fp32; fp64 for fp64 input), experts [T, k] int64, and the statistics. A dropped pair has
            weight zero and expert E, which there is not.
        """
        with torch.autocast(x.device.type, enabled=False):
            dtype = torch.promote_types(x.dtype, torch.float32)
            logits = _WideLinear.apply(x, self.weight, dtype)
            if self.score == "softmax":
                scores = probs = logits.softmax(-1)
            else:
                scores = logits.sigmoid()
                probs = scores / scores.sum(-1, keepdim=True).clamp_min(1e-20)
            experts = (scores.detach() + self.bias).topk(self.top_k, dim=-1).indices
            weights = scores.gather(-1, experts)
            routing = _statistics(logits, probs, experts, token_mask)
            factor = self.factor(dropless)
            if factor is not None:
                weights, experts, routing = self._drop(weights, experts, routing, token_mask, factor)
            if self.renormalize:
                weights = weights / weights.sum(-1, keepdim=True).clamp_min(1e-20)
            if self.scaling != 1:
                weights = weights * self.scaling
            return weights, experts, routing

    @torch.compiler.disable  # compiled code would draw other numbers
    def _drop(
        self, weights: Tensor, experts: Tensor, routing: Routing, token_mask: Tensor | None, factor: float
    ) -> tuple[Tensor, Tensor, Routing]:
        """Leave out the pairs over capacity. Out of training a random order is the same every time."""
        num_experts = len(self.weight)
        generator = None if self.training else torch.Generator(weights.device).manual_seed(0)
        capacity = expert_capacity(routing.num_tokens, num_experts, self.top_k, factor, self.min_capacity)
        dropped = dropped_pairs(experts, weights, capacity, self.drop_policy, token_mask, generator)
        real = dropped if token_mask is None else dropped & token_mask[:, None]
        routing = routing._replace(dropped=real.sum())
        return weights.masked_fill(dropped, 0.0), experts.masked_fill(dropped, num_experts), routing


def _statistics(logits: Tensor, probs: Tensor, experts: Tensor, token_mask: Tensor | None) -> Routing:
    num_experts = logits.shape[-1]
    squares = logits.logsumexp(-1).square()
    with torch.no_grad():
        entropy = torch.special.entr(probs).sum(-1)
        pairs = experts.reshape(-1)
    none = torch.zeros((), dtype=torch.int64, device=logits.device)
    if token_mask is None:
        counts = torch.bincount(pairs, minlength=num_experts)
        num_tokens = torch.full((), len(logits), dtype=torch.int64, device=logits.device)
        return Routing(counts, probs.sum(0), squares.sum(), entropy.sum(), num_tokens, none)
    real = token_mask.to(probs.dtype)
    # padding is counted as expert E and cut off: no wait for the device as with a boolean index
    pairs = torch.where(token_mask[:, None], experts, num_experts).reshape(-1)
    counts = torch.bincount(pairs, minlength=num_experts + 1)[:num_experts]
    prob_sum = torch.mv(probs.t(), real)  # not real @ probs: torch squeezes that in place, which a checkpoint refuses
    return Routing(counts, prob_sum, real @ squares, real @ entropy, token_mask.sum(), none)

"""How many tokens an expert takes, and which of those that come (GShard, 2006.16668; DeepSpeed-MoE, 2201.05596).

A pair is one token with one of its k experts. A pair over its expert's capacity is dropped: the expert gives that token
nothing. What is dropped depends on all tokens that are routed together, one micro-batch: on no later recomputation, on
no other process, and on the generator of dropout (the ``random`` policy), which is seeded for each micro-batch.
"""

from __future__ import annotations

from fractions import Fraction

import torch
from torch import Tensor

from llmrecipes.recipe.moe_config import DropPolicy


def expert_capacity(num_tokens: Tensor, num_experts: int, top_k: int, factor: float, minimum: int) -> Tensor:
    """``max(minimum, ceil(factor * k * tokens / E))``, DeepSpeed's for every k; a scalar, no wait for the device.

    In whole numbers: in floating point 1.1 * 50 is above 55, and an expert would take one more.

    Args:
        num_tokens: real tokens routed together, scalar int64.
    """
    exact = Fraction(str(factor)).limit_denominator(10**6)
    pairs = num_tokens * (top_k * exact.numerator)
    upward = -(-pairs // (num_experts * exact.denominator))
    return upward.clamp_min(minimum)


def dropped_pairs(
    experts: Tensor,
    scores: Tensor,
    capacity: Tensor,
    policy: DropPolicy,
    token_mask: Tensor | None = None,
    generator: torch.Generator | None = None,
) -> Tensor:
    """Which pairs are over their expert's capacity, [T, k] bool.

    Args:
        experts: chosen experts, [T, k]. scores: the router's scores of them, before they are made to sum to one.
        capacity: what each expert takes, scalar.
        policy: who comes first. Equals, and all of ``position``, come in the order of first choices, then second ones.
        token_mask: [T], True for real tokens; the others take no place, and count as dropped.
        generator: of the ``random`` order; None = torch's own.
    """
    flat = experts.t().reshape(-1)
    if token_mask is not None:
        flat = flat.masked_fill(~token_mask.repeat(experts.shape[1]), -1)
    order = torch.arange(len(flat), device=flat.device)
    if policy == "random":
        order = torch.randperm(len(flat), generator=generator, device=flat.device)
    elif policy == "probs":
        order = scores.detach().t().reshape(-1).argsort(descending=True, stable=True)
    arrived = flat.index_select(0, order)
    by_expert = arrived.argsort(stable=True)  # each expert's pairs in the order of their coming
    arrived = arrived.index_select(0, by_expert)
    place = torch.arange(len(flat), device=flat.device) - torch.searchsorted(arrived, arrived)
    dropped = torch.empty_like(flat, dtype=torch.bool)
    dropped[order.index_select(0, by_expert)] = (place >= capacity) | (arrived < 0)
    return dropped.view(experts.shape[1], -1).t()

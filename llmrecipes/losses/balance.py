"""Losses and measures of how evenly a layer's experts are used.

Per layer, from sums over real tokens, so that micro-batches and ranks add exactly. Never pooled over layers: pooled,
two layers that each collapse onto other experts read as perfectly balanced.
"""

from __future__ import annotations

import math

import torch
from torch import Tensor


def balance_sum(prob_sum: Tensor, counts: Tensor, num_tokens: Tensor | int, top_k: int) -> Tensor:
    """A layer's balance loss as a sum over some of a step's tokens; divided by the step's real tokens it is the loss.

    ``E * sum_e f_e sum_t p_te`` with ``f = counts / (k * num_tokens)`` over the whole step (no gradient): the sums of
    all micro-batches and ranks add up to the step's, and so do their gradients.

    Args:
        prob_sum: probabilities summed over these tokens, [E].
        counts: token-expert pairs of the whole step, [E]. num_tokens: the real tokens they were counted over.
        top_k: experts per token.
    """
    tokens = _tokens(num_tokens, prob_sum)
    load = counts.to(prob_sum.dtype) / (top_k * tokens)
    return len(counts) * (load.detach() * prob_sum).sum()


def balance_loss(prob_sum: Tensor, counts: Tensor, num_tokens: Tensor | int, top_k: int) -> Tensor:
    """A layer's balance loss over all tokens at once (2101.03961): 1.0 at balance, E / k when all share k experts."""
    return balance_sum(prob_sum, counts, num_tokens, top_k) / _tokens(num_tokens, prob_sum)


def _tokens(num_tokens: Tensor | int, like: Tensor) -> Tensor:
    return torch.as_tensor(num_tokens, device=like.device).to(like.dtype).clamp_min(1)


def max_violation(counts: Tensor) -> Tensor:
    """How far the fullest expert lies above the mean, ``max / mean - 1`` (2408.15664).

    ``counts`` [..., E]; returns [...]: 0 at balance, E / k - 1 when all tokens share k experts.
    """
    counts = counts.double()
    return (counts.amax(-1) / counts.mean(-1).clamp_min(1e-20) - 1).float()


def load_entropy(counts: Tensor) -> Tensor:
    """Entropy of the load [..., E] over ln E: 1 at balance, 0 when one expert has everything; returns [...]."""
    load = counts.double() / counts.sum(-1, keepdim=True).clamp_min(1)
    return (torch.special.entr(load).sum(-1) / math.log(max(counts.shape[-1], 2))).float()


def bias_update(counts: Tensor, rate: float) -> Tensor:
    """What to add to a router's bias after a step (2408.15664): ``rate * sign(mean - counts)``, centred to sum to 0.

    ``counts`` [..., E] are those of the whole step, over all ranks; overloaded experts go down, starved ones up.
    """
    counts = counts.float()
    step = rate * torch.sign(counts.mean(-1, keepdim=True) - counts)
    return step - step.mean(-1, keepdim=True)

"""The one global gradient norm, and clipping by it (Pascanu et al., 1211.5063)."""

from __future__ import annotations

from collections.abc import Iterable

import torch
from torch import Tensor, nn


def clip_grad_norm(parameters: Iterable[nn.Parameter], max_norm: float | None) -> Tensor:
    """Scale all gradients so that their joint 2-norm is at most ``max_norm``.

    Args:
        parameters: those without a gradient are passed over.
        max_norm: ``None`` measures without clipping.

    Returns:
        The norm before clipping, a scalar on the gradients' device; not checked for being finite.
    """
    parameters = [p for p in parameters if p.grad is not None]
    norm = torch.nn.utils.get_total_norm([p.grad for p in parameters if p.grad is not None])
    if max_norm is not None:
        torch.nn.utils.clip_grads_with_norm_(parameters, max_norm, norm)
    return norm

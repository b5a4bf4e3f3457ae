"""The one global gradient norm, and clipping by it (Pascanu et al., 1211.5063)."""

from __future__ import annotations

import math
from collections.abc import Iterable

import torch
from torch import Tensor, nn
from torch.distributed.tensor import DTensor

from llmrecipes.distributed.collectives import all_reduce_sum


def clip_grad_norm(
    parameters: Iterable[nn.Parameter], max_norm: float | None, device: torch.device | None = None
) -> Tensor:
    """Scale all gradients so that their joint 2-norm is at most ``max_norm``.

    Sharded gradients count once, wherever their parts are and on however many meshes (experts have one of their own):
    every rank adds the squares of its parts, divided by the number of copies, and one all-reduce sums them.

    Args:
        parameters: those without a gradient are passed over.
        max_norm: ``None`` measures without clipping.
        device: where to add up; ``None`` = the gradients' (offloaded gradients are on the CPU).

    Returns:
        The norm before clipping, a scalar; not checked for being finite.
    """
    gradients = [p.grad for p in parameters if p.grad is not None]
    if not gradients:
        return torch.zeros((), device=device)
    local = [g.to_local() if isinstance(g, DTensor) else g for g in gradients]
    device = device or local[0].device
    norms = torch.stack([n.to(device) for n in torch._foreach_norm(local)])
    if any(isinstance(g, DTensor) for g in gradients):
        copies = torch.tensor([_copies(g) for g in gradients], dtype=norms.dtype, device=device)
        norm = all_reduce_sum((norms.square() / copies).sum()).sqrt()
    else:
        norm = torch.linalg.vector_norm(norms)
    if max_norm is not None:
        scale = (max_norm / (norm + 1e-6)).clamp(max=1.0)
        torch._foreach_mul_(local, scale.to(local[0].device))
    return norm


def _copies(gradient: Tensor) -> int:
    """How many ranks hold each element of a gradient."""
    if not isinstance(gradient, DTensor):
        return 1  # pragma: no cover - FSDP2 leaves no plain parameter
    mesh = gradient.device_mesh
    return math.prod(mesh.size(i) for i, placement in enumerate(gradient.placements) if placement.is_replicate())

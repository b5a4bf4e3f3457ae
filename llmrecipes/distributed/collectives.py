"""Sums over the data ranks, which do nothing where there is one process."""

from __future__ import annotations

import torch
import torch.distributed as dist
from torch import Tensor


def num_ranks() -> int:
    """Processes of the job; 1 when there is no process group."""
    return dist.get_world_size() if dist.is_available() and dist.is_initialized() else 1


def all_reduce_sum(tensor: Tensor) -> Tensor:
    """The sum of ``tensor`` over all ranks, in place; no gradient."""
    if num_ranks() > 1:
        dist.all_reduce(tensor)
    return tensor


def packed_sum(tensors: dict[str, Tensor], device: torch.device) -> dict[str, Tensor]:
    """Sums of many small tensors over all ranks by one all-reduce, in fp64: counts below 2^53 stay exact."""
    if num_ranks() == 1 or not tensors:
        return tensors
    flat = torch.cat([t.detach().to(device, torch.float64).reshape(-1) for t in tensors.values()])
    all_reduce_sum(flat)
    parts = flat.split([t.numel() for t in tensors.values()])
    return {
        name: part.view(tensor.shape).to(tensor.dtype)
        for (name, tensor), part in zip(tensors.items(), parts, strict=True)
    }

"""Experts divided among the processes of a node: tokens travel to them and back (2006.16668)."""

from __future__ import annotations

from typing import Any

import torch
import torch.distributed as dist
import torch.nn.functional as F
from torch import Tensor, nn
from torch.distributed._functional_collectives import all_to_all_single_autograd
from torch.distributed.device_mesh import DeviceMesh
from torch.distributed.tensor import DTensor, Shard, distribute_tensor

from llmrecipes.errors import UserError
from llmrecipes.models.dispatch import run_experts
from llmrecipes.models.moe import Experts, MoE
from llmrecipes.recipe.model_config import Activation


def divide_experts(model: nn.Module, mesh: DeviceMesh) -> None:
    """Give each process of ``mesh`` [expert] its equal part of every layer's experts, in place.

    Raises:
        UserError: their number is not divisible, or there are none.
    """
    found = [module.experts for module in model.modules() if isinstance(module, MoE)]
    if not found:
        raise UserError(
            "trainer.strategy: expert_parallel divides the experts of moe with router per_mlp; there are none"
        )
    for experts in found:
        _divide(experts, mesh)


def _divide(experts: Experts, mesh: DeviceMesh) -> None:
    count, parts = experts.gate_up_proj.shape[0], mesh.size()
    if count % parts:
        raise UserError(f"trainer.strategy: expert_parallel {parts} does not divide the {count} experts of a layer")
    for name, parameter in list(experts.named_parameters(recurse=False)):
        divided = distribute_tensor(parameter.detach(), mesh, [Shard(0)], src_data_rank=None)
        setattr(experts, name, nn.Parameter(divided, requires_grad=parameter.requires_grad))
    experts.run = _Travel(mesh.get_group(), parts, count)


class _Travel:
    """`run_experts` for experts that live on several processes.

    Args:
        group: the processes, in the order of their experts.
        parts: how many they are. num_experts: of the layer.
    """

    def __init__(self, group: dist.ProcessGroup, parts: int, num_experts: int) -> None:
        self.group, self.parts, self.num_experts = group, parts, num_experts

    def __call__(
        self, x: Tensor, weights: Tensor, experts: Tensor, up: Tensor, down: Tensor, kind: Activation,
        may_drop: bool = False,
    ) -> Tensor:  # fmt: skip
        """The weighted sum over each token's experts, [T, D], wherever they are.

        Pairs are sorted by expert (and so by process), sent, computed where their expert lives with weight one, sent
        back, and summed per token in the order of its choices, as without division. Dropped pairs stay at home.
        """
        up, down = (w.to_local() if isinstance(w, DTensor) else w for w in (up, down))
        device = x.device.type
        if torch.is_autocast_enabled(device):
            x = x.to(torch.get_autocast_dtype(device))  # half the bytes on the way
        top_k, here = experts.shape[1], self.num_experts // self.parts
        flat = experts.reshape(-1)
        order = flat.argsort(stable=True)
        counts = torch.bincount(flat, minlength=self.num_experts + may_drop)[: self.num_experts]
        arriving = torch.empty_like(counts)
        dist.all_to_all_single(arriving, counts, group=self.group)  # [process, its local expert]
        send = counts.view(self.parts, here).sum(1).tolist()
        receive = arriving.view(self.parts, here).sum(1).tolist()
        leaving = order[: sum(send)]
        rows = _exchange(x.index_select(0, leaving // top_k), receive, send, self.group)
        local = torch.arange(here, device=x.device).repeat(self.parts).repeat_interleave(arriving)
        ones = torch.ones(len(local), 1, dtype=weights.dtype, device=x.device)
        rows = run_experts(rows, ones, local[:, None], up, down, kind)
        rows = _exchange(rows, send, receive, self.group)
        if may_drop:
            rows = F.pad(rows, (0, 0, 0, len(order) - len(leaving)))
        slot = torch.empty_like(order)
        slot[order] = torch.arange(len(order), device=x.device)
        picked = rows.index_select(0, slot).view(*weights.shape, rows.shape[-1])
        return (picked * weights.to(rows.dtype).unsqueeze(-1)).sum(1)


def _exchange(rows: Tensor, receive: list[int], send: list[int], group: Any) -> Tensor:
    """Send ``rows`` [S, D], cut by ``send``, to each process; returns those received, in the order of processes."""
    return all_to_all_single_autograd(rows.contiguous(), receive, send, group)

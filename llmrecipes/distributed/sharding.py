"""FSDP2 applied to a decoder from outside: one unit per block, sums instead of means."""

from __future__ import annotations

from dataclasses import dataclass, replace

import torch
from torch import nn
from torch.distributed.device_mesh import DeviceMesh
from torch.distributed.fsdp import CPUOffloadPolicy, FSDPModule, MixedPrecisionPolicy, OffloadPolicy, fully_shard
from torch.distributed.tensor import Shard

from llmrecipes.errors import UserError
from llmrecipes.models.moe import MoE
from llmrecipes.models.router import Router


@dataclass(frozen=True)
class Sharding:
    """How parameters are shared.

    Attributes:
        mesh: [shard] or [replicate, shard].
        expert_mesh: the same for experts that are divided among processes; None = as the rest.
        compute_dtype: type that parameters are gathered in; gradients are reduced in fp32 then. None = as they are.
        reshard_after_forward: drop gathered parameters until the backward pass.
        cpu_offload, pin_memory: keep shares in host memory.
    """

    mesh: DeviceMesh
    expert_mesh: DeviceMesh | None
    compute_dtype: torch.dtype | None
    reshard_after_forward: bool
    cpu_offload: bool
    pin_memory: bool

    def policy(self, compute_dtype: torch.dtype | None) -> MixedPrecisionPolicy:
        """Precision of a unit; autocast, where it is on, decides about activations."""
        reduce = None if compute_dtype is None else torch.float32
        return MixedPrecisionPolicy(param_dtype=compute_dtype, reduce_dtype=reduce, cast_forward_inputs=False)

    @property
    def offload(self) -> OffloadPolicy:
        """Where shares live."""
        return CPUOffloadPolicy(pin_memory=self.pin_memory) if self.cpu_offload else OffloadPolicy()


def shard_model(model: nn.Module, sharding: Sharding) -> None:
    """Make every block a unit, and the rest (embedding, last norm, head) the root's.

    Routers are units of their own that stay in fp32: a choice between experts must not depend on bf16 rounding.
    """
    for block in model.layers:  # type: ignore[union-attr]
        if isinstance(block.mlp, MoE) and sharding.expert_mesh is not None:
            _shard_experts(block.mlp.experts, sharding, sharding.expert_mesh)
        for module in block.modules():
            if isinstance(module, Router) and sharding.compute_dtype is not None:
                _shard(module, sharding, None, sharding.mesh)
        _shard(block, sharding, sharding.compute_dtype, sharding.mesh)
    # The root stays gathered until the backward pass: the loss multiplies by the head after the forward pass.
    _shard(model, replace(sharding, reshard_after_forward=False), sharding.compute_dtype, sharding.mesh)
    for module in model.modules():
        if isinstance(module, FSDPModule):
            # Losses are divided by the count of the whole step: gradients add up. gloo knows no other operation.
            module.set_gradient_divide_factor(1.0)
            module.set_force_sum_reduction_for_comms(True)


def _shard_experts(experts: nn.Module, sharding: Sharding, mesh: DeviceMesh) -> None:
    _shard(experts, sharding, sharding.compute_dtype, mesh["expert_shard"] if mesh.size(0) == 1 else mesh)


def _shard(module: nn.Module, sharding: Sharding, dtype: torch.dtype | None, mesh: DeviceMesh) -> None:
    size = mesh.size(mesh.ndim - 1)
    fully_shard(
        module,
        mesh=mesh,
        reshard_after_forward=sharding.reshard_after_forward,
        shard_placement_fn=lambda p: _placement(p, size),
        mp_policy=sharding.policy(dtype),
        offload_policy=sharding.offload,
    )


def _placement(parameter: nn.Parameter, size: int) -> Shard | None:
    """Stacks of experts are cut inside every expert: few experts over many processes leave nobody without a share."""
    if parameter.ndim < 3:
        return None
    for dim in (1, 2):
        if parameter.shape[dim] % size == 0:
            return Shard(dim)
    raise UserError(
        f"trainer.strategy: experts of shape {tuple(parameter.shape)} (experts, rows, columns) cannot be shared by "
        f"{size} processes: neither rows nor columns are divisible; choose another moe.ffn_dim"
    )


def prepare_micro_batch(model: nn.Module, is_last: bool, reduce_every: bool, keeps_gathered: bool) -> None:
    """Before a micro-batch's forward pass: what its backward pass does with gradients and gathered parameters."""
    assert isinstance(model, FSDPModule)
    model.set_is_last_backward(is_last)
    model.set_requires_gradient_sync(is_last or reduce_every)
    # Between nodes once per step: what is shared out inside a node waits there.
    model.set_requires_all_reduce(is_last)
    model.set_reshard_after_backward(is_last or not keeps_gathered)

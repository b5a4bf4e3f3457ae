"""The same tensors and the same small model on different numbers of ranks, for the tests of resharding."""

from __future__ import annotations

import torch
import torch.distributed as dist
from torch import nn
from torch.distributed.device_mesh import init_device_mesh
from torch.distributed.fsdp import fully_shard
from torch.distributed.tensor import DTensor, Replicate, Shard, distribute_tensor

# Number of ranks: None = a single process that never initializes torch.distributed.
LAYOUTS = {"plain": None, "alone": (1,), "full-2": (2,), "full-4": (4,), "hybrid-2x2": (2, 2), "no-shard-4": (4, 1)}


def join() -> None:
    if not dist.is_initialized():
        dist.init_process_group("gloo")


def ranks_of(layout: str) -> int:
    shape = LAYOUTS[layout]
    return 0 if shape is None else shape[0] * (shape[1] if len(shape) > 1 else 1)


def mesh_of(layout: str):
    shape = LAYOUTS[layout]
    names = ("replicate", "shard") if len(shape) == 2 else ("shard",)
    return init_device_mesh("cpu", shape, mesh_dim_names=names)


def whole_tensors() -> dict[str, torch.Tensor]:
    generator = torch.Generator().manual_seed(0)

    def draw(*shape):
        return torch.randn(*shape, generator=generator)

    return {
        "even": draw(8, 3),
        "uneven": draw(5, 3),  # 2, 2, 1 and nothing on 4 ranks
        "tiny": draw(1, 4).bfloat16(),  # one rank has all of it
        "nothing": torch.zeros(0, 5),
        "experts": draw(4, 6, 8),
        "columns": draw(3, 7).double(),
        "plain.bias": draw(3),  # no DTensor: equal on all ranks
        "plain.scalar": torch.tensor(4.0),
        "counts": torch.arange(9),
    }


def placed_tensors(layout: str) -> dict[str, torch.Tensor]:
    """As FSDP2 and expert parallelism place them: experts on a mesh of their own, cut in two dimensions."""
    tensors = whole_tensors()
    if LAYOUTS[layout] is None:
        return tensors
    mesh = mesh_of(layout)
    replicate = [Replicate()] * (mesh.ndim - 1)
    placed = {
        name: t if name.startswith("plain.") else distribute_tensor(t, mesh, [*replicate, Shard(0)])
        for name, t in tensors.items()
    }
    placed["columns"] = distribute_tensor(tensors["columns"], mesh, [*replicate, Shard(1)])
    experts = {2: (1, 1, 2), 4: (1, 2, 2)}.get(dist.get_world_size(), (1, 1, 1))
    mesh = init_device_mesh("cpu", experts, mesh_dim_names=("expert_replicate", "expert_shard", "expert"))
    placed["experts"] = distribute_tensor(tensors["experts"], mesh, [Replicate(), Shard(1), Shard(0)])
    return placed


def whole(tensor: torch.Tensor) -> torch.Tensor:
    return tensor.full_tensor() if isinstance(tensor, DTensor) else tensor


class Net(nn.Module):
    """Two units, one with a buffer; 10 and 7 are not divisible by 4."""

    def __init__(self, seed: int):
        super().__init__()
        torch.manual_seed(seed)
        self.blocks = nn.ModuleList([nn.Linear(10, 7), nn.Linear(7, 10, bias=False)])
        self.norm = nn.LayerNorm(10)
        self.register_buffer("balance", torch.randn(5))

    def forward(self, x):
        for block in self.blocks:
            x = block(x)
        return self.norm(x) + self.balance.sum()


def net(layout: str, seed: int, fused: bool = False):
    """A model and its optimizer, sharded as ``layout`` says."""
    model = Net(seed)
    if LAYOUTS[layout] is not None:
        join()
        mesh = mesh_of(layout)
        for unit in (*model.blocks, model):
            fully_shard(unit, mesh=mesh)
    decayed = [p for p in model.parameters() if p.ndim > 1]
    others = [p for p in model.parameters() if p.ndim < 2]
    return model, torch.optim.AdamW([{"params": others, "weight_decay": 0.0}, {"params": decayed}], 0.1, fused=fused)


def train(model, optimizer, steps: int) -> None:
    generator = torch.Generator().manual_seed(5)
    for _ in range(steps):
        model(torch.randn(4, 10, generator=generator)).square().sum().backward()
        optimizer.step()
        optimizer.zero_grad()

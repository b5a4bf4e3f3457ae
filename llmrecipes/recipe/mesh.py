"""How the processes of a job form a mesh: plain integers, shared by ``check`` and the strategy."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Literal, get_args

Mode = Literal["no_shard", "shard_grad_op", "zero2", "full_shard", "zero3", "hybrid_shard", "hybrid_shard_zero2"]
MODES: tuple[str, ...] = get_args(Mode)
# The DeepSpeed names of the same thing.
ALIASES = {"zero2": "shard_grad_op", "zero3": "full_shard"}
HYBRID = ("hybrid_shard", "hybrid_shard_zero2")
# Parameters stay gathered between forward and backward: less traffic, more memory.
KEEPS_GATHERED = ("shard_grad_op", "hybrid_shard_zero2")
OFFLOADABLE = ("shard_grad_op", "full_shard")


@dataclass(frozen=True)
class MeshSizes:
    """Sizes of the mesh, ranks in node-major order.

    Attributes:
        replicate: copies of the parameters.
        shard: processes that share one copy.
        expert: processes among which the experts of one layer are divided; part of a node.
    """

    replicate: int
    shard: int
    expert: int = 1

    @property
    def experts(self) -> tuple[int, int, int]:
        """The same processes as (copies of an expert, processes that share it, groups of experts)."""
        if self.shard > 1:
            return self.replicate, self.shard // self.expert, self.expert
        return self.replicate // self.expert, 1, self.expert


def mesh_sizes(
    mode: str, nodes: int, per_node: int, mesh: list[int] | tuple[int, ...] | None = None, expert_parallel: int = 1
) -> MeshSizes:
    """The mesh of a job.

    Args:
        mode: one of `MODES`.
        nodes, per_node: machines, and processes on each.
        mesh: ``[replicate, shard]`` for hybrid modes; None = copies on every node, shared by its processes.
        expert_parallel: processes among which experts are divided.

    Raises:
        ValueError: sizes that do not fit, with the numbers.
    """
    name, world = ALIASES.get(mode, mode), nodes * per_node
    job = f"{nodes} node{'s' if nodes > 1 else ''} x {per_node} process{'es' if per_node > 1 else ''} = {world}"
    if mesh is not None and name not in HYBRID:
        raise ValueError(f"mesh {list(mesh)} is for hybrid modes only; {mode} has one dimension ({job})")
    if name in HYBRID:
        replicate, shard = _hybrid(mode, nodes, per_node, mesh, job)
    elif name == "no_shard":
        replicate, shard = world, 1
    else:
        replicate, shard = 1, world
    _check_experts(expert_parallel, replicate, shard, per_node, job)
    return MeshSizes(replicate, shard, expert_parallel)


def _hybrid(
    mode: str, nodes: int, per_node: int, mesh: list[int] | tuple[int, ...] | None, job: str
) -> tuple[int, int]:
    if mesh is None:
        if nodes == 1:
            raise ValueError(
                f"{mode} keeps one copy per node, and there is one node ({job}): use full_shard, or say how many "
                "copies with mesh: [replicate, shard]"
            )
        return nodes, per_node
    if len(mesh) != 2 or min(mesh) < 1:
        raise ValueError(f"mesh {list(mesh)} is not [replicate, shard], two numbers of at least 1")
    replicate, shard = mesh
    if replicate * shard != nodes * per_node:
        raise ValueError(f"mesh {replicate} x {shard} = {replicate * shard} processes, the job has {job}")
    if per_node % shard:
        raise ValueError(
            f"mesh {replicate} x {shard} would share one copy between nodes: shard {shard} does not divide the "
            f"{per_node} processes of a node"
        )
    return replicate, shard


def _check_experts(expert: int, replicate: int, shard: int, per_node: int, job: str) -> None:
    if expert < 1:
        raise ValueError(f"expert_parallel {expert} is less than 1")
    if per_node % expert:
        raise ValueError(
            f"expert_parallel {expert} does not divide the {per_node} processes of a node ({job}): tokens would cross "
            "the network at every layer"
        )
    group = shard if shard > 1 else replicate
    if group % expert:
        raise ValueError(f"expert_parallel {expert} does not divide the {group} processes that share a copy ({job})")

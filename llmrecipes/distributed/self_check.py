"""Before step 1, and once after its gradients: do the processes agree, and does a sum over them sum?

Multi-node runs whose loss does not fall as on one node come from nodes with another recipe, other data or another
version, and from meshes that connect the wrong processes. Each is found here, and the rank that differs is named.
"""

from __future__ import annotations

import logging
import math
import socket
from collections import Counter
from collections.abc import Callable, Iterable, Iterator
from typing import Any

import lightning.pytorch as L
import torch
import torch.distributed as dist
from torch import Tensor, nn
from torch.distributed.device_mesh import DeviceMesh
from torch.distributed.tensor import DTensor

from llmrecipes.distributed.collectives import num_ranks
from llmrecipes.errors import UserError

log = logging.getLogger("llmrecipes")

# Sums in another order may differ by rounding; another gradient differs by more.
TOLERANCE = 1e-4


class SelfCheck(L.Callback):
    """Compares the ranks before training, and their first reduced gradients.

    Args:
        facts: what all ranks must agree on; called when the data is open.
    """

    def __init__(self, facts: Callable[[], dict[str, Any]]) -> None:
        self._facts = facts
        self._digest: dict[tuple[Any, ...], list[float]] | None = None
        self._done = False

    def setup(self, trainer: L.Trainer, pl_module: L.LightningModule, stage: str) -> None:
        strategy: Any = trainer.strategy
        if num_ranks() > 1:
            facts, meshes = self._facts(), getattr(strategy, "meshes", [])
            check_agreement(facts)
            check_sums(meshes, strategy.root_device)
            if trainer.is_global_zero:
                log.info(f"self-check: {num_ranks()} ranks agree on {len(facts)} settings; sums over them are right")

    def on_before_optimizer_step(self, trainer: L.Trainer, pl_module: Any, optimizer: Any) -> None:
        if not self._done and num_ranks() > 1:
            self._digest = gradient_digest(pl_module.parameters())

    def on_train_batch_end(self, trainer: L.Trainer, pl_module: Any, outputs: Any, batch: Any, batch_idx: int) -> None:
        if self._done or self._digest is None:
            return
        step = pl_module.last_step
        check_first_gradient(self._digest, float(step.grad_norm), float(step.losses["loss"]))
        if trainer.is_global_zero:
            log.info("self-check: the first gradients are the same on all ranks")
        self._done, self._digest = True, None


def check_agreement(facts: dict[str, Any]) -> None:
    """All ranks must have the same facts. Collective; does nothing on one process.

    Args:
        facts: name in the user's words -> value, of this rank.

    Raises:
        UserError: on all ranks, naming each that differs, what, and both values.
    """
    if num_ranks() == 1:
        return
    mine = {name: str(value) for name, value in facts.items()}
    gathered: list[Any] = [None] * num_ranks()
    dist.all_gather_object(gathered, (socket.gethostname(), mine))
    problems = list(disagreements(gathered))
    if problems:
        raise UserError(*problems)


def disagreements(gathered: list[tuple[str, dict[str, str]]]) -> Iterator[str]:
    """One sentence per fact and group of ranks that differ from the majority; of equal halves, rank 0's is right.

    Args:
        gathered: host name and facts of each rank.
    """
    for name in dict.fromkeys(name for _, facts in gathered for name in facts):
        values = [facts.get(name, "nothing") for _, facts in gathered]
        usual, _ = Counter(values).most_common(1)[0]  # the first of equals: rank 0's
        for value in dict.fromkeys(value for value in values if value != usual):
            ranks = [rank for rank, other in enumerate(values) if other == value]
            example = values.index(usual)
            yield (
                f"{_named(ranks, gathered)} {'differs' if len(ranks) == 1 else 'differ'} in {name}: {value}; "
                f"rank {example} on {gathered[example][0]} has {usual}"
            )


def _named(ranks: list[int], gathered: list[tuple[str, dict[str, str]]]) -> str:
    shown = ", ".join(f"{rank} on {gathered[rank][0]}" for rank in ranks[:8])
    more = f" and {len(ranks) - 8} more" if len(ranks) > 8 else ""
    return f"rank{'s' if len(ranks) > 1 else ''} {shown}{more}"


def check_sums(meshes: Iterable[DeviceMesh], device: torch.device) -> None:
    """Over each dimension of each mesh, and over all ranks: who is connected, and does a sum over them sum?

    Every rank adds its number plus one; what comes out is known beforehand. Collective.

    Raises:
        UserError: on all ranks, naming those that got another sum, with both numbers.
    """
    if num_ranks() == 1:
        return
    problems = _wrong_sum("all processes", None, list(range(num_ranks())), device)
    for mesh in meshes:
        for i, name in enumerate(mesh.mesh_dim_names or ()):
            group = mesh.get_group(i)
            problems += _wrong_sum(f"the mesh dimension {name}", group, _peers(mesh, i), device)
    gathered: list[Any] = [None] * num_ranks()
    dist.all_gather_object(gathered, problems)
    if found := [problem for problems in gathered for problem in problems]:
        raise UserError(*found[:8])


def _peers(mesh: DeviceMesh, dim: int) -> list[int]:
    """The ranks that this one shares a dimension of the mesh with, by the mesh's own table."""
    coordinate = mesh.get_coordinate()
    assert coordinate is not None
    index: list[Any] = [slice(None) if i == dim else place for i, place in enumerate(coordinate)]
    return mesh.mesh[tuple(index)].tolist()


def _wrong_sum(what: str, group: Any, ranks: list[int], device: torch.device) -> list[str]:
    total = torch.tensor(float(dist.get_rank() + 1), device=device)
    dist.all_reduce(total, group=group)
    expected = sum(rank + 1 for rank in ranks)
    if total.item() == expected:
        return []
    return [
        f"a sum over {what} gives {total.item():g} on rank {dist.get_rank()} (on {socket.gethostname()}) instead of "
        f"{expected}: other processes answer than the ranks {ranks}; check NODE_RANK, LOCAL_RANK and the network "
        "interface (NCCL_SOCKET_IFNAME, GLOO_SOCKET_IFNAME)"
    ]


def gradient_digest(parameters: Iterable[nn.Parameter]) -> dict[tuple[Any, ...], list[float]]:
    """Of this rank's shares of the reduced gradients: which share of how many -> [sum, sum of squares].

    Parameters are grouped by their mesh, and by this rank's place on those of its dimensions that share; ranks with the
    same place there hold copies, which must be equal.
    """
    groups: dict[tuple[Any, ...], list[Tensor]] = {}
    for parameter in parameters:
        if parameter.grad is not None:
            groups.setdefault(_share(parameter.grad), []).append(_local(parameter.grad))
    digest = {}
    for share, gradients in groups.items():
        sums = torch.stack([g.double().sum() for g in gradients]).sum()
        squares = torch.stack([g.double().square().sum() for g in gradients]).sum()
        digest[share] = torch.stack([sums, squares]).tolist()
    return digest


def _local(gradient: Tensor) -> Tensor:
    return gradient.to_local() if isinstance(gradient, DTensor) else gradient


def _share(gradient: Tensor) -> tuple[Any, ...]:
    """The mesh's dimensions, and the place on those that share, as plain values."""
    if not isinstance(gradient, DTensor):
        return ()
    coordinate = gradient.device_mesh.get_coordinate()
    assert coordinate is not None
    names = gradient.device_mesh.mesh_dim_names or ()
    sharing = [i for i, placement in enumerate(gradient.placements) if not placement.is_replicate()]
    # Copies along a dimension are those with the same place on all others, also those outside this mesh.
    outside = [] if gradient.device_mesh.size() == num_ranks() else [int(gradient.device_mesh.mesh.min())]
    return (*names, *outside, *((names[i] if names else i, coordinate[i]) for i in sharing))


def check_first_gradient(digest: dict[tuple[Any, ...], list[float]], grad_norm: float, loss: float) -> None:
    """After the gradients of the first step are reduced: copies are equal, loss and norm are the same everywhere.

    Collective; does nothing on one process.

    Args:
        digest: :func:`gradient_digest` of this rank, before or after clipping.
        grad_norm, loss: of the step, as this rank has them.

    Raises:
        UserError: on all ranks, naming the ranks that differ.
    """
    if num_ranks() == 1:
        return
    gathered: list[Any] = [None] * num_ranks()
    dist.all_gather_object(gathered, (socket.gethostname(), digest, {"gradient norm": grad_norm, "loss": loss}))
    if problems := list(gradient_problems(gathered)):
        raise UserError(*problems[:8])


def gradient_problems(gathered: list[tuple[str, dict[tuple[Any, ...], list[float]], dict[str, float]]]) -> list[str]:
    """What is wrong with the first gradients of all ranks.

    Args:
        gathered: host name, digest and figures of each rank.
    """
    problems = []
    for name in ("gradient norm", "loss"):
        problems += _unequal(
            f"the {name} of the first step", {r: [g[2][name]] for r, g in enumerate(gathered)}, gathered
        )
    for share in dict.fromkeys(share for _, digest, _ in gathered for share in digest):
        holders = {rank: digest[share] for rank, (_, digest, _) in enumerate(gathered) if share in digest}
        problems += _unequal("its copy of the first step's reduced gradients (sum, sum of squares)", holders, gathered)
    return problems


def _unequal(what: str, values: dict[int, list[float]], gathered: list[Any]) -> list[str]:
    """The ranks whose numbers are not those of most."""
    reference = max(values, key=lambda rank: sum(_close(values[rank], other) for other in values.values()))
    return [
        f"rank {rank} on {gathered[rank][0]} differs in {what}: {_shown(numbers)}; rank {reference} on "
        f"{gathered[reference][0]} has {_shown(values[reference])}: gradients are not summed over all processes"
        for rank, numbers in values.items()
        if not _close(numbers, values[reference])
    ]


def _close(a: list[float], b: list[float]) -> bool:
    """Equal up to rounding; a sum of numbers of both signs is compared on the scale of their size."""
    scale = math.sqrt(a[-1] * b[-1]) if len(a) == 2 and min(a[-1], b[-1]) > 0 else 0.0
    return all(
        math.isclose(x, y, rel_tol=TOLERANCE, abs_tol=TOLERANCE * math.sqrt(scale)) or (math.isnan(x) and math.isnan(y))
        for x, y in zip(a, b, strict=True)
    )


def _shown(numbers: list[float]) -> str:
    return ", ".join(f"{number:.8g}" for number in numbers)

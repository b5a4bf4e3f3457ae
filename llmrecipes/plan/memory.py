"""Bytes of one rank: weights, gradients, optimizer, what is gathered, activations. Torch-free."""

from __future__ import annotations

from dataclasses import dataclass

from llmrecipes.plan.job import Job
from llmrecipes.plan.sizes import Sizes
from llmrecipes.recipe.mesh import KEEPS_GATHERED, OFFLOADABLE

# Left free on a GPU: CUDA's context, NCCL's buffers, what the allocator cannot reuse. A rule of thumb, not measured.
RESERVED = 0.07
ADAM_STATES = 2


@dataclass(frozen=True)
class Memory:
    """Of one rank, in bytes.

    Attributes:
        weights, gradients, optimizer: the rank's share. reference: a frozen second model.
        gathered: whole weights of the blocks at work, and the buffers through which gradients are shared out.
        activations: everything else at the worst moment of a micro-batch.
        on_host: of these, what lies in the host's memory.
    """

    weights: float
    gradients: float
    optimizer: float
    gathered: float
    activations: float
    reference: float = 0.0
    on_host: float = 0.0

    @property
    def device(self) -> float:
        """What the device must hold."""
        parts = self.weights + self.gradients + self.optimizer + self.reference + self.gathered + self.activations
        return parts - self.on_host


def zero_states(
    params: float, stage: int, ranks: int, weight: float = 2, gradient: float = 4, optimizer: float = 8
) -> float:
    """Bytes of one rank under ZeRO (1910.02054): stage 1 shares the optimizer, 2 gradients too, 3 weights too.

    The defaults are bf16 weights, fp32 gradients and two fp32 moments.
    """
    shared = [optimizer, gradient, weight][:stage]
    whole = weight + gradient + optimizer - sum(shared)
    return params * (whole + sum(shared) / ranks)


def checkpoint_bytes(params: float, per_param: float = 12) -> float:
    """Of weights and optimizer: 12 bytes a parameter here (fp32 and two moments); Megatron's 14 add bf16 weights."""
    return params * per_param


def param_bytes(precision: str) -> int:
    """Bytes of one weight, gradient or moment as they are kept."""
    if precision.startswith("64"):
        return 8
    return 2 if precision in ("bf16-true", "16-true") else 4


def memory_of(
    job: Job, model: Sizes, activations: float, mode: str | None = None, cpu_offload: bool | None = None
) -> Memory:
    """What one rank holds, in the job's mode or another.

    Raises:
        ValueError: the job's processes do not form that mode's mesh.
    """
    offload = job.cpu_offload if cpu_offload is None else cpu_offload
    mesh, kept = job.sizes(mode), param_bytes(job.precision)
    experts = model.experts if mesh.expert > 1 else 0
    copies = mesh.experts[1] * mesh.experts[2]
    weights = ((model.total - experts) / mesh.shard + experts / copies) * kept
    trained = weights * model.trainable / model.total
    gathered = _gathered(job, model, mode or job.mode, mesh.expert) if job.sharded or mode is not None else 0.0
    total = weights + trained * (1 + ADAM_STATES)
    return Memory(
        weights=weights,
        gradients=trained,
        optimizer=trained * ADAM_STATES,
        gathered=gathered,
        activations=activations,
        reference=weights if job.reference else 0.0,
        on_host=total if offload and (mode or job.mode) in OFFLOADABLE else 0.0,
    )


def _gathered(job: Job, model: Sizes, mode: str, expert: int) -> float:
    """Whole weights in the type of the products, and gradients on their way: in that type, and in fp32 to be added."""
    computed = 2 if "16" in job.precision else param_bytes(job.precision)
    away = 1 - 1 / expert  # experts that other processes hold are never gathered here
    sizes = [block - away * experts for block, experts in zip(model.blocks, model.block_experts, strict=True)]
    largest = max(sizes)
    whole = sum(sizes) if mode in KEEPS_GATHERED else min(2, len(sizes)) * largest
    trained = model.trainable / model.total
    on_the_way = max(largest, model.rest) * (computed + 4) * trained
    waiting = 0.0 if job.reduce_every else (sum(sizes) + model.rest) * 4 * trained
    return (whole + model.rest) * computed + on_the_way + waiting

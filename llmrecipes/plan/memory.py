"""Bytes of one rank: weights, gradients, optimizer, what is gathered, activations. Torch-free."""

from __future__ import annotations

from dataclasses import asdict, astuple, dataclass

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
        gathered: at the worst moment of a micro-batch, whole weights of the blocks at work, and the buffers through
            which gradients are shared out.
        activations: everything else at that moment.
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


@dataclass(frozen=True)
class Moments:
    """Activations, in bytes, at most: as the forward pass runs, in the loss, as the backward pass runs through the last
    block, those between, the first one, and what lies before that. A moment that there is not is 0.
    """

    forward: float = 0.0
    loss: float = 0.0
    last_block: float = 0.0
    between: float = 0.0
    first_block: float = 0.0
    embedding: float = 0.0

    @property
    def worst(self) -> float:
        """The most of all."""
        return max(astuple(self))


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
    job: Job, model: Sizes, moments: Moments, mode: str | None = None, cpu_offload: bool | None = None
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
    total = weights + trained * (1 + ADAM_STATES)
    gathered, activations = 0.0, moments.worst
    if job.sharded or mode is not None:
        at = _gathered(job, model, mode or job.mode, mesh.expert, trained)
        kept = offload or job.micro_batches > 1  # gradients of earlier micro-batches are there, or none take room
        there = {name: trained * (1.0 if kept else share) for name, share in _arrived(model).items()}
        sums = {name: size + at[name] + there[name] for name, size in asdict(moments).items()}
        worst = max(sums, key=lambda name: sums[name])
        gathered, activations = at[worst], max(0.0, sums[worst] - at[worst] - trained)
    return Memory(
        weights=weights,
        gradients=trained,
        optimizer=trained * ADAM_STATES,
        gathered=gathered,
        activations=activations,
        reference=weights if job.reference else 0.0,
        on_host=total if offload and (mode or job.mode) in OFFLOADABLE else 0.0,
    )


def _arrived(model: Sizes) -> dict[str, float]:
    """Share of the gradients that are there at each moment of the only micro-batch of a step."""
    later = sum(model.blocks[1:]) / model.total
    return {"forward": 0.0, "loss": 0.0, "last_block": 0.0, "between": later, "first_block": later, "embedding": 1.0}


def _gathered(job: Job, model: Sizes, mode: str, expert: int, share: float) -> dict[str, float]:
    """At each moment: whole weights in the type of the products, and gradients on their way, in that type, and in fp32
    to be added. The root (embedding, last norm, head) stays from the forward pass to the end of the backward one.
    ``share``: bytes of the rank's share of the gradients.
    """
    computed = 2 if "16" in job.precision else param_bytes(job.precision)
    away = 1 - 1 / expert  # experts that other processes hold are never gathered here
    sizes = [block - away * experts for block, experts in zip(model.blocks, model.block_experts, strict=True)]
    largest, root = max(sizes), model.rest * computed
    trained = model.trainable / model.total
    one_by_one = min(2, len(sizes)) * largest * computed  # a block at work, and the next on its way
    keeps = mode in KEEPS_GATHERED
    forward = sum(sizes) * computed if keeps else one_by_one
    loss = forward if keeps else 0.0
    shared_out = largest * (computed + 4) * trained
    waits = not job.reduce_every and job.micro_batches > 1
    # Gradients wait whole, where their share is counted already.
    waiting = max(0.0, (sum(sizes) + model.rest) * 4 * trained - share) if waits else 0.0
    head = job.config.vocab_rows * job.config.dim * computed * trained  # its gradient waits for that of the embedding
    moments = {
        "forward": forward,
        "loss": loss,
        "last_block": forward + head + shared_out,
        "between": forward + head + shared_out,
        "first_block": one_by_one + head + shared_out,
        "embedding": model.rest * (computed + 4) * trained,
    }
    return {name: size + root + waiting for name, size in moments.items()}

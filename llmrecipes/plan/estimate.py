"""The plan of one recipe: every figure, as data."""

from __future__ import annotations

from dataclasses import asdict, dataclass, replace
from typing import Any

from llmrecipes.plan.activations import Step, count_moments
from llmrecipes.plan.failures import PER_GPU_HOUR, WEEK, FailureCost, failure_cost
from llmrecipes.plan.hardware import GPUs
from llmrecipes.plan.job import Job
from llmrecipes.plan.layout import Layout, assumed_layout
from llmrecipes.plan.memory import RESERVED, Memory, Moments, checkpoint_bytes, memory_of, param_bytes
from llmrecipes.plan.sizes import Sizes, Trained, model_sizes
from llmrecipes.recipe.mesh import HYBRID

ASSUMED_MFU = 0.35
SAVE_BYTES_PER_SECOND = 1e9  # of one node's writer, when nothing is known
RESTART_SECONDS = 600.0
_MODES = ("no_shard", "shard_grad_op", "full_shard", *HYBRID)


@dataclass(frozen=True)
class Speed:
    """How fast it goes, and how that is known.

    Attributes:
        tokens_per_second: of the whole job. origin: ``given MFU``, ``assumed MFU`` or ``measured in ...``.
        mfu: share of the peak; None where the peak is not known.
    """

    tokens_per_second: float
    origin: str
    mfu: float | None


@dataclass(frozen=True)
class Plan:
    """What a recipe needs; bytes, seconds, FLOPs.

    Attributes:
        job, model: what is trained. gpus: on what, if known.
        memory: of one rank as the recipe is. strategies: in every mode that the processes allow.
        checkpoint: bytes of one. speed: None where nothing is known.
        failures: None without GPUs, speed or an interval.
        advice: changes that make it fit, each with what the device then holds; empty when it fits.
    """

    job: Job
    model: Sizes
    gpus: GPUs | None
    memory: Memory
    strategies: dict[str, Memory]
    checkpoint: float
    speed: Speed | None
    failures: FailureCost | None
    failures_per_week: float
    save_seconds: float
    advice: list[tuple[str, float]]

    @property
    def flops_per_token(self) -> int:
        """The model's work on one token, at the recipe's sequence length."""
        return self.job.config.flops_per_token(self.job.seq_len)

    @property
    def usable(self) -> float | None:
        """Bytes of a GPU that training may fill."""
        return None if self.gpus is None else usable(self.gpus)

    @property
    def fits(self) -> bool | None:
        """Whether a rank's share fits its GPU; None where the GPU is not known."""
        return None if self.usable is None else self.memory.device <= self.usable

    @property
    def seconds(self) -> float | None:
        """Of the whole run without failures."""
        return None if self.speed is None else self.job.tokens / self.speed.tokens_per_second

    @property
    def step_seconds(self) -> float | None:
        """Of one optimizer step."""
        return None if self.speed is None else self.job.tokens_per_step / self.speed.tokens_per_second

    def as_dict(self) -> dict[str, Any]:
        """For JSON; bytes, seconds, FLOPs."""
        job, gpus = self.job, self.gpus
        known = {} if gpus is None else {"count": gpus.count, **asdict(gpus.gpu), "usable": self.usable}
        return {
            "name": job.name,
            "params": {"total": self.model.total, "active": job.config.active_params, "trained": self.model.trainable},
            "ranks": {"nodes": job.nodes, "per_node": job.per_node, "mode": job.mode if job.sharded else None},
            "gpus": known or None,
            "memory": {**asdict(self.memory), "device": self.memory.device},
            "rows": {"labels": layout_of(job).share, "assumed": layout_of(job).assumed or None},
            "strategies": {mode: {**asdict(m), "device": m.device} for mode, m in self.strategies.items()},
            "fits": self.fits,
            "advice": [{"change": change, "device": device} for change, device in self.advice],
            "checkpoint_bytes": self.checkpoint,
            "flops_per_token": self.flops_per_token,
            "tokens_per_step": job.tokens_per_step,
            "steps": job.max_steps,
            "tokens": job.tokens,
            "flops": self.flops_per_token * job.tokens,
            "speed": None if self.speed is None else asdict(self.speed),
            "seconds_per_step": self.step_seconds,
            "seconds": self.seconds,
            "failures": None if self.failures is None else asdict(self.failures),
            "failures_per_week": self.failures_per_week,
            "save_seconds": self.save_seconds,
        }


def usable(gpus: GPUs) -> float:
    """Bytes of one GPU that training may fill."""
    return gpus.gpu.memory * (1 - RESERVED)


def trained_of(job: Job) -> Trained:
    """Which parameters the job trains."""
    return Trained(job.trainable, job.frozen)


def layout_of(job: Job) -> Layout:
    """How the job's rows are filled, assumed where nobody looked at its data."""
    return job.layout or assumed_layout(job.seq_len, job.cut, "the data were not looked at")


def step_of(job: Job) -> Step:
    """One micro-batch of the job."""
    return Step(
        rows=job.micro_batch,
        length=job.seq_len,
        recompute=job.recompute if job.sharded else "none",  # type: ignore[arg-type]
        loss_chunk=job.loss_chunk,
        precision=job.precision,
        gathered_half=job.sharded and job.precision == "bf16-mixed",
        preference=job.preference,
        accumulates=job.micro_batches > 1 or job.sharded,
        on_gpu=job.accelerator == "gpu",
        trained=trained_of(job),
        layout=layout_of(job).of(job.micro_batch),
    )


def make_plan(
    job: Job,
    gpus: GPUs | None = None,
    mfu: float | None = None,
    measured: tuple[str, float] | None = None,
    failures_per_week: float | None = None,
    save_seconds: float | None = None,
) -> Plan:
    """Work everything out; starts nothing and needs no GPU.

    Args:
        job: what to plan. gpus: on what.
        mfu: expected share of the peak. measured: where from, and tokens per second; wins over ``mfu``.
        failures_per_week: of the whole job; None = Llama 3's rate. save_seconds: that training waits for a checkpoint.
    """
    model = model_sizes(job.config, trained_of(job))
    moments = count_moments(job.config, step_of(job))
    memory = memory_of(job, model, moments)
    speed = _speed(job, gpus, mfu, measured)
    size = checkpoint_bytes(model.total, param_bytes(job.precision)) + checkpoint_bytes(
        model.trainable, 2 * param_bytes(job.precision)
    )
    save = save_seconds if save_seconds is not None else size / (SAVE_BYTES_PER_SECOND * job.nodes)
    rate = failures_per_week if failures_per_week is not None else job.ranks * PER_GPU_HOUR * WEEK / 3600
    failures = None
    if speed is not None and job.save_every and job.accelerator == "gpu":
        step = job.tokens_per_step / speed.tokens_per_second
        failures = failure_cost(step * job.max_steps, rate, step * job.save_every, save, RESTART_SECONDS)
    advice = [] if gpus is None or memory.device <= usable(gpus) else _advice(job, model, gpus)
    return Plan(job, model, gpus, memory, _strategies(job, model, moments), size, speed, failures, rate, save, advice)


def _speed(job: Job, gpus: GPUs | None, mfu: float | None, measured: tuple[str, float] | None) -> Speed | None:
    per_token = job.config.flops_per_token(job.seq_len)
    if measured is not None:
        origin, rate = measured
        return Speed(rate, f"measured in {origin}", None if gpus is None else rate * per_token / gpus.peak)
    if gpus is None:
        return None
    share = ASSUMED_MFU if mfu is None else mfu
    return Speed(gpus.peak * share / per_token, "assumed MFU" if mfu is None else "given MFU", share)


def _strategies(job: Job, model: Sizes, moments: Moments) -> dict[str, Memory]:
    """Every mode that this number of processes allows; the model's own activations are the same in all of them."""
    found = {}
    if job.ranks > 1:
        for mode in _MODES:
            try:
                found[mode] = memory_of(job, model, moments, mode, cpu_offload=False)
            except ValueError:
                continue  # one node has no hybrid mode; too few processes for the experts
    return found


def _advice(job: Job, model: Sizes, gpus: GPUs) -> list[tuple[str, float]]:
    """Changes of the recipe that make it fit, the cheapest in speed first; each alone, then together."""
    found: list[tuple[str, float]] = []
    shared = replace(job, sharded=True)
    smaller = [job.micro_batch // 2**i for i in range(1, 8) if job.micro_batch % 2**i == 0]
    tried: list[tuple[str, Job]] = [(f"micro_batch: {rows}", replace(job, micro_batch=rows)) for rows in smaller]
    for how in ("selective", "full"):
        if how != job.recompute:
            tried.append((f"activation_checkpointing: {how}", replace(shared, recompute=how)))
    if job.ranks > 1 and job.mode != "full_shard":
        tried.append(("mode: full_shard", replace(shared, mode="full_shard", mesh=None, reduce_every=True)))
    tight = replace(shared, mode="full_shard", mesh=None, reduce_every=True, recompute="full", micro_batch=1)
    tried.append(("mode: full_shard, activation_checkpointing: full, micro_batch: 1", tight))
    tried.append((f"{tried[-1][0]}, cpu_offload: true", replace(tight, cpu_offload=True)))
    counted: dict[Step, Moments] = {}
    kinds: set[str] = set()
    for change, other in tried:
        kind = change.partition(":")[0]
        if kind in kinds and "," not in change:
            continue  # a smaller change of the same kind is enough
        if found and "," in change:
            break
        step = step_of(other)
        if step not in counted:
            counted[step] = count_moments(job.config, step)
        need = memory_of(other, model, counted[step]).device
        if need <= usable(gpus):
            kinds.add(kind)
            found.append((change, need))
            if "," in change:
                break
    return found

"""A plan as a table for the terminal."""

from __future__ import annotations

from llmrecipes.plan.estimate import RESTART_SECONDS, Plan, layout_of
from llmrecipes.plan.hardware import GPUS
from llmrecipes.plan.memory import RESERVED, Memory
from llmrecipes.plan.pipeline import Stage
from llmrecipes.plan.units import duration, gibibytes, short_count

_WIDTH = 22


def row(name: str, *texts: str) -> str:
    """One line: a name, then what there is to say."""
    return f"  {name:{_WIDTH}}{'  '.join(texts)}".rstrip()


def show(plan: Plan, price: float | None = None) -> str:
    """The whole plan; ``price`` is of one GPU for an hour."""
    parts = [_model(plan), _memory(plan), _strategies(plan), _verdict(plan), _time(plan, price), _checkpoints(plan)]
    return "\n\n".join("\n".join(part) for part in parts if part)


def _model(plan: Plan) -> list[str]:
    job, model = plan.job, plan.model
    where = f"{job.nodes} x {job.per_node}" if job.nodes > 1 else str(job.per_node)
    on = f"{where} {plan.gpus.gpu.name}" if plan.gpus else f"{where} process{'es' if job.ranks > 1 else ''}"
    trained = "" if model.trainable == model.total else f", {model.trainable:,} trained"
    lines = [f"{job.name}: {on}, {job.precision}"]
    lines.append(row("parameters", f"{model.total:,}{trained}"))
    if job.config.moe is not None:
        lines.append(row("active per token", f"{job.config.active_params:,}"))
    tables = job.config.vocab_rows * job.config.dim * (1 if job.config.tie_embeddings else 2)
    lines.append(row("embedding and head", f"{tables:,}", f"({tables / model.total:.0%})"))
    batch = f"{job.global_batch} x {job.seq_len} = {short_count(job.tokens_per_step)} tokens"
    split = f"{job.ranks} x {job.micro_batches} micro-batches of {job.micro_batch}"
    lines.append(row("a step", batch, f"({split})"))
    lines.append(row("the run", f"{job.max_steps:,} steps = {short_count(job.tokens)} tokens"))
    work = f"{plan.flops_per_token:.4g} a token"
    lines.append(row("FLOPs", work, f"{plan.flops_per_token * job.tokens:.3g} in all"))
    return lines


def _memory(plan: Plan) -> list[str]:
    job, memory = plan.job, plan.memory
    how = f"{job.mode}, activation checkpointing {job.recompute}" if job.sharded else "one process, nothing shared"
    lines = [f"memory of one rank ({how})"]
    lines.append(row("weights", f"{gibibytes(memory.weights):>10}"))
    if memory.reference:
        lines.append(row("reference model", f"{gibibytes(memory.reference):>10}"))
    lines.append(row("gradients", f"{gibibytes(memory.gradients):>10}"))
    lines.append(row("optimizer", f"{gibibytes(memory.optimizer):>10}"))
    if job.sharded:
        lines.append(row("gathered, on the way", f"{gibibytes(memory.gathered):>10}"))
    lines.append(
        row("activations", f"{gibibytes(memory.activations):>10}", "(with the loss, and all that is temporary)")
    )
    lines.append(row("- with rows", *_rows(plan)))
    if memory.on_host:
        lines.append(row("- in the host's memory", f"{gibibytes(memory.on_host):>10}"))
    lines.append(row("together", f"{gibibytes(memory.device):>10}"))
    if job.accelerator == "cpu":
        lines.append(
            "  The process itself is larger: 0.6 GiB of libraries, and what the C library keeps of freed memory."
        )
    return lines


def _rows(plan: Plan) -> tuple[str, str]:
    layout = layout_of(plan.job)
    documents = sum(len(row.documents) for row in layout.rows) / len(layout.rows)
    said = f"assumed: {layout.assumed}" if layout.assumed else "as the recipe's data begin"
    return f"of {documents:.1f} documents, {layout.share:.0%} of the tokens with a label", f"({said})"


def _strategies(plan: Plan) -> list[str]:
    if not plan.strategies:
        return []
    lines = ["the same in every strategy, per rank"]
    lines.append(row("", *(f"{name:>10}" for name in ("states", "gathered", "activ.", "together"))))
    for mode, memory in plan.strategies.items():
        mark = " <" if mode == plan.job.mode else ""
        fits = _fit_word(plan, memory)
        texts = (_states(memory), memory.gathered, memory.activations, memory.device)
        lines.append(row(mode, *(f"{gibibytes(size):>10}" for size in texts), fits + mark))
    return lines


def _states(memory: Memory) -> float:
    return memory.weights + memory.gradients + memory.optimizer + memory.reference


def _fit_word(plan: Plan, memory: Memory) -> str:
    if plan.usable is None:
        return ""
    return "fits" if memory.device <= plan.usable else "too much"


def _verdict(plan: Plan) -> list[str]:
    if plan.gpus is None or plan.usable is None:
        if plan.job.accelerator == "cpu":
            return []
        fitting = [gpu.name for gpu in GPUS.values() if plan.memory.device <= gpu.memory * (1 - RESERVED)]
        return [f"fits on: {', '.join(fitting) or 'no GPU in the table'}", "  (--gpus NUMBERxNAME for time and cost)"]
    gpu = plan.gpus.gpu
    have = f"{gibibytes(plan.usable)} of {gibibytes(gpu.memory)} ({RESERVED:.0%} left to CUDA, NCCL and fragments)"
    if plan.fits:
        lines = [f"fits {gpu.name}: {gibibytes(plan.memory.device)} of {have}"]
    else:
        lines = [f"DOES NOT FIT {gpu.name}: {gibibytes(plan.memory.device)} against {have}"]
        lines += [f"  change  {change}  -> {gibibytes(size)}" for change, size in plan.advice]
        if not plan.advice:
            lines.append("  No change of the recipe is enough: use more or larger GPUs, or a smaller model.")
    if not gpu.bf16 and "bf16" in plan.job.precision:
        lines.append(f"  {gpu.name} does not compute in bf16: use precision 16-mixed or 32-true, or another GPU.")
    return lines


def _time(plan: Plan, price: float | None) -> list[str]:
    speed, gpus = plan.speed, plan.gpus
    if speed is None or plan.seconds is None or plan.step_seconds is None:
        return []
    share = "" if speed.mfu is None else f"{speed.mfu:.1%} MFU, "
    lines = [f"time ({share}{speed.origin})"]
    lines.append(row("tokens per second", f"{speed.tokens_per_second:,.0f}"))
    lines.append(row("a step", duration(plan.step_seconds)))
    lines.append(row("the run", duration(plan.seconds)))
    if gpus is not None:
        hours = plan.seconds / 3600 * gpus.count
        cost = "" if price is None else f"= {hours * price:,.0f} at {price:g} an hour"
        lines.append(row("GPU hours", f"{hours:,.0f}", cost))
    return lines


def _checkpoints(plan: Plan) -> list[str]:
    lines = ["checkpoints and failures", row("a checkpoint", gibibytes(plan.checkpoint), f"({plan.checkpoint:.3g} B)")]
    cost, every = plan.failures, plan.job.save_every
    if cost is None or every is None or plan.step_seconds is None or plan.seconds is None:
        return lines
    interval = every * plan.step_seconds
    lines.append(row("every", f"{every:,} steps = {duration(interval)}"))
    lines.append(row("failures", f"{plan.failures_per_week:.2g} a week, {cost.failures:.2g} in the run"))
    lost = f"{duration(cost.lost)} ({cost.lost / plan.seconds:.2%})"
    lines.append(row("lost to them", lost, f"(half an interval and {duration(RESTART_SECONDS)} of restart each)"))
    saving = f"{duration(cost.saving)} ({cost.saving / plan.seconds:.2%})"
    lines.append(row("lost to saving", saving, f"({duration(plan.save_seconds)} each; less in the background)"))
    if cost.best_interval > 0 and plan.failures_per_week:
        steps = max(1, round(cost.best_interval / plan.step_seconds))
        lines.append(row("cheapest interval", f"{steps:,} steps = {duration(cost.best_interval)}"))
    lines.append(row("end to end", duration(plan.seconds + cost.lost + cost.saving)))
    return lines


def show_stages(stages: list[Stage]) -> str:
    """Pipeline stages on paper."""
    sizes = [stage.size for stage in stages]
    mean = sum(sizes) / len(sizes)
    lines = [f"{len(stages)} pipeline stages on paper (weights in bf16; the trainer itself has none)"]
    for number, stage in enumerate(stages):
        names = ["embedding"] if stage.embedding else []
        if stage.blocks:
            names.append(f"blocks {stage.first}-{stage.first + stage.blocks - 1}")
        names += ["head"] if stage.head else []
        lines.append(
            row(f"stage {number}", f"{stage.size / 1e9:8.2f} GB", f"{stage.size / mean - 1:+.1%}", ", ".join(names))
        )
    return "\n".join(lines)

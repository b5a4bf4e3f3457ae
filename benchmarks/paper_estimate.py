"""A step of a recipe on GPUs, on paper: FLOPs, bytes, time by kind of work, MFU and what bounds it. Nothing is run.

    python -m benchmarks.paper_estimate --table docs/performance.md

The recipe's own decoder and loss run forward and backward on fake tensors, as `llmrecipes plan` does, and every
operation is given the time of a roofline: its FLOPs at an attainable share of the peak, or its bytes in and out at
an attainable share of the memory's bandwidth, or a launch, whichever is longest. Then come the optimizer's bytes, and
what of sharded training's traffic does not fit behind the computation.
"""

from __future__ import annotations

import argparse
import json
from collections import defaultdict
from collections.abc import Iterable
from dataclasses import asdict, dataclass, replace
from pathlib import Path
from typing import Any

import torch
from torch import Tensor
from torch._subclasses.fake_tensor import FakeTensorMode
from torch.utils._pytree import tree_leaves

from benchmarks.table import put_between_markers
from llmrecipes.distributed.recompute import recompute_blocks
from llmrecipes.kernels.library import without_kernels
from llmrecipes.models import Decoder
from llmrecipes.plan.activations import LiveBytes, Step, mark_blocks, run_step, shortened, to_half
from llmrecipes.plan.estimate import step_of
from llmrecipes.plan.hardware import GPU, GPUs, parse_gpus
from llmrecipes.plan.job import Job, read_job
from llmrecipes.plan.layout import assumed_layout
from llmrecipes.recipe import ModelConfig

NAME = "paper estimate"
RECIPES = Path(__file__).parents[1] / "recipes"
CASES = (
    ("dense_pretrain", "24xH100-80G"),
    ("moe_pretrain", "24xH100-80G"),
    ("rtx3090/pretrain_dense", "RTX3090"),
    ("rtx3090/pretrain_moe", "RTX3090"),
)
# Attainable shares and times: assumptions, from what public training runs and kernels report; none was measured here.
PRODUCTS, ATTENTION, BANDWIDTH, LINK = 0.70, 0.40, 0.80, 0.75
LAUNCH = 8e-6  # an operation of PyTorch without compilation, however small
NVLINK, NETWORK = 450e9, 50e9  # bytes/s and direction of one GPU: H100 SXM within a node; 400 Gb/s each between nodes
OPTIMIZER_BYTES = 40  # a parameter: AdamW reads 16 and writes 12; norm 4, clipping 8, all in fp32
_DEPTHS = (2, 4)
_aten = torch.ops.aten
# Matrix products, in place and into given results too, and where among the arguments their two operands stand.
_PRODUCTS = {
    **{_aten.mm: 0, _aten.bmm: 0, _aten._grouped_mm: 0},
    **{_aten.addmm: 1, _aten.addmm_: 1, _aten.baddbmm: 1, _aten.baddbmm_: 1},
}


@dataclass
class Work:
    """Of one kind and one micro-batch: FLOPs, bytes to and from memory, seconds, operations.

    ``compute`` is the part of the seconds that FLOPs decide, ``launch`` that of operations too small to matter.
    """

    flops: float = 0.0
    bytes: float = 0.0
    seconds: float = 0.0
    compute: float = 0.0
    launch: float = 0.0
    operations: float = 0.0

    def add(self, flops: float, size: float, gpu: GPU, share: float) -> None:
        """One operation more."""
        compute, memory = flops / (share * gpu.peak), size / (BANDWIDTH * gpu.bandwidth)
        seconds = max(compute, memory, LAUNCH)
        self.flops, self.bytes, self.operations = self.flops + flops, self.bytes + size, self.operations + 1
        self.seconds += seconds
        self.compute += seconds if seconds == compute else 0.0
        self.launch += seconds if seconds == LAUNCH else 0.0

    @property
    def bound(self) -> str:
        """What decides most of the time."""
        parts = {"products": self.compute, "launches": self.launch}
        parts["memory"] = self.seconds - self.compute - self.launch
        return max(parts, key=lambda name: parts[name])


@dataclass
class Estimate:
    """Of one recipe on some GPUs: work of a micro-batch by kind, and seconds of a step."""

    recipe: str
    gpus: str
    tokens: int
    micro_batches: int
    kinds: dict[str, Work]
    computing: float
    optimizer: float
    exposed: float
    traffic: float
    model_flops: float
    peak: float

    @property
    def seconds(self) -> float:
        """Of a step."""
        return self.computing + self.optimizer + self.exposed

    @property
    def mfu(self) -> float:
        """The model's FLOPs over what the peak would do in that time."""
        return self.model_flops / (self.peak * self.seconds)


class Roofline(LiveBytes):
    """Adds up the work of every operation that reads or writes memory; views cost nothing."""

    def __init__(self, config: ModelConfig, step: Step, gpu: GPU) -> None:
        super().__init__(config, step)
        self.kinds: dict[str, Work] = defaultdict(Work)
        self._gpu = gpu

    def __torch_dispatch__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        result = super().__torch_dispatch__(func, types, args, kwargs)
        ins = [leaf for leaf in tree_leaves((args, kwargs)) if isinstance(leaf, Tensor)]
        outs = [leaf for leaf in tree_leaves(result) if isinstance(leaf, Tensor)]
        written = func._schema.is_mutable
        same = {x.untyped_storage()._cdata for x in ins}
        if outs and (written or any(x.untyped_storage()._cdata not in same for x in outs)):
            self._tally(func, args, ins, outs)
        return result

    def _tally(self, func: Any, args: Any, ins: list[Tensor], outs: list[Tensor]) -> None:
        name, size = str(func), sum(x.numel() * x.element_size() for x in (*ins, *outs))
        if "empty" in name or "detach" in name or "alias" in name:
            return
        kind, flops, share = "norms, elementwise, copies", 0.0, PRODUCTS
        if func.overloadpacket in _PRODUCTS:
            first = _PRODUCTS[func.overloadpacket]
            kind, flops = "matrix products", product_flops(args[first], args[first + 1], outs[0])
        elif "scaled_dot_product" in name:
            kind, share, flops = "attention", ATTENTION, attention_flops(ins, "backward" in name)
        elif "embedding" in name or "index" in name:  # of a table only the rows that are looked up
            size = 2 * sum(x.numel() * x.element_size() for x in outs)
        if self.moment == "loss":
            kind = "head and loss"
        self.kinds[kind].add(flops, size, self._gpu, share)


def product_flops(a: Tensor, b: Tensor, out: Tensor) -> float:
    """Of ``mm``, ``bmm`` and grouped products: two for each number of the result and each of the summed dimension."""
    if a.ndim == 2 and b.ndim == 2 and out.ndim == 3:  # a weight's gradient, grouped: rows are summed
        return 2.0 * a.shape[0] * a.shape[1] * b.shape[1]
    return 2.0 * out.numel() * a.shape[-1]


def attention_flops(ins: list[Tensor], backward: bool) -> float:
    """Causal: half of two products, in the backward pass of five (scores are computed again)."""
    query, key = (ins[1], ins[2]) if backward else (ins[0], ins[1])
    rows, heads, length, width = query.shape
    return (2.5 if backward else 1.0) * 2.0 * rows * heads * length * key.shape[2] * width


def micro_batch_work(config: ModelConfig, step: Step, gpu: GPU) -> dict[str, Work]:
    """Of the forward and backward pass, recomputation included; two small depths are run, the rest is linear."""
    small, large = (_work(shortened(config, depth), step, gpu) for depth in _DEPTHS)
    more = (config.num_layers - _DEPTHS[1]) / (_DEPTHS[1] - _DEPTHS[0])
    found = {}
    for kind, work in large.items():
        before = asdict(small[kind])
        found[kind] = Work(**{name: value + more * (value - before[name]) for name, value in asdict(work).items()})
    return found


def _work(config: ModelConfig, step: Step, gpu: GPU) -> dict[str, Work]:
    with without_kernels(), FakeTensorMode(allow_non_fake_inputs=True):
        model = Decoder(config).train()
        if step.gathered_half or step.precision.endswith("-true"):
            to_half(model, step)
        recompute_blocks(model, step.recompute)
        tokens = torch.zeros(step.rows, step.length, dtype=torch.int64)
        work = Roofline(config, step, gpu)
        with work:
            mark_blocks(model, work)
            run_step(model, tokens, config, step, work)
    return work.kinds


def traffic_seconds(job: Job, params: int) -> tuple[float, float]:
    """Of one rank: of a micro-batch within the node, and of a step between nodes.

    Within: bf16 weights gathered forward and again backward, fp32 gradients shared out. Between (hybrid sharding): an
    all-reduce of the rank's fp32 gradients, as a ring.
    """
    if not job.sharded or job.ranks == 1:
        return 0.0, 0.0
    mesh = job.sizes()
    within = (1 - 1 / mesh.shard) * params * (2 + 2 + 4)
    rate = NVLINK if mesh.shard <= job.per_node else NETWORK
    copies = job.ranks // mesh.shard
    between = 2 * (1 - 1 / copies) * params / mesh.shard * 4
    return within / (LINK * rate), between / (LINK * NETWORK)


def estimate(recipe: str, gpus: GPUs, overrides: Iterable[str] = ()) -> Estimate:
    """One recipe of recipes/ on some GPUs."""
    job = read_job([RECIPES / f"{recipe}.yaml"], [*overrides], gpus)
    # Documents are not looked at: a GPU's kernel takes them in one call, and whole rows are the most work.
    step = replace(step_of(job), layout=assumed_layout(job.seq_len, False, "").of(job.micro_batch))
    kinds = micro_batch_work(job.config, step, gpus.gpu)
    computing = sum(work.seconds for work in kinds.values())
    params = job.config.num_params
    within, between = traffic_seconds(job, params)
    last_backward = 2 / 3 * computing
    # Gathering a block and sharing out another go on behind the blocks between; the first and the last wait.
    ends = 2 / job.config.num_layers * within
    exposed = job.micro_batches * max(ends, within - computing) + max(0.0, between - last_backward)
    shard = job.sizes().shard if job.sharded else 1
    return Estimate(
        recipe=recipe,
        gpus=f"{gpus.count} x {gpus.gpu.name}",
        tokens=job.tokens_per_step,
        micro_batches=job.micro_batches,
        kinds=kinds,
        computing=job.micro_batches * computing,
        optimizer=OPTIMIZER_BYTES * params / shard / (BANDWIDTH * gpus.gpu.bandwidth),
        exposed=exposed if job.ranks > 1 else 0.0,
        traffic=job.micro_batches * within + between,
        model_flops=float(job.config.flops_per_token(job.seq_len)) * job.tokens_per_step,
        peak=gpus.peak,
    )


def table(found: Estimate) -> str:
    """Markdown: a line of what comes out, and the kinds of work of one GPU and one step."""
    per_second = found.tokens / found.seconds
    lines = [
        f"**{found.recipe}.yaml on {found.gpus}**: {found.tokens:,} tokens and {found.model_flops:.3g} model FLOPs a "
        f"step, {found.seconds:.2f} s, {per_second:,.0f} tokens/s, MFU {found.mfu:.0%}.",
        "",
        "| work of one GPU in a step | TFLOP | GB to and from memory | s | share | bound by |",
        "|---|---|---|---|---|---|",
    ]
    for kind, work in sorted(found.kinds.items(), key=lambda item: -item[1].seconds):
        times, seconds = found.micro_batches, found.micro_batches * work.seconds
        cells = f"{times * work.flops / 1e12:,.1f} | {times * work.bytes / 1e9:,.0f} | {seconds:.3f}"
        lines.append(f"| {kind} | {cells} | {seconds / found.seconds:.1%} | {work.bound} |")
    lines.append(
        f"| optimizer, clipping | | | {found.optimizer:.3f} | {found.optimizer / found.seconds:.1%} | memory |"
    )
    if found.traffic:
        said = f"links: {found.traffic:.2f} s in all, the rest behind the computation"
        lines.append(f"| traffic that waits | | | {found.exposed:.3f} | {found.exposed / found.seconds:.1%} | {said} |")
    return "\n".join(lines)


def assumptions() -> str:
    """What the figures rest on."""
    links = (
        f"links {LINK:.0%} of {NVLINK / 1e9:.0f} GB/s within a node and {NETWORK / 1e9:.0f} GB/s a GPU between nodes"
    )
    return (
        f"Assumed: matrix products at most {PRODUCTS:.0%} of the peak, attention {ATTENTION:.0%}, memory "
        f"{BANDWIDTH:.0%} of its bandwidth, {LAUNCH * 1e6:.0f} us for the smallest operation, {links}. Peaks and "
        "bandwidths: llmrecipes/plan/hardware.py. No compilation, no waiting for data; every operation reads and "
        "writes memory once."
    )


def main() -> None:
    """Print and write."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--recipe", default=None, help="one of recipes/, such as dense_pretrain; default: a choice")
    parser.add_argument("--gpus", default="24xH100-80G", help="with --recipe")
    parser.add_argument("--results", type=Path, default=Path("runs/bench/paper_estimate.json"))
    parser.add_argument("--table", type=Path, default=None, help="Markdown file with the markers")
    asked, overrides = parser.parse_known_args()
    cases = CASES if asked.recipe is None else ((asked.recipe, asked.gpus),)
    found = [estimate(recipe, parse_gpus(gpus), overrides) for recipe, gpus in cases]
    text = "\n\n".join([assumptions(), *map(table, found)])
    print(text)
    asked.results.parent.mkdir(parents=True, exist_ok=True)
    asked.results.write_text(json.dumps([asdict(one) for one in found], indent=1) + "\n", encoding="utf-8")
    if asked.table is not None:
        put_between_markers(asked.table, text, NAME)


if __name__ == "__main__":
    main()

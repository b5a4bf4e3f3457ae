"""What experts cost beside the same work in one dense network: the layer with its router, forward and backward.

    python -m benchmarks.moe_overhead --table docs/performance.md

Our `MoE` and our `MLP` of equal active FLOPs take turns, every step with new tokens (and so with blocks of new sizes).
CPU-seconds of the process, medians of the rounds; a ratio is of two measurements of one round. Beside them the bytes
that autograd keeps for the backward pass, each storage once, without parameters and the input.
"""

from __future__ import annotations

import argparse
import json
import statistics
import time
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any

import torch
from torch import Tensor, nn

from benchmarks.table import put_between_markers
from llmrecipes.models import ModelConfig, MoEConfig
from llmrecipes.models.mlp import MLP
from llmrecipes.models.moe import MoE
from llmrecipes.run.allocator import keep_freed_memory

NAME = "moe overhead"
HEAD = (
    "| experts | type | dense, CPU-ms | experts, CPU-ms | ratio | aim | saved, dense MiB | saved, experts MiB | aim |\n"
    "|---|---|---|---|---|---|---|---|---|"
)


@dataclass(frozen=True)
class Shape:
    """Experts of width ``ffn_dim``; the dense network is ``top_k`` times as wide. Aims: ratio of the times."""

    num_experts: int
    top_k: int
    ffn_dim: int
    fp32: float
    bf16: float

    def config(self, dim: int, dense: bool) -> ModelConfig:
        """A decoder of which one layer is taken."""
        moe = MoEConfig(num_experts=self.num_experts, top_k=self.top_k, ffn_dim=self.ffn_dim)
        width = self.top_k * self.ffn_dim
        sizes: dict[str, Any] = {"vocab_size": 8, "dim": dim, "num_layers": 1, "num_heads": 8, "ffn_dim": width}
        return ModelConfig(**sizes, moe=None if dense else moe)


SHAPES = (Shape(8, 2, 704, 1.08, 1.3), Shape(64, 8, 176, 1.4, 2.0))


@dataclass(frozen=True)
class Found:
    """Of one shape and type: CPU-seconds of a step in each round, and bytes saved."""

    shape: Shape
    dtype: str
    dense: list[float]
    experts: list[float]
    dense_saved: int
    experts_saved: int

    @property
    def ratios(self) -> list[float]:
        """Experts over dense, round by round."""
        return [a / b for a, b in zip(self.experts, self.dense, strict=True)]

    @property
    def aim(self) -> float:
        """The ratio at most."""
        return self.shape.fp32 if self.dtype == "fp32" else self.shape.bf16


def output_of(layer: nn.Module, x: Tensor) -> Tensor:
    """What the layer adds to the residual stream."""
    out = layer(x)
    return out[0] if isinstance(out, tuple) else out


def step(layer: nn.Module, x: Tensor, upstream: Tensor, dtype: str) -> None:
    """Forward and backward; gradients of weights, router and input are made anew."""
    layer.zero_grad(set_to_none=True)
    x.grad = None
    with torch.autocast("cpu", torch.bfloat16, enabled=dtype == "bf16"):
        out = output_of(layer, x)
    out.backward(upstream.to(out.dtype))


def saved_bytes(layer: nn.Module, x: Tensor, dtype: str) -> int:
    """Bytes of the storages that the forward pass keeps, without those of parameters, of their copies and of the input.

    Copies in bf16 that autocast makes of parameters are not activations; they are told by the parameters' sizes.
    """
    given = {t.untyped_storage().data_ptr() for t in (x, *layer.parameters())}
    shapes = {shape for p in layer.parameters() for shape in (p.shape, p.shape[:-2] + p.shape[-2:][::-1])}
    kept: dict[int, int] = {}

    def pack(tensor: Tensor) -> Tensor:
        storage = tensor.untyped_storage()
        if storage.data_ptr() not in given and tensor.shape not in shapes:
            kept[storage.data_ptr()] = storage.nbytes()
        return tensor

    autocast = torch.autocast("cpu", torch.bfloat16, enabled=dtype == "bf16")
    with torch.autograd.graph.saved_tensors_hooks(pack, lambda tensor: tensor), autocast:
        out = output_of(layer, x)
    assert out.requires_grad
    return sum(kept.values())


def measure(shape: Shape, dtype: str, dim: int, tokens: int, rounds: int, steps: int) -> Found:
    """The two layers in turn, dense first."""
    torch.manual_seed(0)
    layers = (MLP(shape.config(dim, dense=True)), MoE(shape.config(dim, dense=False)))
    kind = torch.float32 if dtype == "fp32" else torch.bfloat16
    inputs = [torch.randn(1, tokens, dim, dtype=kind).requires_grad_() for _ in range(steps)]
    upstream = torch.randn(1, tokens, dim, dtype=kind)
    saved = [saved_bytes(layer, inputs[0], dtype) for layer in layers]
    times: tuple[list[float], list[float]] = ([], [])
    for number in range(rounds + 1):
        for layer, found in zip(layers, times, strict=True):
            start = time.process_time()
            for x in inputs:
                step(layer, x, upstream, dtype)
            if number:  # the first round makes kernels and fills the allocator
                found.append((time.process_time() - start) / steps)
    return Found(shape, dtype, *times, *saved)


def row(found: Found) -> str:
    """One line of the table."""
    dense, experts = (1000 * statistics.median(times) for times in (found.dense, found.experts))
    ratios, shape = found.ratios, found.shape
    middle = statistics.median(ratios)
    cells = [
        f"{shape.num_experts}, top {shape.top_k}, width {shape.ffn_dim}",
        found.dtype,
        f"{dense:.0f}",
        f"{experts:.0f}",
        f"{middle:.2f} ({min(ratios):.2f}-{max(ratios):.2f})",
        f"<= {found.aim:g}: {'yes' if middle <= found.aim else 'NO'}",
        f"{found.dense_saved / 2**20:.1f}",
        f"{found.experts_saved / 2**20:.1f}",
        f"<= dense: {'yes' if found.experts_saved <= found.dense_saved else 'NO'}",
    ]
    return f"| {' | '.join(cells)} |"


def main() -> None:
    """Measure, print, write."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--rounds", type=int, default=9)
    parser.add_argument("--steps", type=int, default=5, help="in each measurement")
    parser.add_argument("--tokens", type=int, default=4096)
    parser.add_argument("--dim", type=int, default=512)
    parser.add_argument("--results", type=Path, default=Path("runs/bench/moe_overhead.json"))
    parser.add_argument("--table", type=Path, default=None, help="Markdown file with the markers")
    asked = parser.parse_args()
    keep_freed_memory()  # as training does
    found, rows = [], []
    for shape in SHAPES:
        for dtype in ("fp32", "bf16"):
            found.append(measure(shape, dtype, asked.dim, asked.tokens, asked.rounds, asked.steps))
            rows.append(row(found[-1]))
            print(rows[-1], flush=True)
    asked.results.parent.mkdir(parents=True, exist_ok=True)
    asked.results.write_text(json.dumps([asdict(one) for one in found], indent=1) + "\n", encoding="utf-8")
    if asked.table is not None:
        put_between_markers(asked.table, "\n".join([HEAD, *rows]), NAME)


if __name__ == "__main__":
    main()

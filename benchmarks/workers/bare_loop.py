"""The loop that peers without a trainer of their own are timed in: as little around the model as training needs."""

from __future__ import annotations

import argparse
from collections.abc import Callable
from pathlib import Path

import numpy as np
import torch
from torch import Tensor, nn

from benchmarks.meter import Meter, matmul_rate, write_record

BETAS, WEIGHT_DECAY, LR, CLIP_NORM = (0.9, 0.95), 0.1, 3e-4, 1.0


def arguments(description: str | None) -> argparse.Namespace:
    """What every step worker is told."""
    parser = argparse.ArgumentParser(description=description)
    parser.add_argument("--inputs", type=Path, required=True, help="folder of benchmarks.inputs")
    parser.add_argument("--model", required=True, help="dense, moe or small")
    parser.add_argument("--dtype", choices=["bf16", "fp32"], required=True)
    parser.add_argument("--steps", type=int, required=True)
    parser.add_argument("--rows", type=int, default=None, help="of each batch; absent = all")
    parser.add_argument("--compile", action="store_true")
    parser.add_argument("--experts", default=None, help="how transformers runs experts; absent = its default")
    return parser.parse_args()


def load_batches(asked: argparse.Namespace) -> Tensor:
    """[N, 2, B, T] int64: tokens and labels of each step."""
    return torch.from_numpy(np.load(asked.inputs / "batches.npy"))[: asked.steps, :, : asked.rows].long()


def weights_of(inputs: Path, model: str) -> dict[str, Tensor]:
    """The tensors of transformers' folder, by their names on the hub."""
    from safetensors.torch import load_file

    found: dict[str, Tensor] = {}
    for path in sorted((inputs / f"{model}.hf").glob("*.safetensors")):
        found |= load_file(path)
    return found


def adamw(model: nn.Module) -> torch.optim.AdamW:
    """The same optimizer for all: decay on matrices only, the fused kernel."""
    matrices = [p for p in model.parameters() if p.ndim >= 2]
    others = [p for p in model.parameters() if p.ndim < 2]
    groups = [{"params": matrices, "weight_decay": WEIGHT_DECAY}, {"params": others, "weight_decay": 0.0}]
    return torch.optim.AdamW(groups, lr=LR, betas=BETAS, eps=1e-8, fused=True)


def train(model: nn.Module, loss_of: Callable[[Tensor, Tensor], Tensor], asked: argparse.Namespace) -> None:
    """Train and write the record.

    Args:
        model: fp32 weights. loss_of: mean loss of tokens and labels [B, T].
        asked: see `arguments`.
    """
    meter, optimizer = Meter(), adamw(model)
    for tokens, labels in load_batches(asked):
        with torch.autocast("cpu", torch.bfloat16, enabled=asked.dtype == "bf16"):
            loss = loss_of(tokens, labels)
        loss.backward()
        nn.utils.clip_grad_norm_(model.parameters(), CLIP_NORM)
        optimizer.step()
        optimizer.zero_grad(set_to_none=True)
        meter.mark(loss.item())
    write_record(meter.record() | {"matmul_gflop_per_cpu_s": matmul_rate(asked.dtype)})

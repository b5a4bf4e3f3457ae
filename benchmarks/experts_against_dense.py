"""Experts against their dense twin of equal active parameters, on equal tokens of real text, over several seeds.

python benchmarks/experts_against_dense.py [--seeds 1 2 3] [--steps 3000] [--jobs 2]

Runs `llmrecipes fit` nine times (finished runs are kept, interrupted ones go on) and prints the validation losses.
Needs the shards named in experts_against_dense.yaml.
"""

from __future__ import annotations

import argparse
import os
import statistics
import subprocess
import sys
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path

from llmrecipes.callbacks.metrics_file import read_metrics

OVERLAY = "benchmarks/experts_against_dense.yaml"
ROOT = Path("runs/experts_against_dense")
MOE = "--model.init_args.config.moe"
EXPERTS = ["recipes/cpu/moe_pretrain.yaml", f"{MOE}.num_experts=16", f"{MOE}.routed_scaling_factor=0.5"]
VARIANTS = {
    "dense": ["recipes/cpu/dense_pretrain.yaml"],
    "balance_bias": [*EXPERTS, f"{MOE}.balance=bias", f"{MOE}.bias_rate=0.003"],
    "balance_loss": [*EXPERTS, f"{MOE}.balance=loss", f"{MOE}.balance_coef=0.01"],
}


def folder(steps: int, variant: str, seed: int) -> Path:
    """Where a run is."""
    return ROOT / str(steps) / f"{variant}-{seed}"


def fit(steps: int, variant: str, seed: int) -> None:
    """Train one variant with one seed, on one thread."""
    recipe, *overrides = VARIANTS[variant]
    command = [sys.executable, "-m", "llmrecipes", "fit", "--config", recipe, "--config", OVERLAY, *overrides]
    run = folder(steps, variant, seed)
    command += [
        "--run_root",
        str(run.parent),
        "--name",
        run.name,
        "--seed",
        str(seed),
        "--trainer.max_steps",
        str(steps),
    ]
    environment = os.environ | {"OMP_NUM_THREADS": "1"}
    done = subprocess.run(command, capture_output=True, text=True, env=environment)
    if done.returncode:
        sys.exit(f"{variant}-{seed}: exit {done.returncode}\n{done.stdout[-2000:]}{done.stderr[-2000:]}")
    print(f"{variant}-{seed} {final_loss(run):.4f}", flush=True)


def final_loss(run: Path) -> float:
    """The last validation loss of a run, nats per token."""
    return [r["val_loss"] for r in read_metrics(run / "metrics.jsonl") if "val_loss" in r][-1]


def main() -> None:
    """Train what is not trained yet and print the table."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--seeds", type=int, nargs="+", default=[1, 2, 3])
    parser.add_argument("--steps", type=int, default=3000, help="of 2,048 bytes")
    parser.add_argument("--variants", nargs="+", choices=VARIANTS, default=list(VARIANTS), help="dense is needed")
    parser.add_argument("--jobs", type=int, default=2, help="runs at a time, one thread each")
    arguments = parser.parse_args()
    with ThreadPoolExecutor(arguments.jobs) as pool:
        jobs = [(arguments.steps, variant, seed) for seed in arguments.seeds for variant in arguments.variants]
        list(pool.map(lambda job: fit(*job), jobs))
    dense = [final_loss(folder(arguments.steps, "dense", seed)) for seed in arguments.seeds]
    for variant in arguments.variants:
        losses = [final_loss(folder(arguments.steps, variant, seed)) for seed in arguments.seeds]
        against = [f"{100 * (loss / twin - 1):+.2f} %" for loss, twin in zip(losses, dense, strict=True)]
        shown = "  ".join(f"{loss:.4f} ({share})" for loss, share in zip(losses, against, strict=True))
        mean = statistics.mean(losses)
        print(f"{variant:13} {shown}  mean {mean:.4f} ({100 * (mean / statistics.mean(dense) - 1):+.2f} %)")


if __name__ == "__main__":
    main()

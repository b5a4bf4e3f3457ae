"""Estimated against measured peak memory on a CPU: ``python -m benchmarks.planned_memory recipes/cpu/sft.yaml ...``.

Each recipe is trained for a few steps in this process while torch's allocator reports every allocation (the counterpart
of ``torch.cuda.max_memory_allocated``); `llmrecipes plan` is asked for the same recipe. The process itself is larger:
libraries, what the C library keeps of freed memory, and oneDNN's compiled kernels are no tensors.

The data that the recipes name must exist (``make demo``; recipes/cpu/sft.yaml before dpo.yaml).
"""

from __future__ import annotations

import argparse
import resource
import subprocess
import sys
import tempfile
from pathlib import Path

TOLERANCE = 0.10
STEPS = 3


def estimated(recipe: Path, overrides: list[str]) -> float:
    """Bytes that the plan names for the device."""
    from llmrecipes.plan.estimate import make_plan
    from llmrecipes.plan.job import read_job

    return make_plan(read_job([recipe], overrides)).memory.device


def measured(recipe: Path, overrides: list[str], steps: int = STEPS) -> float:
    """Bytes that torch's CPU allocator held at most while the recipe was trained for some steps."""
    from torch.profiler import ProfilerActivity, profile

    from llmrecipes.cli import main

    with tempfile.TemporaryDirectory() as folder:
        words = ["fit", "--config", str(recipe), "--run_root", folder, "--resume", "never", *overrides]
        words += ["--trainer.max_steps", str(steps), "--trainer.val_check_interval", str(steps), "--logging.every", "1"]
        words += ["--samples.every", "null", "--checkpoint.every", f"{steps} steps"]
        words += ["--model.init_args.schedule.init_args.warmup", "1 steps"]
        with profile(activities=[ProfilerActivity.CPU], profile_memory=True) as profiler:
            code = main(words)
        if code:
            raise SystemExit(f"{recipe}: training ended with exit code {code}")
    events = [e for e in profiler.profiler.kineto_results.events() if e.name() == "[memory]"]
    held = peak = 0
    for event in sorted(events, key=lambda e: e.start_ns()):
        held += event.nbytes()
        peak = max(peak, held)
    assert peak, "the profiler saw no allocation"
    return float(peak)


def main() -> int:
    """Print one row a recipe; 1 when an estimate is off by more than 10 %."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("recipes", nargs="+", type=Path)
    parser.add_argument("--steps", type=int, default=STEPS)
    parser.add_argument("--one", action="store_true", help=argparse.SUPPRESS)
    args, overrides = parser.parse_known_args()
    if args.one:
        guess = estimated(args.recipes[0], overrides)
        truth = measured(args.recipes[0], overrides, args.steps)
        process = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss * 1024
        off = guess / truth - 1
        row = f"{args.recipes[0]} | {guess / 2**20:.1f} | {truth / 2**20:.1f} | {off:+.1%} | {process / 2**20:.0f}"
        print(f"| {row} |", flush=True)
        return int(abs(off) > TOLERANCE)
    print("| recipe | estimated MiB | measured MiB | off | process MiB |\n|---|---|---|---|---|", flush=True)
    command = [sys.executable, "-m", "benchmarks.planned_memory", "--one", "--steps", str(args.steps)]
    # A process for each: what one recipe leaves behind is not the next one's.
    codes = [subprocess.run([*command, str(r), *overrides], stderr=subprocess.DEVNULL).returncode for r in args.recipes]
    return int(any(codes))


if __name__ == "__main__":
    sys.exit(main())

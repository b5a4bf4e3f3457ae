"""Where a step of ours spends its CPU time, by operator.

python -m benchmarks.profile_step dense bf16 --output profile.txt [-- --model.init_args.loss_chunk 2048]
"""

from __future__ import annotations

import argparse
import subprocess
import sys
from pathlib import Path
from typing import Any

import lightning.pytorch as L
import torch

WARMUP, PROFILED = 2, 2


class StepProfile(L.Callback):
    """Profiles some steps after the warm-up.

    Args:
        output: the table, appended to.
    """

    def __init__(self, output: str) -> None:
        self._output = Path(output)
        self._profile: Any = torch.profiler.profile(activities=[torch.profiler.ProfilerActivity.CPU])

    def on_train_batch_start(self, trainer: L.Trainer, *_: object) -> None:
        """Lightning calls it before a step."""
        if trainer.global_step == WARMUP:
            self._profile.start()

    def on_train_batch_end(self, trainer: L.Trainer, *_: object) -> None:
        """Lightning calls it after a step."""
        if trainer.global_step == WARMUP + PROFILED:
            self._profile.stop()
            table = self._profile.key_averages().table(sort_by="self_cpu_time_total", row_limit=40)
            with self._output.open("a", encoding="utf-8") as file:
                file.write(f"{PROFILED} steps\n{table}\n")


def main() -> None:
    """Run ours with the profiler in the place of the clock."""
    from benchmarks.cases import ours

    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("model", choices=["dense", "moe"])
    parser.add_argument("dtype", choices=["bf16", "fp32"])
    parser.add_argument("--output", type=Path, required=True)
    parser.add_argument("--inputs", default="runs/bench/inputs")
    parser.add_argument("--work", default="runs/bench/work")
    parser.add_argument("more", nargs="*", help="after --: further words for llmrecipes fit")
    asked = parser.parse_args()
    callbacks = (
        f'[{{"class_path": "benchmarks.profile_step.StepProfile", "init_args": {{"output": "{asked.output}"}}}}]'
    )
    steps = str(WARMUP + PROFILED)
    places = {"ours": sys.executable, "inputs": asked.inputs, "work": asked.work, "steps": steps, "run": "profile"}
    command = [part.format_map(places) for part in ours(asked.model, asked.dtype).command]
    with asked.output.open("a", encoding="utf-8") as file:
        file.write(f"{asked.model} {asked.dtype} {' '.join(asked.more)}\n")
    subprocess.run([*command, "--trainer.callbacks", callbacks, *asked.more], check=True)


if __name__ == "__main__":
    main()

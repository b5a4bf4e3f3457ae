"""Where a step of ours spends its time, by operator and by kind of work.

    python -m benchmarks.profile_step dense bf16 --table docs/performance.md [-- --model.init_args.loss_chunk 2048]

One thread, so that an operator's time is what the step waits for it; on a busy machine all are too long by about the
same factor, and shares are what to look at.
"""

from __future__ import annotations

import argparse
import json
import os
import subprocess
import sys
from collections import defaultdict
from collections.abc import Iterable
from pathlib import Path
from typing import Any

import lightning.pytorch as L
import torch

from benchmarks.table import put_between_markers

WARMUP, PROFILED = 2, 2
# An operator belongs to the first kind that one of these stands in its own name or in that of a caller.
CALLERS = {
    "head and loss": ("_LinearCrossEntropy", "_LabelLogProbs"),
    "optimizer, clipping": ("Optimizer.step", "_fused_adamw", "linalg_vector_norm", "_foreach_"),
    "attention": ("scaled_dot_product", "llmrecipes::attention", "llmrecipes_attention"),
}
# Otherwise to the first whose list has its own name, without aten:: and a last underscore.
NAMES = {
    "matrix products": {
        *("mm", "addmm", "bmm", "baddbmm", "_grouped_mm", "matmul", "linear", "mkldnn::_linear_pointwise"),
    },
    "casts, copies, gathers": {
        *("copy", "_to_copy", "clone", "fill", "zero", "cat", "index_select", "_embedding_bag_forward_only", "index"),
        *("constant_pad_nd", "gather", "scatter_add", "index_put", "_index_put_impl", "embedding_dense_backward"),
        *("sort", "topk", "bincount", "index_add", "masked_fill", "embedding"),
    },
    "norms, elementwise": {
        *("mul", "add", "sub", "div", "neg", "pow", "exp", "log", "sqrt", "rsqrt", "sigmoid", "silu", "silu_backward"),
        *("addcmul", "sum", "mean", "amax", "softmax", "_softmax", "_softmax_backward_data", "logsumexp", "gelu"),
        *("llmrecipes::swiglu", "llmrecipes::swiglu_backward", "llmrecipes::swiglu_again"),
        *("GeneratedBackwardFor_llmrecipes_swiglu_default", "GeneratedBackwardFor_llmrecipes_swiglu_defaultBackward"),
        *("rms_norm", "_fused_rms_norm", "_fused_rms_norm_backward", "native_layer_norm", "gelu_backward"),
        *("special_entr", "_Rotation", "_RotationBackward", "reciprocal", "where", "square", "sign", "abs"),
        *("native_layer_norm_backward", "clamp_min", "mul_out", "masked_fill_out"),
    },
}
KINDS = (*NAMES, *CALLERS, "other")


class StepProfile(L.Callback):
    """Profiles some steps after the warm-up.

    Args:
        output: the table, appended to; with the suffix .json the time of each kind of work.
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
            text = json.dumps(grouped(self._profile.events()), indent=1)
            self._output.with_suffix(".json").write_text(text + "\n", encoding="utf-8")


def kind_of(names: Iterable[str]) -> str:
    """Kind of work of an operator, from its own name and then those of its callers, innermost first."""
    own, *callers = names
    for kind, parts in CALLERS.items():
        if any(part in name for name in (own, *callers) for part in parts):
            return kind
    short = own.removeprefix("aten::")
    for kind, known in NAMES.items():
        if short in known or short.rstrip("_") in known:
            return kind
    return "other"


def grouped(events: Iterable[Any]) -> dict[str, dict[str, float]]:
    """Milliseconds of a step: kind of work -> operator -> its own time, without that of operators it calls."""
    found: dict[str, dict[str, float]] = {kind: defaultdict(float) for kind in KINDS}
    for event in events:
        names, caller = [event.name], event.cpu_parent
        while caller is not None:
            names.append(caller.name)
            caller = caller.cpu_parent
        found[kind_of(names)][event.name.removeprefix("aten::")] += event.self_cpu_time_total / 1000 / PROFILED
    return found


def table(found: dict[str, dict[str, float]]) -> str:
    """Markdown: each kind with its share and the operators that take most of it."""
    total = sum(sum(operators.values()) for operators in found.values())
    rows = ["| work | ms a step | share | of which |", "|---|---|---|---|"]
    for kind, operators in sorted(found.items(), key=lambda item: -sum(item[1].values())):
        most = sorted(operators.items(), key=lambda item: -item[1])[:3]
        said = ", ".join(f"{name} {time / total:.1%}" for name, time in most if time >= 0.001 * total)
        rows.append(f"| {kind} | {sum(operators.values()):,.0f} | {sum(operators.values()) / total:.1%} | {said} |")
    return "\n".join(rows)


def main() -> None:
    """Run ours with the profiler in the place of the clock."""
    from benchmarks.cases import chat, ours

    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("model", choices=["dense", "moe", "sft", "lora", "dpo"])
    parser.add_argument("dtype", choices=["bf16", "fp32"])
    parser.add_argument("--output", type=Path, default=None, help="default: runs/bench/profile_MODEL_DTYPE.txt")
    parser.add_argument("--inputs", default="runs/bench/inputs")
    parser.add_argument("--work", default="runs/bench/work")
    parser.add_argument("--table", type=Path, default=None, help="Markdown file with the markers")
    words = sys.argv[1:]
    end = words.index("--") if "--" in words else len(words)  # what follows is for llmrecipes fit
    asked, more = parser.parse_args(words[:end]), words[end + 1 :]
    output = asked.output or Path(f"runs/bench/profile_{asked.model}_{asked.dtype}.txt")
    output.parent.mkdir(parents=True, exist_ok=True)
    callbacks = f'[{{"class_path": "benchmarks.profile_step.StepProfile", "init_args": {{"output": "{output}"}}}}]'
    steps = str(WARMUP + PROFILED)
    places = {"ours": sys.executable, "inputs": asked.inputs, "work": asked.work, "steps": steps, "run": "profile"}
    program = ours(asked.model, asked.dtype) if asked.model in ("dense", "moe") else chat(asked.model)
    command = [part.format_map(places) for part in program.command]
    with output.open("a", encoding="utf-8") as file:
        file.write(f"{asked.model} {asked.dtype} {' '.join(more)}\n")
    one_thread = os.environ | {"OMP_NUM_THREADS": "1"}
    subprocess.run([*command, "--trainer.callbacks", callbacks, *more], check=True, env=one_thread)
    text = table(json.loads(output.with_suffix(".json").read_text(encoding="utf-8")))
    print(text)
    if asked.table is not None:
        put_between_markers(asked.table, text, f"profile {asked.model} {asked.dtype}")


if __name__ == "__main__":
    main()

"""How cost grows: with one and two processes, and as sequence, experts, vocabulary and layers double.

    python -m benchmarks.scaling --table docs/performance.md

Processes: `llmrecipes fit` with one thread each, gloo, the same global batch; memory of each beside what
`llmrecipes plan` says. Sizes: our model, loss and optimizer in this process, bf16 autocast; points take turns, and
CPU-seconds are medians of the rounds.
"""

from __future__ import annotations

import argparse
import json
import math
import statistics
import tempfile
import time
from collections.abc import Callable, Mapping, Sequence
from dataclasses import asdict, dataclass, replace
from pathlib import Path
from typing import Any

import torch

from benchmarks.inputs import write_tokens
from benchmarks.meter import OUTPUT_VARIABLE
from benchmarks.planned_memory import estimated, launch, measured, peak_while
from benchmarks.table import put_between_markers
from llmrecipes.losses import linear_cross_entropy
from llmrecipes.models import Decoder, ModelConfig, MoEConfig, init_weights
from llmrecipes.optim import AdamW
from llmrecipes.run.allocator import keep_freed_memory

NAME = "scaling"
RECIPES = Path(__file__).parent / "recipes"
SHARDED = Path(__file__).parents[1] / "recipes" / "cpu" / "two_processes.yaml"
WARMUP = 2


@dataclass(frozen=True)
class Sizes:
    """One point: a decoder and a step of ``rows`` x ``length`` tokens; ``experts`` 0 = a dense network."""

    rows: int = 2
    length: int = 256
    vocab: int = 4096
    layers: int = 4
    dim: int = 256
    experts: int = 0

    def config(self) -> ModelConfig:
        """The decoder: experts are half as wide, two for each token, so that active FLOPs stay."""
        moe = MoEConfig(num_experts=self.experts, top_k=2, ffn_dim=self.dim * 11 // 8) if self.experts else None
        sizes: dict[str, Any] = {"vocab_size": self.vocab, "dim": self.dim, "num_layers": self.layers}
        return ModelConfig(**sizes, num_heads=4, num_kv_heads=2, ffn_dim=self.dim * 11 // 4, moe=moe)


@dataclass(frozen=True)
class Sweep:
    """One size that doubles; everything else is that of ``base``."""

    title: str
    field: str
    values: tuple[int, ...]
    base: Sizes = Sizes()

    @property
    def points(self) -> list[Sizes]:
        """First to last."""
        return [replace(self.base, **{self.field: value}) for value in self.values]


SWEEPS = (
    Sweep("sequence length, one row", "length", (512, 1024, 2048, 4096), Sizes(rows=1)),
    Sweep("experts, two for each token", "experts", (4, 8, 16, 32), Sizes(rows=4)),
    Sweep("vocabulary", "vocab", (8192, 16384, 32768, 65536)),
    Sweep("layers", "layers", (2, 4, 8, 16)),
)


@dataclass(frozen=True)
class Grown:
    """Of one sweep: CPU-seconds of a step and peak bytes at each value."""

    title: str
    values: tuple[int, ...]
    seconds: list[float]
    memory: list[float]


def make_step(sizes: Sizes) -> Callable[[], None]:
    """A model and its optimizer; what is returned makes one step of random tokens."""
    config = sizes.config()
    model = Decoder(config)
    init_weights(model, 0)
    optimizer = AdamW(lr=1e-4).build(model.named_parameters())
    tokens = torch.randint(sizes.vocab, (sizes.rows, sizes.length), generator=torch.Generator().manual_seed(0))

    def step() -> None:
        with torch.autocast("cpu", torch.bfloat16):
            hidden = model(tokens).hidden.flatten(0, 1)
            loss, count = linear_cross_entropy(hidden, model.head_weight, tokens.flatten())
        (loss / count).backward()
        optimizer.step()
        optimizer.zero_grad(set_to_none=True)

    return step


def peak_bytes(sizes: Sizes) -> float:
    """Of tensors, weights and optimizer included, over two steps."""

    def run() -> None:
        step = make_step(sizes)
        for _ in range(2):
            step()

    return peak_while(run)


def grow(sweep: Sweep, rounds: int, steps: int) -> Grown:
    """Each point in each round; the first round is warm-up."""
    runs = [make_step(point) for point in sweep.points]
    times: list[list[float]] = [[] for _ in runs]
    for number in range(rounds + 1):
        for run, found in zip(runs, times, strict=True):
            start = time.process_time()
            for _ in range(steps):
                run()
            if number:
                found.append((time.process_time() - start) / steps)
    del runs
    memory = [peak_bytes(point) for point in sweep.points]
    return Grown(sweep.title, sweep.values, [statistics.median(found) for found in times], memory)


def exponent(values: Sequence[float], costs: Sequence[float]) -> float:
    """Slope of the least-squares line through the logarithms: cost ~ value ** exponent."""
    x, y = [math.log(value) for value in values], [math.log(cost) for cost in costs]
    return statistics.linear_regression(x, y).slope


def sizes_table(found: Sequence[Grown]) -> str:
    """Markdown: a row for each sweep, then a sentence for each."""
    rows = [
        "| doubles | values | CPU-s a step | peak MiB | exponent of CPU-s (last doubling) | of memory (last) |",
        "|---|---|---|---|---|---|",
    ]
    sentences = []
    for one in found:
        time_slope, memory_slope = exponent(one.values, one.seconds), exponent(one.values, one.memory)
        seconds = ", ".join(f"{value:.3g}" for value in one.seconds)
        memory = ", ".join(f"{value / 2**20:.0f}" for value in one.memory)
        values = ", ".join(f"{value:,}".replace(",", " ") for value in one.values)
        last_time, last_memory = (exponent(one.values[-2:], costs[-2:]) for costs in (one.seconds, one.memory))
        slopes = f"{time_slope:.2f} ({last_time:.2f}) | {memory_slope:.2f} ({last_memory:.2f})"
        rows.append(f"| {one.title} | {values} | {seconds} | {memory} | {slopes} |")
        sentences.append(
            f"- {one.title}: doubled, a step takes {2**time_slope:.2f} x the CPU time (exponent {time_slope:.2f}) and "
            f"{2**memory_slope:.2f} x the memory ({memory_slope:.2f})."
        )
    return "\n".join([*rows, "", *sentences])


@dataclass(frozen=True)
class Job:
    """`llmrecipes fit` with some processes: median tokens per second and CPU-second, bytes of each and the plan's."""

    processes: int
    per_second: float
    per_cpu: float
    memory: list[float]
    planned: float


def job_words(tokens: Path, steps: int, sizes: Sizes, ranks: int) -> tuple[list[Path], list[str]]:
    """Recipes and overrides of a small dense model with the same global batch on any number of processes."""
    configs = [RECIPES / "dense.yaml", *([SHARDED] if ranks > 1 else [])]
    config = {"vocab_size": sizes.vocab, "dim": sizes.dim, "num_layers": sizes.layers}
    config |= {"num_heads": 4, "num_kv_heads": 2, "ffn_dim": sizes.dim * 11 // 4}
    words = [word for key, value in config.items() for word in (f"--model.init_args.config.{key}", str(value))]
    words += ["--data.init_args.train", f'{{"{tokens}": 1.0}}', "--data.init_args.seq_len", str(sizes.length)]
    words += ["--data.init_args.micro_batch", str(sizes.rows), "--data.init_args.global_batch", str(2 * sizes.rows)]
    words += ["--trainer.precision", "bf16-mixed", "--trainer.max_steps", str(steps)]
    return configs, words


def run_job(tokens: Path, folder: Path, steps: int, sizes: Sizes, ranks: int) -> list[dict[str, Any]]:
    """Records of the processes of one training."""
    configs, words = job_words(tokens, WARMUP + steps, sizes, ranks)
    files = [word for path in configs for word in ("--config", str(path))]
    command = ["-m", "llmrecipes", "fit", *files, *words, "--run_root", str(folder), "--resume", "never"]
    outputs = [folder / f"record-{ranks}-{rank}.json" for rank in range(ranks)]
    launch(command, [{"OMP_NUM_THREADS": "1", OUTPUT_VARIABLE: str(path)} for path in outputs])
    return [json.loads(path.read_text(encoding="utf-8")) for path in outputs]


def rates(records: Sequence[Mapping[str, Any]], tokens: int) -> tuple[float, float]:
    """Tokens per second and per CPU-second of all processes: the slowest's wall time, the sum of CPU times."""
    units = [record["units"][WARMUP:] for record in records]
    wall = statistics.median(max(unit["wall"] for unit in step) for step in zip(*units, strict=True))
    cpu = statistics.median(sum(unit["cpu"] for unit in step) for step in zip(*units, strict=True))
    return tokens / wall, tokens / cpu


def processes(sizes: Sizes, rounds: int, steps: int) -> list[Job]:
    """With one and with two, in turn."""
    speeds: dict[int, list[tuple[float, float]]] = {1: [], 2: []}
    found = []
    with tempfile.TemporaryDirectory() as name:
        folder = Path(name)
        count = 2 * sizes.rows * (sizes.length + 1) * (WARMUP + steps + 4)
        write_tokens(folder / "tokens", count, 0, sizes.vocab)
        for _ in range(rounds):
            for ranks, found_rates in speeds.items():
                records = run_job(folder / "tokens", folder, steps, sizes, ranks)
                found_rates.append(rates(records, 2 * sizes.rows * sizes.length))
        for ranks, found_rates in speeds.items():
            configs, words = job_words(folder / "tokens", 2, sizes, ranks)
            quiet = [*words, "--trainer.callbacks", "null"]  # no clock: only memory is looked at
            medians = [statistics.median(column) for column in zip(*found_rates, strict=True)]
            peaks = measured(configs, quiet, steps=2)
            found.append(Job(ranks, medians[0], medians[1], peaks, estimated(configs, quiet)))
    return found


def processes_table(found: Sequence[Job]) -> str:
    """Markdown: a row for each number of processes, beside the first."""
    rows = [
        "| processes | tokens/s | x | tokens/CPU-s | x | MiB of each | planned MiB | off |",
        "|---|---|---|---|---|---|---|---|",
    ]
    first = found[0]
    for job in found:
        held = ", ".join(f"{value / 2**20:.1f}" for value in job.memory)
        speed = f"{job.per_second:,.0f} | {job.per_second / first.per_second:.2f}"
        cost = f"{job.per_cpu:,.0f} | {job.per_cpu / first.per_cpu:.2f}"
        off = f"{job.planned / max(job.memory) - 1:+.1%}"
        rows.append(f"| {job.processes} | {speed} | {cost} | {held} | {job.planned / 2**20:.1f} | {off} |")
    return "\n".join(rows)


def main() -> None:
    """Measure, print, write."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--rounds", type=int, default=3)
    parser.add_argument("--steps", type=int, default=3, help="in each measurement")
    parser.add_argument("--results", type=Path, default=Path("runs/bench/scaling.json"))
    parser.add_argument("--table", type=Path, default=None, help="Markdown file with the markers")
    asked = parser.parse_args()
    torch.set_num_threads(1)
    keep_freed_memory()  # as training does
    grown = []
    for sweep in SWEEPS:
        grown.append(grow(sweep, asked.rounds, asked.steps))
        print(sizes_table(grown[-1:]), flush=True)
    jobs = processes(Sizes(rows=4, length=512, vocab=8192), asked.rounds, 2 * asked.steps)
    print(processes_table(jobs), flush=True)
    text = f"{processes_table(jobs)}\n\n{sizes_table(grown)}"
    asked.results.parent.mkdir(parents=True, exist_ok=True)
    kept = {"processes": [asdict(job) for job in jobs], "sizes": [asdict(one) for one in grown]}
    asked.results.write_text(json.dumps(kept, indent=1) + "\n", encoding="utf-8")
    if asked.table is not None:
        put_between_markers(asked.table, text, NAME)


if __name__ == "__main__":
    main()

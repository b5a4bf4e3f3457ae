"""Estimated against measured peak memory on a CPU, for every recipe of recipes/cpu.

    python -m benchmarks.planned_memory --prepare FOLDER        # the demo's data, and models to begin with: minutes
    python -m benchmarks.planned_memory [RECIPE ...]            # in a folder where the demo was made

Each recipe is trained for a few steps in a process of its own, by the command in its header, while torch's allocator
reports every allocation (the counterpart of ``torch.cuda.max_memory_allocated``); `llmrecipes plan` is asked for the
same recipe. The process itself is larger: libraries, what the C library keeps of freed memory, and oneDNN's compiled
kernels are no tensors.
"""

from __future__ import annotations

import argparse
import os
import re
import resource
import shlex
import socket
import subprocess
import sys
import tempfile
from collections.abc import Callable, Mapping, Sequence
from dataclasses import replace
from pathlib import Path

REPOSITORY = Path(__file__).parents[1]
TOLERANCE = 0.10
STEPS = 3
# Corpora and questions that are not everywhere: the demo's, whose ids are fewer.
INSTEAD = {
    "real_corpus": shlex.split(
        """--data.init_args.train '{"data/demo/shards/ja_towns": 1.0}' --data.init_args.tokenizer data/demo/tokenizer"""
    ),
    "sft_jcommonsenseqa": shlex.split(
        """--data.init_args.train '{"data/demo/text/chat.jsonl": 1.0}' --data.init_args.tokenizer data/demo/tokenizer"""
    ),
    # The reference of all pairs would be computed first.
    "dpo": shlex.split("""--data.init_args.train '{"data/demo/text/preferences_few.jsonl": 1.0}'"""),
}


def command_of(recipe: Path) -> tuple[list[Path], list[str]]:
    """Files and overrides of the command in a recipe's header; without one the recipe itself."""
    found = re.search(r"(?m)^# Command +llmrecipes fit (.*)$", recipe.read_text(encoding="utf-8"))
    words = shlex.split(found[1]) if found else ["--config", str(recipe)]
    configs, overrides = list[Path](), list[str]()
    for key, value in zip(words[::2], words[1::2], strict=True):
        if key == "--config":
            configs.append(Path(value))
        else:
            overrides += [key, value]
    return configs, overrides


def estimated(recipe: Path | Sequence[Path], overrides: list[str]) -> float:
    """Bytes that the plan names for the device."""
    from llmrecipes.plan.estimate import make_plan
    from llmrecipes.plan.job import read_job
    from llmrecipes.plan.layout import read_layout

    configs = [recipe] if isinstance(recipe, Path) else recipe
    job = read_job(configs, overrides)
    return make_plan(replace(job, layout=read_layout(configs, overrides, job))).memory.device


def short(configs: Sequence[Path], steps: int) -> list[str]:
    """Overrides that end a recipe after some steps."""
    from llmrecipes.recipe import read_recipe

    words = ["--trainer.max_steps", str(steps), "--trainer.val_check_interval", "null", "--logging.every", "1"]
    words += ["--samples.every", "null", "--checkpoint.every", f"{steps} steps", "--checkpoint.keep_every", "null"]
    if "token_budget" in read_recipe(configs).data["model"]["init_args"]:
        words += ["--model.init_args.token_budget", "null"]
    return [*words, "--model.init_args.schedule.init_args.warmup", "1 steps"]


def measured(recipe: Path | Sequence[Path], overrides: list[str], steps: int = STEPS) -> list[float]:
    """Bytes that torch's CPU allocator held at most while the recipe was trained for some steps, of each process."""
    from llmrecipes.plan.job import read_job

    configs = [recipe] if isinstance(recipe, Path) else recipe
    ranks = read_job(configs, overrides).ranks
    with tempfile.TemporaryDirectory() as folder:
        words = ["fit", *(word for path in configs for word in ("--config", str(path)))]
        words += ["--run_root", folder, "--resume", "never", *overrides, *short(configs, steps)]
        return [peak_of(words)] if ranks == 1 else _peaks(words, ranks)


def _peaks(words: list[str], ranks: int) -> list[float]:
    """Of several processes, each of which watches itself."""
    said = launch(["-m", "benchmarks.planned_memory", "--rank", shlex.join(words)], [{}] * ranks)
    return [float(text.rpartition("PEAK ")[2]) for text in said]


def launch(words: list[str], environments: Sequence[Mapping[str, str]]) -> list[str]:
    """What Python says, run with these words as one process for each environment, together a job of torch.distributed.

    Raises:
        SystemExit: a process failed.
    """
    with socket.socket() as free:
        free.bind(("127.0.0.1", 0))
        port = free.getsockname()[1]
    ranks = len(environments)
    shared = {"MASTER_ADDR": "127.0.0.1", "MASTER_PORT": str(port), "NODE_RANK": "0", "WORLD_SIZE": str(ranks)}
    shared["PYTHONPATH"] = f"{REPOSITORY}:{os.environ.get('PYTHONPATH', '')}"
    running = []
    for rank, more in enumerate(environments):
        environment = os.environ | shared | {"LOCAL_RANK": str(rank), "RANK": str(rank)} | more
        running.append(subprocess.Popen([sys.executable, *words], env=environment, stdout=subprocess.PIPE, text=True))
    said = [process.communicate()[0] for process in running]
    if any(process.returncode for process in running):
        raise SystemExit(f"{shlex.join(words)}: a process of {ranks} failed\n{''.join(said)}")
    return said


def peak_of(words: list[str]) -> float:
    """Bytes that torch's CPU allocator held at most in this process while the command ran."""
    from llmrecipes.cli import main

    def run() -> None:
        code = main(words)
        if code:
            raise SystemExit(f"llmrecipes {shlex.join(words)}: ended with exit code {code}")

    return peak_while(run)


def peak_while(run: Callable[[], None]) -> float:
    """Bytes that torch's CPU allocator held at most while ``run`` ran, beyond what it held before."""
    from torch.profiler import ProfilerActivity, profile

    with profile(activities=[ProfilerActivity.CPU], profile_memory=True) as profiler:
        run()
    events = [e for e in profiler.profiler.kineto_results.events() if e.name() == "[memory]"]
    held = peak = 0
    for event in sorted(events, key=lambda e: e.start_ns()):
        held += event.nbytes()
        peak = max(peak, held)
    assert peak, "the profiler saw no allocation"
    return float(peak)


def _fit(*names: str) -> str:
    """One step of a recipe, and of what is laid over it."""
    configs = [Path("recipes/cpu", f"{name}.yaml") for name in names]
    words = [word for path in configs for word in ("--config", str(path))]
    return shlex.join(["fit", *words, *short(configs, 1), "--resume", "never"])


def prepare(folder: Path, documents: int = 6000) -> None:
    """What the recipes of recipes/cpu begin with, each model after one step: memory does not depend on its weights."""
    from llmrecipes.cli import main

    folder.mkdir(parents=True, exist_ok=True)
    os.chdir(folder)
    if not Path("recipes").exists():
        Path("recipes").symlink_to(REPOSITORY / "recipes")
    text = "data/demo/text"
    run = [f"data demo --output {text} --documents {documents} --width 4 --depth 3 --overwrite true"]  # as the Makefile
    files = " ".join(
        f"{text}/{name}.jsonl" for name in ("ja_towns", "en_towns", "ja_people", "en_people", "arithmetic")
    )
    run.append(
        f"data tokenizer --input {files} --output data/demo/tokenizer --vocab_size 2000 --sample_bytes 2_000_000 "
        "--overwrite true"
    )
    run.append(
        f"data tokenize --input {files} --tokenizer data/demo/tokenizer --output_dir data/demo/shards --overwrite true"
    )
    run += [_fit("moe_pretrain"), _fit("dense_pretrain")]
    run += [_fit("lora_expert", *more) for more in ([], ["lora_expert_people"], ["lora_expert_arithmetic"])]
    experts = " ".join(f"runs/lora_{name}_cpu" for name in ("towns", "people", "arithmetic"))
    run.append(f"merge lora runs/dense_pretrain_cpu models/demo_experts --experts {experts}")
    run += [_fit("router_train"), _fit("sft")]
    real = [*INSTEAD["real_corpus"], "--name", "dense_real"]
    run.append(f"{_fit('dense_pretrain', 'real_corpus')} {shlex.join(real)}")
    for line in run:
        if main(shlex.split(line)):
            raise SystemExit(f"llmrecipes {line}: failed")
    pairs = Path(text, "preferences.jsonl")
    few = pairs.read_text(encoding="utf-8").splitlines(keepends=True)[:200]
    pairs.with_name("preferences_few.jsonl").write_text("".join(few), encoding="utf-8")


def main() -> int:
    """Print one row a recipe; 1 when an estimate is off by more than 10 %."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("recipes", nargs="*", type=Path, help="default: all of recipes/cpu")
    parser.add_argument("--steps", type=int, default=STEPS)
    parser.add_argument("--prepare", type=Path, metavar="FOLDER", help="make what the recipes begin with, and go there")
    parser.add_argument("--one", action="store_true", help=argparse.SUPPRESS)
    parser.add_argument("--rank", help=argparse.SUPPRESS)
    args, more = parser.parse_known_args()
    if args.rank:
        print(f"PEAK {peak_of(shlex.split(args.rank)):.0f}")
        return 0
    if args.one:
        configs, overrides = command_of(args.recipes[0])
        overrides += [*INSTEAD.get(args.recipes[0].stem, []), *more]
        guess = estimated(configs, overrides)
        peaks = measured(configs, overrides, args.steps)
        truth = max(peaks)
        process = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss * 1024
        off = guess / truth - 1
        shown = ", ".join(f"{peak / 2**20:.1f}" for peak in peaks)
        size = f"{process / 2**20:.0f}" if len(peaks) == 1 else ""
        print(f"| {args.recipes[0]} | {guess / 2**20:.1f} | {shown} | {off:+.1%} | {size} |", flush=True)
        return int(abs(off) > TOLERANCE)
    if args.prepare:
        prepare(args.prepare)
    recipes = args.recipes or sorted(Path("recipes/cpu").glob("*.yaml"))
    print("| recipe | estimated MiB | measured MiB | off | process MiB |\n|---|---|---|---|---|", flush=True)
    command = [sys.executable, "-m", "benchmarks.planned_memory", "--one", "--steps", str(args.steps)]
    environment = os.environ | {"PYTHONPATH": f"{REPOSITORY}:{os.environ.get('PYTHONPATH', '')}"}
    # A process for each: what one recipe leaves behind is not the next one's.
    codes = [subprocess.run([*command, str(r), *more], env=environment).returncode for r in recipes]
    return int(any(codes))


if __name__ == "__main__":
    sys.exit(main())

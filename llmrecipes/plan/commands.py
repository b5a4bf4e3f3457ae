"""Options of ``llmrecipes plan``, ``budget`` and ``doctor``. Heavy imports happen when there is something to do."""

from __future__ import annotations

import argparse
import json
from dataclasses import replace
from pathlib import Path

from llmrecipes.errors import UserError
from llmrecipes.plan.units import count_of, positive, share_of


class _Parser(argparse.ArgumentParser):
    """An option is written out in full, and a slip ends with exit code 2 as everywhere."""

    def __init__(self, name: str, about: str, example: str) -> None:
        super().__init__(
            prog=f"llmrecipes {name}",
            description=about,
            epilog=example,
            allow_abbrev=False,
            formatter_class=argparse.RawDescriptionHelpFormatter,
        )


def plan(words: list[str]) -> int:
    """``llmrecipes plan RECIPE``: size, memory, time and cost of a training, without starting anything."""
    parser = _Parser(
        "plan",
        "What a recipe needs: parameters, memory per rank and strategy, time, checkpoints, failures; whether it fits,\n"
        "and what to change if not. Starts nothing and needs no GPU; the data need not be here.\n"
        "--any.key value overrides the recipe, as with fit.",
        "llmrecipes plan recipes/moe_pretrain.yaml --gpus 24xH100-80G\n"
        "llmrecipes plan recipes/moe_pretrain.yaml --gpus 4xRTX3090 --data.micro_batch 1\n",
    )
    add = parser.add_argument
    add("recipe", type=Path, help="the recipe")
    add("--config", type=Path, action="append", default=[], metavar="FILE", help="merged over it, as with fit")
    add("--gpus", metavar="NxNAME", help="such as 24xH100-80G; without it the recipe's own processes are planned")
    add("--mfu", type=share_of, metavar="SHARE", help="share of the peak that is the model's work (default: 0.35)")
    add("--answers", type=share_of, metavar="SHARE", help="of the tokens (default: as the data, if here; else all)")
    add("--run", type=Path, metavar="DIR", help="a run folder whose measured tokens per second are used instead")
    add("--tokens_per_second", type=positive, metavar="N", help="the same, as a number, of all GPUs")
    add("--failures_per_week", type=float, metavar="N", help="of the job (default: Llama 3's 2.0e-5 per GPU hour)")
    add("--save_seconds", type=positive, metavar="S", help="training waits for a checkpoint (default: 1 GB/s a node)")
    add("--price", type=positive, metavar="P", help="of one GPU for an hour")
    add("--stages", type=int, metavar="N", help="also balance N pipeline stages on paper")
    add("--json", action="store_true", help="everything as one JSON object: bytes, seconds, FLOPs")
    args, overrides = parser.parse_known_args(words)
    if args.failures_per_week is not None and args.failures_per_week < 0:
        raise UserError(f"--failures_per_week {args.failures_per_week} is negative")
    from llmrecipes.plan.hardware import parse_gpus
    from llmrecipes.plan.job import read_job
    from llmrecipes.plan.layout import read_layout
    from llmrecipes.plan.runs import read_run

    gpus = parse_gpus(args.gpus) if args.gpus else None
    paths = [args.recipe, *args.config]
    job = read_job(paths, overrides, gpus)
    layout = read_layout(paths, overrides, job)
    job = replace(job, layout=layout if args.answers is None else layout.labelled(args.answers))
    run = read_run(args.run) if args.run else None
    measured = (run.name, run.tokens_per_second) if run else None
    if args.tokens_per_second:
        measured = ("--tokens_per_second", args.tokens_per_second)

    from llmrecipes.plan.estimate import make_plan
    from llmrecipes.plan.pipeline import pipeline
    from llmrecipes.plan.report import show, show_stages

    found = make_plan(job, gpus, args.mfu, measured, args.failures_per_week, args.save_seconds)
    stages = pipeline(job.config, args.stages) if args.stages is not None else []
    if args.json:
        extra = {"stages": [vars(stage) for stage in stages]} if stages else {}
        print(json.dumps(found.as_dict() | extra, ensure_ascii=False))
        return 0
    print(show(found, args.price))
    if stages:
        print(f"\n{show_stages(stages)}")
    return 0


def budget(words: list[str]) -> int:
    """``llmrecipes budget``: tokens from GPUs, days and MFU, or the reverse; or a fit of own loss points."""
    parser = _Parser(
        "budget",
        "Two of --days, --mfu and --tokens give the third. Compared with the compute-optimal model (Chinchilla).\n"
        "--fit FILE fits loss = E + A / params^alpha + B / tokens^beta to own points.",
        "llmrecipes budget --gpus 20xH100-80G --params 10B --days 30 --mfu 0.4\n"
        "llmrecipes budget --gpus 20xH100-80G --params 10B --days 30 --tokens 600B\n"
        "llmrecipes budget --fit losses.jsonl --plot losses.png --params 10B --tokens 200B\n",
    )
    add = parser.add_argument
    add("--gpus", metavar="NxNAME", help="such as 20xH100-80G")
    add("--params", type=count_of, metavar="N", help="active parameters, such as 10B: 6 FLOPs each for a token")
    add("--recipe", type=Path, metavar="FILE", help="exact FLOPs per token of a recipe instead, attention included")
    add("--days", type=positive, metavar="D", help="of training")
    add("--mfu", type=share_of, metavar="SHARE", help="share of the peak, such as 0.4 or 40%%")
    add("--tokens", type=count_of, metavar="N", help="such as 200B")
    add("--fit", type=Path, metavar="FILE", help="JSON lines or CSV with params, tokens and loss in each")
    add("--plot", type=Path, metavar="PNG", help="draw the fit (with --fit)")
    add("--json", action="store_true", help="as one JSON object")
    args = parser.parse_args(words)
    from llmrecipes.plan.budget_command import run

    return run(args)


def doctor(words: list[str]) -> int:
    """``llmrecipes doctor``: what this machine lacks, and what to do about it; 1 when something blocks."""
    parser = _Parser(
        "doctor",
        "Looks at this machine: compiler, driver, CUDA and torch, flash-attn, network interfaces, disk, clock, Slurm,\n"
        "tokenizer. With a recipe only what it needs blocks. Exit code: 0 nothing blocks, 1 something does.",
        "llmrecipes doctor\nllmrecipes doctor recipes/cpu/moe_pretrain.yaml --run_root runs\n",
    )
    add = parser.add_argument
    add("recipe", type=Path, nargs="?", help="look at what this recipe needs")
    add("--run_root", type=Path, default=Path("runs"), metavar="DIR", help="where runs are written (default: runs)")
    add("--tokenizer", type=Path, metavar="DIR", help="a tokenizer to try (default: the recipe's)")
    add("--timeout", type=positive, default=60.0, metavar="S", help="seconds for each probe (default: 60)")
    add("--json", action="store_true", help="as one JSON object")
    args = parser.parse_args(words)
    from llmrecipes.plan.doctor import run

    return run(args.recipe, args.run_root, args.tokenizer, args.timeout, args.json)

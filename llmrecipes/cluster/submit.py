"""``llmrecipes submit``: the sbatch file of a recipe, written and shown, and sent when asked. Torch-free."""

from __future__ import annotations

import argparse
import shutil
import subprocess
import sys
from pathlib import Path

from llmrecipes.cluster.job import CHAIN, EXPERTS, SITE, Job, read_list, read_single
from llmrecipes.errors import UserError
from llmrecipes.recipe.slurm import Shape, corrections
from llmrecipes.recipe.time_span import TimeSpan

ABOUT = """The Slurm job of a recipe: slurm/train.sbatch filled in, written beside the run folder and shown.
A .txt list with the words of one fit a line makes an array, one run folder for each line (slurm/experts.txt).
Nodes, tasks and GPUs come from the recipe; --any.key value overrides the recipe, as with fit.
What is particular to a cluster stands in slurm/site.sh."""
EXAMPLES = """llmrecipes submit recipes/moe_pretrain.yaml
llmrecipes submit recipes/moe_pretrain.yaml --nodes 3 --chain 10 --time 20h --submit true
llmrecipes submit slurm/experts.txt --submit true
"""


def main(words: list[str]) -> int:
    """Write, show and send.

    Raises:
        UserError: mistakes of the recipe, or sizes that are not the recipe's, with the corrected lines.
    """
    args, overrides = _parser().parse_known_args(words)
    if args.recipe.suffix == ".txt":
        _refuse_words_for_lists(args.config, overrides)
        job = read_list(args.recipe, files=not args.without_files)
    else:
        job = read_single([args.recipe, *args.config], overrides, files=not args.without_files)
    _compare(args, job)
    lines = _options(args, job)
    text = job.fill(lines, ["llmrecipes", "submit", *words])
    path = args.output or job.run_root / f"{job.name}.sbatch"
    path.parent.mkdir(parents=True, exist_ok=True)
    path.write_text(text, encoding="utf-8")
    print(text)
    if args.submit == "true":
        print(f"{path} sent as job {send(path)}")
    else:
        print(f"written to {path}; --submit true sends it, or: . {SITE}; sbatch {path}")
    return 0


def _parser() -> argparse.ArgumentParser:
    parser = argparse.ArgumentParser(
        prog="llmrecipes submit",
        description=ABOUT,
        epilog=EXAMPLES,
        allow_abbrev=False,
        formatter_class=argparse.RawDescriptionHelpFormatter,
    )
    add = parser.add_argument
    add("recipe", type=Path, help="a recipe, or a list of fits (.txt)")
    add("--config", type=Path, action="append", default=[], metavar="FILE", help="merged over it, as with fit")
    add("--nodes", type=_count, metavar="N", help="compared with the recipe's trainer.num_nodes")
    add("--tasks_per_node", type=_count, metavar="N", help="compared with the recipe's trainer.devices")
    add("--gpus_per_node", type=_count, metavar="N", help="the same, where the recipe trains on GPUs")
    add("--cpus_per_task", type=_count, metavar="N", help="(default: 4)")
    add("--chain", type=_count, metavar="N", help="N jobs, each of which goes on where the last one stopped")
    add("--time", metavar="SPAN", help="limit of one job, such as 20h (default: that of the sbatch file)")
    add("--save_before", default="5m", metavar="SPAN", help="how long before it the run is told to save (default: 5m)")
    add("--output", type=Path, metavar="FILE", help="where to write it (default: RUN_ROOT/<name>.sbatch)")
    add("--submit", choices=("true", "false"), default="false", help="send it (default: false)")
    add("--without_files", action="store_true", help="do not look for shards and tokenizers (they are elsewhere)")
    return parser


def _count(text: str) -> int:
    if not text.isdecimal() or int(text) < 1:
        raise argparse.ArgumentTypeError(f"{text} is no whole number above 0")
    return int(text)


def _refuse_words_for_lists(configs: list[Path], overrides: list[str]) -> None:
    if configs or overrides:
        first = f"--config {configs[0]}" if configs else overrides[0]
        raise UserError(f"{first}: with a list, words of fit stand in its lines")


def _compare(args: argparse.Namespace, job: Job) -> None:
    """What was typed against the recipe; the recipe is right until its owner changes it."""
    shape = job.shape
    if args.gpus_per_node and not shape.gpu:
        raise UserError(
            f"{job.origin} trains on CPUs (trainer.accelerator), and --gpus_per_node {args.gpus_per_node} asks for "
            "GPUs: leave it out, or write accelerator: gpu"
        )
    tasks = args.tasks_per_node or args.gpus_per_node or shape.tasks
    asked = Shape(args.nodes or shape.nodes, tasks, shape.gpu)
    if args.gpus_per_node and args.gpus_per_node != tasks:
        raise UserError(
            f"--tasks_per_node {tasks}, but --gpus_per_node {args.gpus_per_node}: a task has one GPU; write",
            f"    --tasks_per_node {shape.tasks} --gpus_per_node {shape.tasks}",
        )
    if asked != shape:
        what = (
            f"{job.origin} trains on {shape.nodes} nodes x {shape.tasks} devices (trainer.num_nodes, trainer.devices), "
            f"but {asked.nodes} nodes x {asked.tasks} tasks were asked for"
        )
        again = job.problems_with(asked)
        more = ["  with which the recipe has to change too:", *(f"    {line}" for line in again)] if again else []
        raise UserError(what, *corrections(shape, asked), *more)


def _options(args: argparse.Namespace, job: Job) -> dict[str, object]:
    """The #SBATCH lines that are not the file's own."""
    lines: dict[str, object] = {"job-name": job.name, **job.shape.lines}
    if args.cpus_per_task:
        lines["cpus-per-task"] = args.cpus_per_task
    before = _seconds(args.save_before, "--save_before")
    lines["signal"] = f"USR1@{before}"
    if args.time:
        limit = _seconds(args.time, "--time")
        if limit < 2 * before:
            raise UserError(
                f"--time {args.time} leaves less than half for training when the run saves {args.save_before} before "
                "it: write a longer --time or a shorter --save_before"
            )
        lines["time"] = f"{limit // 3600:02d}:{limit // 60 % 60:02d}:{limit % 60:02d}"
    if args.chain:
        if job.kind == EXPERTS:
            raise UserError("--chain is for one recipe; the jobs of a list put themselves back into the queue")
        job.kind = CHAIN
        lines["array"] = f"1-{args.chain}%1"
    elif job.kind == EXPERTS:
        lines["array"] = f"0-{job.count - 1}"
    return lines


def _seconds(text: str, option: str) -> int:
    try:
        return int(TimeSpan.parse(text).seconds)
    except ValueError as error:
        raise UserError(f"{option}: {error}") from None


def send(path: Path) -> str:
    """Submit a file; returns the job's number.

    Raises:
        UserError: there is no Slurm here, or it refuses.
    """
    if shutil.which("sbatch") is None:
        raise UserError(f"{path} was written, but sbatch is not here: send it from a login node of the cluster")
    script = '. "$1" && exec sbatch --parsable "$2"'
    done = subprocess.run(["bash", "-c", script, "bash", SITE, str(path)], capture_output=True, text=True)
    sys.stderr.write("" if done.returncode else done.stderr)
    if done.returncode:
        raise UserError(f"{path} was written, but not sent: {done.stderr.strip()}")
    return done.stdout.strip().partition(";")[0]

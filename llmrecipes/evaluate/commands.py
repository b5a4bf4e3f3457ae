"""``llmrecipes evaluate``, ``report`` and ``diff``. Torch is imported when there is something to do."""

from __future__ import annotations

import argparse
import json
import os
import sys
from itertools import pairwise
from pathlib import Path
from typing import Any

from data_prep.frame.config import help_text, read_config
from llmrecipes.errors import UserError
from llmrecipes.evaluate.config import EvaluateConfig, TaskConfig
from llmrecipes.evaluate.mt_bench.config import JudgeConfig, MTBenchConfig

ABOUT = (
    "Ask a model the questions of each task; answers, scores and figures with their 95% intervals go to the output\n"
    "folder, which `llmrecipes report` shows. Repeat the command to go on after a stop."
)


def evaluate(words: list[str]) -> int:
    """``llmrecipes evaluate --config recipes/eval/demo.yaml [--model DIR]``.

    Raises:
        UserError: every mistake of the recipe, its files and the model.
    """
    if not words or {"-h", "--help"} & set(words):
        print(help_text(EvaluateConfig, "llmrecipes evaluate", ABOUT))
        each = help_text(TaskConfig, "", "").splitlines()
        print("\neach of the tasks (in the YAML):\n" + "\n".join(line for line in each if line.startswith("  --")))
        for kind, where in ((MTBenchConfig, "mt_bench of a task"), (JudgeConfig, "judge of mt_bench")):
            keys = help_text(kind, "", "").splitlines()
            print(f"\n{where}:\n" + "\n".join(line for line in keys if line.startswith("  --")))
        print("\n--judgements FILE --questions FILE prints the table of recorded judgements")
        return 0
    if "--judgements" in words:
        return judgements(words)
    config = read_config(EvaluateConfig, words)
    output = _output(config, words)
    os.environ.setdefault("GOMP_SPINCOUNT", "2000")  # before torch loads its threads; see docs/decisions.md
    try:
        if config.checkpoints == "each":
            from llmrecipes.evaluate.each_checkpoint import evaluate_each

            return evaluate_each(config, output)
        from llmrecipes.evaluate.run import evaluate as measure

        summary = measure(config, output)
    except KeyboardInterrupt:
        print(f"\nstopped; the same command goes on from what is in {output}", file=sys.stderr)
        return 130
    print(f"{summary['average']['sentence']}\nanswers and figures in {output}")
    return 0


def judgements(words: list[str]) -> int:
    """``llmrecipes evaluate --judgements FILE --questions FILE``: recorded judgements as a table; needs no model.

    Raises:
        UserError: files that cannot be read.
    """
    parser = argparse.ArgumentParser(prog="llmrecipes evaluate", allow_abbrev=False)
    parser.add_argument("--judgements", required=True, metavar="FILE", help="of FastChat: question_id, turn, judgment")
    parser.add_argument("--questions", required=True, metavar="FILE", help="of MT-Bench: question_id, category, turns")
    args = parser.parse_args(words)
    from llmrecipes.evaluate.mt_bench.questions import read_conversations
    from llmrecipes.evaluate.mt_bench.scores import judgement_table

    categories = {one.id: one.category for one in read_conversations(args.questions, None)}
    table = judgement_table(args.judgements, categories)
    for model, (score, parts) in sorted(table.items(), key=lambda row: -(row[1][0].value or 0.0)):
        cells = "  ".join(
            f"{name} {'-' if part.value is None else f'{part.value:.2f}'}" for name, part in parts.items()
        )
        print(f"{model}\n  score {score}  {cells}")
    return 0


def _output(config: EvaluateConfig, words: list[str]) -> Path:
    if config.output is not None:
        return Path(config.output)
    if config.checkpoints == "newest" and not (Path(config.model) / "checkpoints").is_dir():
        raise UserError(f"output is missing: {config.model} is no run folder to put it in; give --output FOLDER")
    files = [after for before, after in pairwise(words) if before == "--config"]
    files += [word.partition("=")[2] for word in words if word.startswith("--config=")]
    name = Path(files[-1]).stem if files else "evaluation"
    return Path(config.model) / "evaluation" / name


def report(words: list[str]) -> int:
    """``llmrecipes report RUN... --output FOLDER``.

    Raises:
        UserError: a folder that holds neither a run nor an evaluation.
    """
    parser = argparse.ArgumentParser(
        prog="llmrecipes report",
        description="One HTML file that needs no network, and the pictures in it as PNG: curves, expert load, data\n"
        "mix, lineage, evaluation tables, and every answer to browse.",
        epilog="llmrecipes report runs/moe_pretrain_cpu runs/sft_cpu --output report\n",
        allow_abbrev=False,
        formatter_class=argparse.RawDescriptionHelpFormatter,
    )
    parser.add_argument("runs", nargs="+", metavar="RUN", help="run folder, or output folder of llmrecipes evaluate")
    parser.add_argument("--output", default="report", metavar="DIR", help="folder for the report (default: report)")
    parser.add_argument("--title", metavar="TEXT", help="its heading (default: names of the runs)")
    parser.add_argument(
        "--reference", metavar="FILE.csv", help="other models beside ours on two axes; columns model and both axes"
    )
    parser.add_argument(
        "--axes",
        nargs=2,
        metavar=("X", "Y"),
        default=("llm_jp_eval", "mt_bench"),
        help="figures on the two axes: llm_jp_eval, mt_bench, TASK or TASK.FIGURE (default: llm_jp_eval mt_bench)",
    )
    args = parser.parse_args(words)
    from llmrecipes.evaluate.report.gather import read_runs
    from llmrecipes.evaluate.report.lifecycle import lifecycle
    from llmrecipes.evaluate.report.page import write_report

    folders = [Path(name) for name in args.runs]
    reference = None if args.reference is None else Path(args.reference)
    page = write_report(folders, Path(args.output), args.title, reference, args.axes)
    for table in lifecycle(read_runs(folders)):
        print(f"{table}\n")
    print(f"report {page}")
    return 0


def diff(words: list[str]) -> int:
    """``llmrecipes diff A B``: what differs between the recipes of two runs, and between the code that ran them.

    Raises:
        UserError: one of them is neither a run folder nor a recipe.
    """
    parser = argparse.ArgumentParser(
        prog="llmrecipes diff",
        description="Keys whose values differ between two recipes (A -> B), and versions of what ran them.",
        epilog="llmrecipes diff runs/dense runs/moe\n",
        allow_abbrev=False,
        formatter_class=argparse.RawDescriptionHelpFormatter,
    )
    parser.add_argument("a", metavar="A", help="run folder or recipe YAML")
    parser.add_argument("b", metavar="B", help="run folder or recipe YAML")
    parser.add_argument("--json", action="store_true", help="a JSON list of lines")
    args = parser.parse_args(words)
    from llmrecipes.evaluate.report.gather import recipe_difference

    lines: list[Any] = recipe_difference(Path(args.a), Path(args.b))
    print(json.dumps(lines, ensure_ascii=False) if args.json else "\n".join(lines) or "no difference")
    return 0

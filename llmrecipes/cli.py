"""The ``llmrecipes`` command: parses, prints, dispatches. Only the chosen branch imports anything heavy."""

from __future__ import annotations

import difflib
import errno
import importlib
import os
import re
import sys
from collections.abc import Callable
from typing import TYPE_CHECKING

from llmrecipes import __version__
from llmrecipes.errors import UserError

if TYPE_CHECKING:
    from llmrecipes.process import StopSignals

TRAINER_COMMANDS = {
    "fit": "train from a recipe; goes on by itself where it stopped",
    "validate": "validation loss of a run's newest checkpoint",
}
COMMANDS = {
    "check": ("llmrecipes.recipe.check", "main", "every mistake in recipes at once, without starting anything"),
    "plan": ("llmrecipes.plan.commands", "plan", "memory, time and cost of a recipe, and whether it fits"),
    "budget": ("llmrecipes.plan.commands", "budget", "tokens from GPUs, days and MFU; a fit of own losses"),
    "doctor": ("llmrecipes.plan.commands", "doctor", "what this machine lacks, and what to do about it"),
    "convert": ("llmrecipes.convert.commands", "main", "checkpoints in and out, each verifies itself"),
    "merge": ("llmrecipes.convert.merge_commands", "main", "experts into one mixture, adapters into weights"),
    "generate": ("llmrecipes.inference.commands", "generate", "text from a model: continue prompts, or chat"),
    "perplexity": ("llmrecipes.inference.commands", "perplexity", "how well one or two models predict texts"),
    "ensemble": ("llmrecipes.inference.commands", "ensemble", "experts of domains as one model: score, continue"),
    "evaluate": ("llmrecipes.evaluate.commands", "evaluate", "tasks, scores and answers of a model"),
    "report": ("llmrecipes.evaluate.commands", "report", "runs and their answers on one page"),
    "sweep": ("llmrecipes.evaluate.sweep.run", "sweep", "accuracy against the number of fine-tuning examples"),
    "watch": ("llmrecipes.watch.commands", "watch", "a run while it trains, with alarms"),
    "diff": ("llmrecipes.evaluate.commands", "diff", "what differs between two recipes or runs"),
    "submit": ("llmrecipes.cluster.submit", "main", "a Slurm job for a recipe: written, shown, and sent"),
    "data": ("llmrecipes.cli", "data", "corpora, tokenizers and token shards, stage by stage"),
}


def usage() -> str:
    """The help text."""
    rows = {**TRAINER_COMMANDS, **{name: entry[2] for name, entry in COMMANDS.items()}}
    width = max(map(len, rows))
    table = "\n".join(f"  {name:{width}}  {text}" for name, text in rows.items())
    return (
        "usage: llmrecipes [--help] [--version] COMMAND ...\n\n"
        f"{table}\n\n"
        "llmrecipes fit --config recipes/cpu/moe_pretrain.yaml\n"
        "llmrecipes COMMAND --help for a command's options"
    )


def main(argv: list[str] | None = None) -> int:
    """Run one command.

    Returns:
        0 done, 1 failed, 2 the user's mistake, 75 stopped on request and resumable.
    """
    words = sys.argv[1:] if argv is None else list(argv)
    if not words or words[0] in ("-h", "--help", "help"):
        print(usage())
        return 0
    if words[0] == "--version":
        print(f"llmrecipes {__version__}")
        return 0
    try:
        return _command(words[0], process_ends=argv is None)(words[1:])
    except UserError as error:
        for problem in error.problems:
            problem = _of_rank() + problem
            # A problem that begins with its place is printed as compilers do, so that editors find the line.
            place = re.match(r"\s|\S+:\d+: |command line: ", problem)
            print(problem if place else f"error: {problem}", file=sys.stderr)
        return 2
    except BrokenPipeError:
        # The reader of a pipe went away (| head): not worth a word.
        sys.stdout = open(os.devnull, "w")  # noqa: PTH123, SIM115 - stays open for the interpreter's last flush
        return 1


def _of_rank() -> str:
    """What a message of another process than the first begins with."""
    from llmrecipes.process import rank_name

    return f"[{rank_name()}] " if rank_name() else ""


def _command(name: str, process_ends: bool) -> Callable[[list[str]], int]:
    if name in TRAINER_COMMANDS:
        return lambda words: _train(name, words, process_ends)
    if name in COMMANDS:
        module, function, _ = COMMANDS[name]
        return getattr(importlib.import_module(module), function)
    guess = difflib.get_close_matches(name, [*TRAINER_COMMANDS, *COMMANDS], 1)
    hint = f" - did you mean '{guess[0]}'?" if guess else ""
    raise UserError(f"unknown command '{name}'{hint} (llmrecipes --help lists them)")


def data(words: list[str]) -> int:
    """``llmrecipes data STAGE ...``: dispatches to data_prep, which training never imports."""
    from data_prep.commands import help_text, run

    if not words or words[0] in ("-h", "--help"):
        print(
            f"usage: llmrecipes data STAGE [options]\n\n{help_text()}\n\nllmrecipes data STAGE --help for its options"
        )
        return 0
    run(words[0], words[1:])
    return 0


def _train(name: str, words: list[str], process_ends: bool) -> int:
    """Before anything else, outlive no launcher and lose no signal."""
    from llmrecipes.process import StopSignals, release_signals, start_as_child

    start_as_child()
    only_tells = bool({"-h", "--help", "--print_config"} & {word.partition("=")[0] for word in words})
    if name != "fit" or only_tells:
        release_signals()
        return _run(name, words, only_tells, None)
    with StopSignals(process_ends) as signals:
        return _run(name, words, only_tells, signals)


def _run(name: str, words: list[str], only_tells: bool, signals: StopSignals | None) -> int:
    """Check the recipe in a second, before torch and Lightning are even imported."""
    if not only_tells:
        from llmrecipes.recipe.check import check_arguments
        from llmrecipes.recipe.slurm import allocation_problems, shape_of

        problems = allocation_problems(os.environ, shape_of(check_arguments(words).data))
        if problems:
            raise UserError(*problems)
    os.environ.setdefault("GOMP_SPINCOUNT", "2000")  # must be set before torch loads its threads; see docs/decisions.md
    os.environ.setdefault("TORCH_CPP_LOG_LEVEL", "FATAL")  # pages about closed connections; the errors say the same
    from llmrecipes.run.postponed import postpone_metrics

    postpone_metrics()
    from llmrecipes.checkpoint import CheckpointError
    from llmrecipes.errors import RankFailure
    from llmrecipes.modules import TrainingStopped
    from llmrecipes.run.fit import run

    try:
        return run(name, words, signals)
    except (TrainingStopped, CheckpointError) as error:
        print(f"{_of_rank()}stopped: {error}", file=sys.stderr)
        return 1
    except RankFailure as error:
        print(f"{_of_rank()}error: {error}", file=sys.stderr)
        return 1
    except OSError as error:
        if error.errno not in (errno.ENOSPC, errno.EDQUOT):
            raise
        print(
            f"stopped: no space left on the disk ({error.filename}); free some and repeat the command", file=sys.stderr
        )
        return 1


if __name__ == "__main__":
    sys.exit(main())

"""``llmrecipes check``: every mistake of a recipe at once, without importing torch or Lightning."""

from __future__ import annotations

import sys
from collections.abc import Sequence
from pathlib import Path

from llmrecipes.errors import UserError
from llmrecipes.recipe.problem import Problem, closest, did_you_mean
from llmrecipes.recipe.recipe import Recipe, scan_recipe
from llmrecipes.recipe.rules import FILE_RULES, RULES, Facts
from llmrecipes.recipe.schema import ADVICE, REQUIRED, SECTION_CLASSES, SECTIONS, section_type
from llmrecipes.recipe.signatures import Sources
from llmrecipes.recipe.types import Arguments
from llmrecipes.recipe.values import Checker

USAGE = """usage: llmrecipes check RECIPE... [--config MORE.yaml] [--any.key value] [--without_files]

Checks each recipe and prints every mistake as file:line. Starts nothing; needs no GPU.
  --config FILE     merged over each recipe, as `fit --config RECIPE --config FILE` does
  --any.key value   overrides, as on the command line of fit
  --without_files   does not look for shards and tokenizers (they are on another machine)
  --run_folder      prints the run folder of a recipe that is right, and nothing else
Exit code: 0 no mistake, 2 mistakes."""


def check(
    recipe: Recipe | Sequence[Path] | Path,
    overrides: Sequence[str] = (),
    *,
    files: bool = True,
    sources: Sources | None = None,
) -> list[Problem]:
    """All problems of a recipe, in the order of its lines; empty when it can run.

    Args:
        recipe: a recipe that was read, or the file(s) to read and merge.
        overrides: ``--a.b.c value``, when files are given.
        files: also look whether the files it names exist and fit.
        sources: source files parsed earlier, to save time when many recipes are checked.
    """
    sources = sources or Sources()
    if not isinstance(recipe, Recipe):
        paths = [recipe] if isinstance(recipe, str | Path) else list(recipe)
        recipe = scan_recipe(paths, overrides, sources)
    checker = Checker(recipe.copy(), sources)
    unread = bool(recipe.problems) and not recipe.data
    if not unread:
        _sections(checker)
        _cross_field(checker, files)
    found = dict.fromkeys([*recipe.problems, *checker.problems])
    return sorted(found, key=_position)


def checked_recipe(paths: Sequence[Path], overrides: Sequence[str] = (), *, files: bool = True) -> Recipe:
    """Read, merge and check, for commands that are about to start.

    Raises:
        UserError: with every problem.
    """
    recipe = scan_recipe(paths, overrides)
    problems = check(recipe, files=files)
    if problems:
        raise UserError(*map(str, problems))
    return recipe


def check_arguments(words: Sequence[str]) -> Recipe:
    """Check what the words after ``fit`` describe: ``--config FILE`` once or more, and overrides.

    Raises:
        UserError: with every problem.
    """
    recipes, configs, overrides, files, _ = _arguments(words)
    if recipes is None or not configs:
        raise UserError("no recipe: write --config RECIPE.yaml")
    if recipes:
        raise UserError(f"{recipes[0]} stands alone: write --config {recipes[0]}")
    return checked_recipe(configs, overrides, files=files)


def _sections(checker: Checker) -> None:
    """Unknown and missing sections, and the values of each."""
    data = checker.recipe.data
    for key in [key for key in data if key not in SECTIONS]:
        near = None if key in ADVICE else closest(key, SECTIONS)
        hint = ADVICE.get(key) or did_you_mean(near) or f"known: {', '.join(SECTIONS)}"
        checker.report((key,), f"unknown section '{key}'", hint)
        if near is not None and near not in data:
            checker.recipe.rename((key,), near)
    for name in REQUIRED:
        if name not in data:
            checker.report((), f"the section {name} is missing")
    for name in SECTIONS:
        if name not in data or (data[name] is None and name not in REQUIRED):
            continue
        kind = section_type(name, checker.sources)
        if isinstance(kind, Arguments):
            checker.arguments(data[name], kind.signature, (name,), SECTION_CLASSES[name].rpartition(".")[2])
        else:
            checker.value(data[name], kind, (name,))


def _cross_field(checker: Checker, files: bool) -> None:
    facts = Facts(checker.recipe.data, frozenset(problem.path for problem in checker.problems))
    for rule in (*RULES, *(FILE_RULES if files else ())):
        for finding in rule(facts):
            checker.report(finding.path, finding.what, finding.hint)


def _position(problem: Problem) -> tuple[bool, str, int]:
    name, _, line = problem.where.rpartition(":")
    return (problem.where.startswith("command line"), name, int(line) if line.isdecimal() else 0)


def main(argv: Sequence[str] | None = None) -> int:
    """The command; returns 0 or 2. Problems go to stderr, one line each, then a summary."""
    recipes, more, overrides, files, folder_only = _arguments(sys.argv[1:] if argv is None else argv)
    if recipes is None:
        print(USAGE)
        return 0
    if not recipes:  # --config A --config B alone is one recipe
        recipes, more = more[:1], more[1:]
    if not recipes:
        print(f"{USAGE}\n\nllmrecipes check: name at least one recipe", file=sys.stderr)
        return 2
    if folder_only:
        print(run_folder(checked_recipe([*recipes, *more], overrides, files=files), [*recipes, *more][0]))
        return 0
    problems: list[Problem] = []
    sources = Sources()
    for recipe in recipes:
        problems += check([recipe, *more], overrides, files=files, sources=sources)
    for problem in dict.fromkeys(problems):
        print(problem, file=sys.stderr)
    count = len(dict.fromkeys(problems))
    noun = "problem" if count == 1 else "problems"
    print(f"checked {len(recipes)} recipe{'s' if len(recipes) > 1 else ''}: {count} {noun}", file=sys.stderr)
    return 2 if problems else 0


def run_folder(recipe: Recipe, first: Path) -> Path:
    """Where ``fit`` trains: ``RUN_ROOT/<name>``; without a name that of the first file."""
    return Path(str(recipe.data.get("run_root") or "runs")) / str(recipe.data.get("name") or first.stem)


def _arguments(argv: Sequence[str]) -> tuple[list[Path] | None, list[Path], list[str], bool, bool]:
    """Recipes (None: help was asked for), files merged over them, overrides, whether to look at files, --run_folder."""
    recipes: list[Path] = []
    more: list[Path] = []
    overrides: list[str] = []
    files, folder_only = True, False
    rest = list(argv)
    while rest:
        token = rest.pop(0)
        if token in ("-h", "--help"):
            return None, [], [], True, False
        if token == "--without_files":
            files = False
        elif token == "--run_folder":
            folder_only = True
        elif not token.startswith("--"):
            recipes.append(Path(token))
        elif token.partition("=")[0] == "--config":
            more.append(Path(token.partition("=")[2] or (rest.pop(0) if rest else "")))
        else:
            overrides.append(token)
            if "=" not in token and rest and not rest[0].startswith("--"):
                overrides.append(rest.pop(0))
    return recipes, more, overrides, files, folder_only

"""A job: which files of ``slurm/`` and which recipe it is made of."""

from __future__ import annotations

import re
import shlex
from collections import Counter
from collections.abc import Sequence
from dataclasses import dataclass
from itertools import pairwise
from pathlib import Path

from llmrecipes.errors import UserError
from llmrecipes.recipe.check import check, check_arguments, checked_recipe, run_folder
from llmrecipes.recipe.slurm import Shape, shape_of

FOLDER = "slurm"
SITE = f"{FOLDER}/site.sh"
TRAIN, CHAIN, EXPERTS = "train", "chain_array", "experts_array"
# What a file of slurm/ takes from its command line, and a written one has inside.
_WORDS, _LIST = 'WORDS=("$@")', "LIST=${1:-}"


@dataclass
class Job:
    """One sbatch file to be.

    Attributes:
        kind: file of ``slurm/`` it is made from. name: of the job. run_root: where its file goes.
        shape: nodes and tasks of the recipe, or of all recipes. origin: what messages call it.
        words: of ``fit``; of a list its path. count: lines of the list.
    """

    kind: str
    name: str
    run_root: Path
    shape: Shape
    origin: str
    words: list[str]
    count: int = 1

    def problems_with(self, shape: Shape) -> list[str]:
        """What ``check`` would say of the recipe in another shape."""
        if self.kind == EXPERTS:
            return []
        configs = [Path(b) for a, b in pairwise(self.words) if a == "--config"]
        sizes = ["--trainer.num_nodes", str(shape.nodes), "--trainer.devices", str(shape.tasks)]
        overrides = self.words[2 * len(configs) :]
        return [str(problem) for problem in check(configs, [*overrides, *sizes], files=False)]

    def fill(self, lines: dict[str, object], command: list[str]) -> str:
        """The file with these #SBATCH lines and the words inside.

        Args:
            lines: option -> value; those that the file has not are added.
            command: that wrote it, for the head of the file.

        Raises:
            UserError: the files of ``slurm/`` are not here.
        """
        source = Path(FOLDER, f"{self.kind}.sbatch")
        if not source.is_file():
            raise UserError(f"{source} is not here: start llmrecipes submit at the top of the repository")
        text = source.read_text(encoding="utf-8")
        for option, value in lines.items():
            line = f"#SBATCH --{option}={value}"
            text, found = re.subn(rf"(?m)^#SBATCH --{option}=.*$", line, text)
            if not found:
                text = re.sub(r"(?m)^(#SBATCH --ntasks-per-node=.*)$", rf"\1\n{line}", text, count=1)
        old = _LIST if self.kind == EXPERTS else _WORDS
        assert text.count(old) == 1, f"{source} has no line {old}"
        new = f"LIST={shlex.quote(self.words[0])}" if self.kind == EXPERTS else f"WORDS=({shlex.join(self.words)})"
        head, _, body = text.replace(old, new).partition("\n")
        # The words about how to start the file are not true of this one.
        body = re.sub(r"(?m)^#(   .*)?\n(?=#)", "", body)
        return f"{head}\n# {shlex.join(command)}\n{body}"


def read_single(paths: Sequence[Path], overrides: Sequence[str], files: bool = True) -> Job:
    """One recipe, checked.

    Raises:
        UserError: its mistakes.
    """
    recipe = checked_recipe(paths, overrides, files=files)
    folder = run_folder(recipe, Path(paths[0]))
    words = [word for path in paths for word in ("--config", str(path))] + list(overrides)
    return Job(TRAIN, folder.name, folder.parent, shape_of(recipe.data), str(paths[0]), words)


def read_list(path: Path, files: bool = True) -> Job:
    """A list of fits, each checked: one shape for all, a run folder for each.

    Raises:
        UserError: the mistakes of all lines.
    """
    if not path.is_file():
        raise UserError(f"{path} does not exist; slurm/experts.txt shows what such a list looks like")
    problems, shapes, folders = [], list[Shape](), list[Path]()
    for number, line in enumerate(path.read_text(encoding="utf-8").splitlines(), 1):
        if not line.strip() or line.lstrip().startswith("#"):
            continue
        words = line.split()  # as the job's shell takes them
        try:
            recipe = check_arguments(words if files else [*words, "--without_files"])
        except UserError as error:
            problems += [f"{path}:{number}: {problem}" for problem in error.problems]
            continue
        shapes.append(shape_of(recipe.data))
        first = next(Path(b) for a, b in pairwise(words) if a == "--config")
        folders.append(run_folder(recipe, first))
    for folder, times in Counter(folders).items():
        if times > 1:
            problems.append(f"{path}: {times} lines train in {folder}: give each its own --name")
    if len(set(shapes)) > 1:
        sizes = ", ".join(sorted({f"{shape.nodes} x {shape.tasks}" for shape in shapes}))
        problems.append(
            f"{path}: its recipes differ in nodes x devices ({sizes}), and an array has one size: two lists"
        )
    if not problems and not shapes:
        problems.append(f"{path}: no line says what to train")
    if problems:
        raise UserError(*problems)
    return Job(EXPERTS, path.stem, folders[0].parent, shapes[0], str(path), [str(path)], len(shapes))

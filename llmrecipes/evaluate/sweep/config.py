"""The recipe of a sweep. Torch-free."""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import dataclass, field
from pathlib import Path

from data_prep.frame.config import Finding


@dataclass(frozen=True, kw_only=True)
class SweepConfig:
    """One training and one evaluation for each number of examples and each seed.

    Args:
        recipe: files of the fine-tuning, as for fit --config; its data.init_args.train names the examples.
        evaluation: recipe of the evaluation; its model has no effect.
        examples: how many to train on; each set holds the smaller ones of its seed.
        figure: what is drawn: TASK, TASK.FIGURE, or "TASK / key: value" for a part of a task.
        seeds: of the choice of examples, and of the training.
        output: folder for the sets, runs, evaluations, sweep.json and sweep.png.
        overrides: further words for fit, such as --trainer.max_steps=100.
    """

    recipe: list[str]
    evaluation: str
    examples: list[int]
    figure: str
    output: str
    seeds: list[int] = field(default_factory=lambda: [1])
    overrides: list[str] = field(default_factory=list)

    def problems(self) -> Iterator[Finding]:
        """What is wrong."""
        if not self.examples or min(self.examples) < 1 or len(set(self.examples)) < len(self.examples):
            yield ("examples",), f"examples: {self.examples}: numbers of 1 or more, each once", "write [100, 200, 400]"
        if not self.seeds or len(set(self.seeds)) < len(self.seeds):
            yield ("seeds",), f"seeds: {self.seeds}: one or more, each once", "write [1, 2, 3]"
        if not self.recipe:
            yield ("recipe",), "recipe: the list is empty", "name the recipe of the fine-tuning"
        ours = ("--name", "--run_root", "--seed", "--data.init_args.train")
        for word in (word for word in self.overrides if word.partition("=")[0] in ours):
            yield ("overrides",), f"overrides: {word.partition('=')[0]} is what the sweep sets", "leave it out"

    def missing(self) -> Iterator[Finding]:
        """Files that are not there."""
        for path in (*self.recipe, self.evaluation):
            if not Path(path).is_file():
                yield ("recipe",), f"{path}: no such file", "correct the path"

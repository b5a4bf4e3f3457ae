"""What tests of several folders use: writing recipes, running the command, reading what a run recorded.

A module of its own and not conftest.py: there are several of those, and ``import conftest`` finds the one loaded last.
"""

from __future__ import annotations

import json
import subprocess
import sys
from pathlib import Path

import yaml


def write_recipe(folder: Path, recipe: dict, name: str = "recipe.yaml") -> Path:
    path = folder / name
    path.write_text(yaml.safe_dump(recipe, allow_unicode=True), encoding="utf-8")
    return path


def llmrecipes(*words: object, cwd: Path, check: int | None = 0, **options) -> subprocess.CompletedProcess[str]:
    """Run the command as a user does, in a process of its own."""
    command = [sys.executable, "-m", "llmrecipes", *map(str, words)]
    done = subprocess.run(command, cwd=cwd, capture_output=True, text=True, timeout=300, **options)
    if check is not None:
        assert done.returncode == check, f"exit {done.returncode}\n{done.stdout}\n{done.stderr}"
    return done


REPOSITORY = Path(__file__).parents[1]
MEASURED = ("tokens_per_second", "memory_gib", "mfu")


def trajectory(folder: Path) -> list[dict]:
    """The records of a run without what a clock measured: equal for equal runs, to the last bit."""
    lines = (folder / "metrics.jsonl").read_text(encoding="utf-8").splitlines()
    return [{k: v for k, v in json.loads(line).items() if k not in MEASURED} for line in lines]


def cli(*words: object) -> int:
    """Run the command in this process; a process of its own would spend seconds on imports."""
    from llmrecipes.cli import main

    return main([str(word) for word in words])


def saved_tensors(run: Path, step: int) -> dict[str, bytes]:
    """Every tensor file of a checkpoint: weights, optimizer, generators."""
    folder = run / "checkpoints" / f"step={step:06d}"
    files = {str(path.relative_to(folder)): path.read_bytes() for path in folder.rglob("*.safetensors")}
    assert {name.partition("/")[0].partition("-")[0] for name in files} == {"model", "optimizer", "rng"}, sorted(files)
    return files

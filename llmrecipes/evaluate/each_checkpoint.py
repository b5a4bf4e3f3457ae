"""Measures each whole checkpoint of a run once: beside the training, or after it."""

from __future__ import annotations

import fcntl
import time
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from dataclasses import replace
from pathlib import Path
from typing import Any

from llmrecipes.checkpoint import checkpoints, verify
from llmrecipes.errors import UserError
from llmrecipes.evaluate.config import EvaluateConfig
from llmrecipes.evaluate.run import evaluate
from llmrecipes.evaluate.store import SUMMARY, at_step, model_fingerprint, read_json


def evaluate_each(config: EvaluateConfig, output: Path, sleep: Callable[[float], object] = time.sleep) -> int:
    """Every whole checkpoint that was not measured yet, oldest first: the oldest is the first to be removed.

    Args:
        config: its ``model`` is a run folder.
        output: each checkpoint's own folder is beside it, ``OUTPUT@STEP``.
        sleep: replaced in tests.

    Returns:
        0.

    Raises:
        UserError: the model is no run folder, or the recipe has mistakes.
    """
    run = Path(config.model)
    if not config.wait and not (run / "checkpoints").is_dir() and not (run / "recipe.yaml").is_file():
        raise UserError(f"checkpoints: each: {run} is no run folder")
    told: set[str] = set()
    while True:
        done = (run / "DONE").exists()  # asked first: what was written before it is seen below
        for path in checkpoints(run / "checkpoints"):
            if reason := _measure(config, path, at_step(output, path.name)):
                if (text := f"{path.name}: {reason}") not in told:
                    print(text, flush=True)
                told.add(text)
        if done or not config.wait:
            return 0
        sleep(config.wait)


def _measure(config: EvaluateConfig, path: Path, output: Path) -> str:
    """Why a checkpoint was left alone; "" when it was measured."""
    known: dict[str, Any] | None = read_json(output / SUMMARY)
    try:
        if known is not None and (known.get("while_training") or known["model_fingerprint"] == model_fingerprint(path)):
            return "measured already"
        if reason := verify(path):
            return f"not whole: {reason}"
        with _alone(output) as mine:
            if not mine:
                return "another process measures it"
            print(f"{path.name}:", flush=True)
            evaluate(replace(config, model=str(path), overwrite=config.overwrite or known is not None), output)
    except (FileNotFoundError, UserError):
        if path.exists():
            raise
        return "removed by the run before it was measured (checkpoint.keep_last)"
    return ""


@contextmanager
def _alone(output: Path) -> Iterator[bool]:
    """Whether no other process measures into this folder; until the end of the block, however it ends."""
    output.mkdir(parents=True, exist_ok=True)
    with (output / ".lock").open("a") as file:
        try:
            fcntl.flock(file, fcntl.LOCK_EX | fcntl.LOCK_NB)
        except OSError:
            yield False
            return
        yield True

"""The run folder: who owns it, what it remembers, where to go on from."""

from __future__ import annotations

import fcntl
import json
import logging
import os
import time
from dataclasses import dataclass
from pathlib import Path
from typing import IO, Any

from llmrecipes.callbacks.metrics_file import rewind_metrics
from llmrecipes.checkpoint import checkpoints, newest_whole, read_info
from llmrecipes.errors import UserError
from llmrecipes.recipe import diff, with_later_defaults
from llmrecipes.run.lr_changes import ResumeLR, without_rate
from llmrecipes.run.rollback import finish_rollbacks

log = logging.getLogger("llmrecipes")


@dataclass
class Resume:
    """Where a run goes on from: a verified checkpoint, its step, and what it recorded."""

    path: Path
    step: int
    progress: dict[str, Any]


def lock(folder: Path, must_hold_checkpoints: bool = False) -> IO[str]:
    """Own the folder until the file is closed or the process ends, however it ends.

    Args:
        folder: made when missing.
        must_hold_checkpoints: there is something to resume from, or nothing is made.

    Raises:
        UserError: another live process trains here, or there is nothing to resume from.
    """
    if must_hold_checkpoints and not checkpoints(folder / "checkpoints"):
        raise UserError(
            f"{folder / 'checkpoints'}: nothing to resume from (resume: required); the first launch needs --resume auto"
        )
    folder.mkdir(parents=True, exist_ok=True)
    file = (folder / ".lock").open("a+")
    try:
        fcntl.flock(file, fcntl.LOCK_EX | fcntl.LOCK_NB)
    except OSError:
        file.seek(0)
        raise UserError(
            f"{folder} belongs to process {file.read().strip() or '?'}, which trains there; "
            "stop it, or give this run another name"
        ) from None
    file.truncate(0)
    file.write(str(os.getpid()))
    file.flush()
    return file


def decide_resume(folder: Path, resume: str, trajectory: dict[str, Any], resume_lr: ResumeLR = "keep") -> Resume | None:
    """Which checkpoint to go on from; says so in the log.

    Args:
        folder: ``RUN_ROOT/<recipe name>``.
        resume: ``auto``, ``never`` (an earlier run's files step aside) or ``required``.
        trajectory: what determines the run; must equal the checkpoint's.
        resume_lr: with ``override`` and ``restart`` the learning rate's settings may differ.

    Raises:
        UserError: nothing to resume though required, nothing whole to resume from, or another recipe's checkpoint.
    """
    root = folder / "checkpoints"
    if resume == "never":
        _step_aside(folder)
        log.info(f"starting fresh in {folder} (resume: never)")
        return None
    finish_rollbacks(folder)
    path, broken = newest_whole(root)
    for sentence in broken:
        log.warning(sentence)
    if path is None:
        if checkpoints(root):
            raise UserError(
                f"{root}: no checkpoint is whole; start again with --resume never (the old files are kept aside)"
            )
        log.info(f"starting fresh in {folder}: no checkpoint there")
        return None
    info = read_info(path)
    progress = info["progress"] | {"trajectory": with_later_defaults(info["progress"]["trajectory"] or {})}
    _refuse_other_recipe(path, progress["trajectory"], trajectory, resume_lr)
    rewind_metrics(folder / "metrics.jsonl", info["step"], path / "metrics.jsonl")
    log.info(f"resuming from {path}: {info['step']} steps, {info['progress']['consumed_tokens']:,} tokens done")
    return Resume(path, info["step"], progress)


def _refuse_other_recipe(path: Path, saved: dict[str, Any], present: dict[str, Any], resume_lr: ResumeLR) -> None:
    other = diff(without_rate(saved), without_rate(present))
    changes = other if resume_lr in ("override", "restart") else diff(saved, present)
    if not changes:
        return
    ask = "" if other else "; --resume_lr override takes a new learning rate from here on, restart also warms up again"
    raise UserError(
        f"{path} was trained with another recipe (checkpoint -> now):",
        *(f"  {change}" for change in changes),
        f"  restore these values to go on, give this run another name, or start again with --resume never{ask}",
    )


def _step_aside(folder: Path) -> None:
    """Rename what an earlier run left, so that nothing is lost and nothing is mixed up."""
    mine = [
        folder / name
        for name in (
            "checkpoints",
            "metrics.jsonl",
            "events.jsonl",
            "skipped.json",
            "samples",
            "evaluation",
            "loss.png",
            "routing.json",
            "routing.png",
            "DONE",
            "STOPPED",
            "wandb_id",
        )
        if (folder / name).exists()
    ]
    if mine:
        name = f"before-{time.strftime('%Y%m%d-%H%M%S')}"
        taken = sum(1 for _ in folder.glob(f"{name}*"))  # launches within one second
        aside = folder / (f"{name}-{taken + 1}" if taken else name)
        aside.mkdir()
        for path in mine:
            path.rename(aside / path.name)
        log.info(f"moved the earlier run's files to {aside}")


def mark_done(folder: Path, step: int) -> None:
    """The run is finished: a chain of jobs may end."""
    (folder / "DONE").write_text(json.dumps({"step": step}) + "\n", encoding="utf-8")


def mark_stopped(folder: Path, step: int, why: str) -> None:
    """The run was stopped on request after this step: a job may go on with it, unless a person wanted it stopped.

    Args:
        folder: of the run. step: that was done last.
        why: a signal's name, ``time_limit`` or ``file``.
    """
    (folder / "STOPPED").write_text(json.dumps({"step": step, "why": why}) + "\n", encoding="utf-8")

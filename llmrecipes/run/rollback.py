"""Going back to a good checkpoint without starting anew, so that a kill at any moment changes nothing.

First the event is told, then ``skipped.json`` decides: from then on the steps since the checkpoint are passed over, in
this process or in one that is started later. What follows only catches up with it.
"""

from __future__ import annotations

import json
import logging
from dataclasses import replace
from itertools import islice
from pathlib import Path
from typing import Any

import lightning.pytorch as L

from llmrecipes.callbacks.events import append_event
from llmrecipes.callbacks.logging import Logging
from llmrecipes.callbacks.metrics_file import read_metrics
from llmrecipes.callbacks.skipped_steps import Rollback, SkippedSteps, read_rollbacks, write_rollbacks
from llmrecipes.callbacks.stability_guard import Incident, Restored
from llmrecipes.checkpoint import checkpoints, quarantine, read_info, whole_checkpoints
from llmrecipes.checkpoint.callback import Checkpoints, Validated, on_first_rank
from llmrecipes.checkpoint.files import step_of
from llmrecipes.checkpoint.retention import point_latest

log = logging.getLogger("llmrecipes")


def roll_back(trainer: L.Trainer, module: Any, incident: Incident) -> Restored | None:
    """Put back the state of a good checkpoint; the run goes on with the step after the present one. Collective.

    Returns:
        What was done, or None when there is no whole checkpoint from before the spike.
    """
    saver, logging_callback = _callback(trainer, Checkpoints), _callback(trainer, Logging)
    saver.finish()
    folder = Path(trainer.default_root_dir)
    chosen = on_first_rank(
        lambda: _choose(folder / "checkpoints", incident, module.lr_changes), "choosing a checkpoint failed"
    )
    if chosen is None:
        return None
    path = Path(chosen)
    rollback = Rollback(read_info(path)["step"], incident.step, incident.reason)

    def record() -> Validated:
        _make_durable(folder, rollback, incident)
        _set_aside(folder, path, rollback)
        logging_callback.rewind(rollback.to, _passed_over(trainer, module, rollback, incident), path / "metrics.jsonl")
        return _validated(trainer, folder, rollback.to)

    validated = on_first_rank(record, f"rolling back to {path} failed")
    saver.go_back(trainer, module, path, validated)
    log.warning(
        f"step {incident.step}: {incident.reason}; rollback {len(incident.rollbacks) + 1}: back to {path}; the data of "
        f"steps {rollback.to + 1} to {rollback.at} is passed over"
    )
    return Restored(rollback, read_info(path)["progress"]["stability"])


def _callback(trainer: L.Trainer, kind: type) -> Any:
    callbacks: list[Any] = trainer.callbacks  # type: ignore[attr-defined]
    return next(callback for callback in callbacks if isinstance(callback, kind))


def _choose(root: Path, incident: Incident, lr_changes: list[dict[str, Any]]) -> str | None:
    """The k-th newest whole checkpoint from before the first bad step, or the oldest of fewer.

    One from before a change of the learning rate does not count: it does not know of the change.
    """
    whole = (entry for entry in whole_checkpoints(root, before=incident.first_bad) if isinstance(entry, Path))
    fit = (path for path in whole if (read_info(path)["progress"].get("lr_changes") or []) == lr_changes)
    good = list(islice(fit, incident.rollback_to))
    if good and len(good) < incident.rollback_to:
        log.warning(f"stability.rollback_to {incident.rollback_to}: {root} has only {len(good)} from before the spike")
    return str(good[-1]) if good else None


def _make_durable(folder: Path, rollback: Rollback, incident: Incident) -> None:
    event = {"step": incident.step, "event": "rollback", "reason": incident.reason, **incident.figures}
    event |= {"to": rollback.to, "passed_over": [rollback.to + 1, rollback.at]}
    append_event(folder / "events.jsonl", event | {"rollbacks": len(incident.rollbacks) + 1})
    write_rollbacks(folder / "skipped.json", [*incident.rollbacks, rollback])


def _set_aside(folder: Path, good: Path, rollback: Rollback) -> None:
    root = folder / "checkpoints"
    for path in quarantine(root, rollback.to):
        log.info(f"set aside as {path}")
    point_latest(root, good)


def _passed_over(trainer: L.Trainer, module: Any, rollback: Rollback, incident: Incident) -> list[dict[str, Any]]:
    """What a process that passes over these steps logs of them; the last one is yet to be logged by this one."""
    skipped = SkippedSteps([], [*incident.rollbacks, rollback])
    logger = _callback(trainer, Logging)
    return [
        {"step": step, "tokens": module.tokens_at(step), "skipped": skipped.reason(step)}
        for step in range(rollback.to + 1, rollback.at)
        if logger.is_due(step, trainer)
    ]


def _validated(trainer: L.Trainer, folder: Path, step: int) -> Validated:
    """What a process that goes on from ``step`` would know of validations, and write down, once it has caught up."""
    root, interval = folder / "checkpoints", trainer.val_check_batch
    known = Validated.read(root, up_to=step)
    if isinstance(interval, int) and interval > 0 and step % interval == 0 and known.step < step:
        losses = [
            r["val_loss"] for r in read_metrics(folder / "metrics.jsonl") if r["step"] == step and "val_loss" in r
        ]
        if losses:
            improved = losses[-1] < known.best_loss
            known = Validated(step, step, losses[-1]) if improved else replace(known, step=step)
    known.write(root)
    return known


def finish_rollbacks(folder: Path) -> None:
    """Set aside the checkpoints that a rollback distrusts, where a kill came before it had done so itself."""
    root = folder / "checkpoints"
    for number, rollback in enumerate(read_rollbacks(folder / "skipped.json"), start=1):
        late = [path for path in checkpoints(root) if (step_of(path) or 0) > rollback.to]
        if any(_rollbacks_known(path) < number for path in late):
            # Later steps were trained before the rollback, or without knowing of it.
            for path in quarantine(root, rollback.to):
                log.info(f"rollback {number} distrusts what came after step {rollback.to}: set aside as {path}")


def _rollbacks_known(path: Path) -> int:
    """How many rollbacks a checkpoint was written after; a broken one counts as new and is found out elsewhere."""
    try:
        return int((read_info(path)["progress"].get("stability") or {"rollbacks": 0})["rollbacks"])
    except (OSError, json.JSONDecodeError, KeyError):
        return 10**9

"""Which steps are passed over: what the recipe says, and what rollbacks decided, which ``skipped.json`` remembers."""

from __future__ import annotations

import json
import os
from collections.abc import Sequence
from dataclasses import asdict, dataclass
from pathlib import Path


@dataclass(frozen=True)
class Rollback:
    """A return to an earlier state: the steps after it, up to the present one, count as passed over.

    Args:
        to: step of the checkpoint that was restored.
        at: last step passed over.
        reason: what was wrong, in words.
    """

    to: int
    at: int
    reason: str


def read_rollbacks(path: Path) -> list[Rollback]:
    """The rollbacks of a run so far, oldest first; none when there is no file."""
    if not path.exists():
        return []
    return [Rollback(**entry) for entry in json.loads(path.read_text(encoding="utf-8"))["rollbacks"]]


def write_rollbacks(path: Path, rollbacks: Sequence[Rollback]) -> None:
    """Replace the file, whole and on the disk before this returns."""
    temporary = path.with_name(f".{path.name}")
    with temporary.open("w", encoding="utf-8") as file:
        json.dump({"rollbacks": [asdict(rollback) for rollback in rollbacks]}, file, ensure_ascii=False, indent=1)
        file.flush()
        os.fsync(file.fileno())
    temporary.replace(path)
    folder = os.open(path.parent, os.O_RDONLY)
    try:
        os.fsync(folder)
    finally:
        os.close(folder)


class SkippedSteps:
    """Answers why a step is passed over. Steps count from 1, as in ``metrics.jsonl``.

    Args:
        manual: ``[first, last]`` pairs of the recipe, both included.
        rollbacks: of this run, oldest first.
    """

    def __init__(self, manual: Sequence[Sequence[int]], rollbacks: Sequence[Rollback] = ()) -> None:
        self.manual = [(first, last) for first, last in manual]
        self.rollbacks = list(rollbacks)

    def reason(self, step: int) -> str | None:
        """``rollback 1``, ``skip_steps [5, 9]``, or None for a step that is trained."""
        for number, rollback in enumerate(self.rollbacks, start=1):
            if rollback.to < step <= rollback.at:
                return f"rollback {number}"
        return next((f"skip_steps [{a}, {b}]" for a, b in self.manual if a <= step <= b), None)

    def too_late(self, done: int, honoured: Sequence[Sequence[int]]) -> list[tuple[int, int]]:
        """Manual ranges that reach into the ``done`` steps and were not known when these were trained."""
        known = {tuple(pair) for pair in honoured}
        return [pair for pair in self.manual if pair[0] <= done and pair not in known]

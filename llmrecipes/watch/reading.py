"""What a run folder says of its run. Reads only, without torch."""

from __future__ import annotations

import json
import os
import shutil
from dataclasses import dataclass, field
from itertools import pairwise
from pathlib import Path
from statistics import median
from typing import Any

from llmrecipes.errors import UserError
from llmrecipes.recipe.yaml_file import read_yaml_file

RANKS = "ranks.json"
SIGNS = ("metrics.jsonl", "log.txt", "events.jsonl", "checkpoints")  # what a run touches when it gets on
RECENT = 20  # records that the usual time between two is taken from


@dataclass
class State:
    """A run as it was last read.

    Attributes:
        name: of the run.
        max_steps: its last step, when the recipe says so.
        steps: records of training steps, oldest first.
        validation: the newest record of a validation; {} before the first.
        events: of events.jsonl.
        ranks: what ranks.json holds; {} for one process.
        pid: of the process that owns or owned the folder.
        alive: whether that process is on this machine.
        done: whether the run is complete.
        touched: when the run last got on, in seconds since 1970.
        checkpoint: name of the newest; checkpoint_bytes: its size.
        free: bytes left where the folder is.
    """

    name: str
    max_steps: int | None = None
    steps: list[dict[str, Any]] = field(default_factory=list)
    validation: dict[str, Any] = field(default_factory=dict)
    events: list[dict[str, Any]] = field(default_factory=list)
    ranks: dict[str, Any] = field(default_factory=dict)
    pid: int | None = None
    alive: bool = False
    done: bool = False
    touched: float = 0.0
    checkpoint: str | None = None
    checkpoint_bytes: int = 0
    free: int = 0

    @property
    def step(self) -> int:
        """The newest that was logged."""
        return int(self.steps[-1]["step"]) if self.steps else 0

    @property
    def seconds_per_step(self) -> float | None:
        """By the throughput of the newest records; None before there are two."""
        recent = self.steps[-RECENT:]
        times = [
            (b["tokens"] - a["tokens"]) / b["tokens_per_second"] / (b["step"] - a["step"])
            for a, b in pairwise(recent)
            if b.get("tokens_per_second") and b["step"] > a["step"] and "tokens" in a and "tokens" in b
        ]
        return median(times) if times else None

    @property
    def seconds_per_record(self) -> float | None:
        """Usual time between two records."""
        recent, per_step = self.steps[-RECENT:], self.seconds_per_step
        gaps = [b["step"] - a["step"] for a, b in pairwise(recent)]
        return per_step * median(gaps) if per_step is not None and gaps else None


class Reader:
    """Reads a run folder again and again; of metrics.jsonl only what is new.

    Raises:
        UserError: the folder is no run's.
    """

    def __init__(self, folder: Path) -> None:
        if not (folder / "recipe.yaml").is_file() and not (folder / "metrics.jsonl").is_file():
            raise UserError(f"{folder}: no run folder (recipe.yaml, metrics.jsonl); start the run first")
        self.folder = folder
        recipe = read_yaml_file(folder / "recipe.yaml").data if (folder / "recipe.yaml").is_file() else {}
        trainer = recipe.get("trainer") if isinstance(recipe, dict) else None
        steps = trainer.get("max_steps") if isinstance(trainer, dict) else None
        self._max_steps = steps if isinstance(steps, int) and steps > 0 else None
        self._file: tuple[int, int] = (0, 0)  # inode, bytes read
        self._records: list[dict[str, Any]] = []

    def read(self) -> State:
        """The run now."""
        self._read_metrics()
        state = State(self.folder.resolve().name, self._max_steps)
        state.steps = [r for r in self._records if "loss" in r]
        state.validation = next((r for r in reversed(self._records) if "val_loss" in r), {})
        state.events = _lines(self.folder / "events.jsonl")
        state.ranks = _object(self.folder / RANKS)
        state.done = (self.folder / "DONE").exists()
        state.touched = max((_touched(self.folder / name) for name in SIGNS), default=0.0)
        state.pid = _pid(self.folder / ".lock")
        state.alive = state.pid is not None and Path(f"/proc/{state.pid}").exists()
        state.checkpoint, state.checkpoint_bytes = _newest(self.folder / "checkpoints")
        state.free = shutil.disk_usage(self.folder).free
        return state

    def _read_metrics(self) -> None:
        """Whole lines only: the last one may be in the making. A file that was cut back is read from its beginning."""
        path = self.folder / "metrics.jsonl"
        try:
            with path.open("rb") as file:
                about = os.fstat(file.fileno())
                inode, done = self._file
                if inode != about.st_ino or about.st_size < done:
                    self._records, done = [], 0
                file.seek(done)
                new = file.read()
        except FileNotFoundError:
            self._records, self._file = [], (0, 0)
            return
        whole = new[: new.rfind(b"\n") + 1]
        self._file = (about.st_ino, done + len(whole))
        self._records += [r for line in whole.splitlines() if (r := _parsed(line)) and isinstance(r.get("step"), int)]


def _parsed(line: bytes | str) -> dict[str, Any]:
    try:
        found = json.loads(line)
    except ValueError:
        return {}
    return found if isinstance(found, dict) else {}


def _lines(path: Path) -> list[dict[str, Any]]:
    try:
        return [event for line in path.read_text(encoding="utf-8").splitlines() if (event := _parsed(line))]
    except FileNotFoundError:
        return []


def _object(path: Path) -> dict[str, Any]:
    try:
        return _parsed(path.read_text(encoding="utf-8"))
    except FileNotFoundError:
        return {}


def _touched(path: Path) -> float:
    try:
        return path.stat().st_mtime
    except FileNotFoundError:
        return 0.0


def _pid(path: Path) -> int | None:
    try:
        return int(path.read_text().strip())
    except (FileNotFoundError, ValueError):
        return None


def _newest(folder: Path) -> tuple[str | None, int]:
    """The newest whole checkpoint and its size; one that is removed meanwhile is none."""
    found = sorted(path.parent for path in folder.glob("step=*/manifest.json"))
    if not found:
        return None, 0
    size = 0
    for path in found[-1].rglob("*"):
        try:
            size += path.stat().st_size if path.is_file() else 0
        except FileNotFoundError:
            continue
    return found[-1].name, size

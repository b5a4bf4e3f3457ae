"""Typed access to a recipe that may hold anything."""

from __future__ import annotations

import math
from dataclasses import dataclass
from typing import Any

from llmrecipes.recipe.duration import Duration
from llmrecipes.recipe.problem import Path

MODEL = ("model", "init_args")
DATA = ("data", "init_args")
CONFIG = (*MODEL, "config")
SCHEDULE = (*MODEL, "schedule", "init_args")


@dataclass(frozen=True)
class Finding:
    """What a rule has to say about the value at ``path``."""

    path: Path
    what: str
    hint: str = ""


@dataclass(frozen=True)
class Facts:
    """The recipe as data; every getter answers None for a value that is missing or of another type."""

    data: dict[str, Any]
    unsound: frozenset[Path] = frozenset()  # paths already reported

    def get(self, *path: str) -> Any:
        """The value at the path, whatever it is."""
        value: Any = self.data
        for key in path:
            value = value.get(key) if isinstance(value, dict) else None
        return value

    def has(self, *path: str) -> bool:
        """Whether the key is written, be it as ``null``."""
        holder = self.get(*path[:-1])
        return isinstance(holder, dict) and path[-1] in holder

    def integer(self, *path: str) -> int | None:
        """A whole number; true and false are none."""
        value = self.get(*path)
        return value if isinstance(value, int) and not isinstance(value, bool) else None

    def number(self, *path: str) -> float | None:
        """A finite number."""
        value = self.get(*path)
        if isinstance(value, bool) or not isinstance(value, int | float) or not math.isfinite(value):
            return None
        return value

    def mapping(self, *path: str) -> dict[str, Any]:
        """A mapping; empty for anything else."""
        value = self.get(*path)
        return value if isinstance(value, dict) else {}

    def steps(self, *path: str) -> int | None:
        """A duration in optimizer steps; None also for tokens when the tokens of a step are unknown."""
        value = self.get(*path)
        if not isinstance(value, str):
            return None
        try:
            duration = Duration.parse(value)
        except (ValueError, OverflowError):
            return None
        per_step = self.tokens_per_step
        return duration.value if duration.unit == "steps" else duration.to_steps(per_step) if per_step else None

    def sound(self, path: Path) -> bool:
        """Whether no problem was reported at the path or below it."""
        return not any(bad[: len(path)] == path for bad in self.unsound)

    @property
    def max_steps(self) -> int | None:
        """Optimizer steps of the run."""
        value = self.integer("trainer", "max_steps")
        return value if value is not None and value > 0 else None

    @property
    def tokens_per_step(self) -> int | None:
        """Tokens of one optimizer step over all ranks."""
        rows, length = self.integer(*DATA, "global_batch"), self.integer(*DATA, "seq_len")
        return rows * length if rows and length and rows > 0 and length > 0 else None

    @property
    def data_ranks(self) -> int:
        """Ranks that share a global batch, as far as the recipe says; at least one."""
        devices, nodes = self.get("trainer", "devices"), self.integer("trainer", "num_nodes")
        if isinstance(devices, str) and devices.isdecimal():
            devices = int(devices)
        count = len(devices) if isinstance(devices, list) else devices
        known = isinstance(count, int) and not isinstance(count, bool) and count > 0
        return (count if known else 1) * (nodes if nodes and nodes > 0 else 1)

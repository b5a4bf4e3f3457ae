"""``ranks.json``: what each rank does and how much of its time it waits for others, for ``llmrecipes watch``.

Ranks of one step wait for each other, so all are equally slow; the one that seldom waits is the one that the others
wait for. Rank 0 hears once a second, from every rank's watchdog, whether its main thread stands in a collective.
"""

from __future__ import annotations

import json
import os
import time
from collections import deque
from pathlib import Path
from typing import Any, Protocol

FILE = "ranks.json"
WINDOW = 60  # of what was heard: a minute


class Heard(Protocol):
    """What a rank says of itself: :class:`llmrecipes.distributed.judge.Beat`."""

    @property
    def place(self) -> str:
        """In words."""
        ...

    step: int
    waits: bool
    state: str


class RankStatus:
    """Keeps the file.

    Args:
        path: of the file; written whole or not at all.
        every: seconds between two writings.
    """

    def __init__(self, path: Path, every: float = 10.0) -> None:
        self.path, self.every = path, every
        self._waits: list[deque[bool]] = []
        self._written = time.monotonic()

    def __call__(self, names: list[str], beats: list[Any]) -> None:
        """Take what all ranks said this second, in their order."""
        self._waits = self._waits or [deque(maxlen=WINDOW) for _ in names]
        for heard, beat in zip(self._waits, beats, strict=True):
            heard.append(bool(beat.waits))
        if time.monotonic() - self._written >= self.every:
            self._written = time.monotonic()
            self._write(names, beats)

    def _write(self, names: list[str], beats: list[Heard]) -> None:
        ranks = [
            {
                "rank": name,
                "step": beat.step,
                "place": beat.place,
                "state": beat.state,
                "waits": round(sum(heard) / len(heard), 3),
                "heard": len(heard),
            }
            for name, beat, heard in zip(names, beats, self._waits, strict=True)
        ]
        temporary = self.path.with_name(f".{self.path.name}.{os.getpid()}")
        try:
            temporary.write_text(json.dumps({"time": time.time(), "ranks": ranks}), encoding="utf-8")
            temporary.replace(self.path)
        except OSError:
            return  # a full disk ends no job here; the training itself says what is wrong

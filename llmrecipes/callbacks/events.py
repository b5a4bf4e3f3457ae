"""``events.jsonl``: one object for everything out of the ordinary that happened to a run."""

from __future__ import annotations

import json
import math
import os
from pathlib import Path
from typing import Any


def append_event(path: Path, event: dict[str, Any]) -> None:
    """Add an event unless the file has it: a resumed run that lives through it again does not tell it twice.

    Args:
        path: ``events.jsonl`` of the run.
        event: plain values; numbers that are not finite are written as text, which JSON has no numbers for.
    """
    line = json.dumps({name: _writable(value) for name, value in event.items()}, ensure_ascii=False)
    known = path.read_text(encoding="utf-8") if path.exists() else ""
    if line in known.splitlines():
        return
    torn = bool(known) and not known.endswith("\n")  # by a kill: the line is no event
    with path.open("a", encoding="utf-8") as file:
        file.write(("\n" if torn else "") + line + "\n")
        file.flush()
        os.fsync(file.fileno())


def read_events(path: Path) -> list[dict[str, Any]]:
    """The events of a run in the order they happened first; torn lines are passed over."""
    events = []
    for line in path.read_text(encoding="utf-8").splitlines() if path.exists() else []:
        try:
            events.append(json.loads(line))
        except ValueError:
            continue
    return events


def _writable(value: Any) -> Any:
    return str(value) if isinstance(value, float) and not math.isfinite(value) else value

"""``metrics.jsonl``: one object per logged step, appended as it happens, rewound when a run is resumed."""

from __future__ import annotations

import json
import math
from collections.abc import Iterator, Sequence
from pathlib import Path
from typing import Any


def read_metrics(path: Path) -> Iterator[dict[str, Any]]:
    """The records of a metrics file; a last line cut short by a kill is passed over."""
    if not path.exists():
        return
    with path.open(encoding="utf-8") as file:
        for line in file:
            try:
                yield json.loads(line)
            except ValueError:
                return


def rewind_metrics(path: Path, step: int, saved: Path | None, then: Sequence[dict[str, Any]] = ()) -> None:
    """Keep the records up to ``step``, so that a resumed run leaves one monotone file.

    Args:
        path: the run's file; taken from ``saved`` when it lacks what that one has.
        step: the step the run goes on from.
        saved: the copy in the checkpoint.
        then: records to add in the same breath.
    """
    present = [record for record in read_metrics(path) if record["step"] <= step]
    copy = [record for record in read_metrics(saved) if record["step"] <= step] if saved else []
    records = present if len(present) >= len(copy) else copy
    temporary = path.with_name(f".{path.name}")
    temporary.write_text("".join(as_line(record) for record in [*records, *then]), encoding="utf-8")
    temporary.replace(path)


def as_line(record: dict[str, Any]) -> str:
    """One line of JSON. A figure that is not finite is ``null``: JSON has no such numbers."""
    finite = {k: None if isinstance(v, float) and not math.isfinite(v) else v for k, v in record.items()}
    return json.dumps(finite, ensure_ascii=False) + "\n"


class MetricsFile:
    """Appends records; each line is flushed, so that a killed process loses none that the console showed."""

    def __init__(self, path: Path) -> None:
        path.parent.mkdir(parents=True, exist_ok=True)
        self.path = path
        self._file = path.open("a", encoding="utf-8")

    def append(self, record: dict[str, Any]) -> None:
        self._file.write(as_line(record))
        self._file.flush()

    def close(self) -> None:
        self._file.close()

"""What the fault suite did, counted: one JSON line per case, and the table of docs/reliability.md made of them.

LLMRECIPES_FAULTS_REPORT=faults.jsonl python -m pytest --all tests/faults
python tests/faults/report.py faults.jsonl
"""

from __future__ import annotations

import json
import os
import sys
from dataclasses import asdict, dataclass
from pathlib import Path

VARIABLE = "LLMRECIPES_FAULTS_REPORT"


@dataclass
class Case:
    """One row.

    Attributes:
        number: of the issue's list. fault: in words. processes: of the job.
        injected: faults. lost: optimizer steps that had to be computed again because of all of them.
        worst: the most that a single fault cost. left_out: steps without an update, as asked for by `stability`.
        data_lost: samples that were repeated or left out otherwise.
        seconds: longest time from a fault to the end of the job, where the job has to notice it.
    """

    number: int
    fault: str
    processes: int
    injected: int = 0
    lost: int = 0
    worst: int = 0
    left_out: int = 0
    data_lost: int = 0
    seconds: float | None = None

    def add(self, lost: int = 0, seconds: float | None = None, left_out: int = 0) -> None:
        """One more fault, and what it cost."""
        self.injected += 1
        self.lost += lost
        self.left_out += left_out
        self.worst = max(self.worst, lost)
        if seconds is not None:
            self.seconds = max(self.seconds or 0.0, seconds)

    def write(self) -> None:
        """Append to the report, if one is asked for; called when everything about the case was found right."""
        if path := os.environ.get(VARIABLE):
            with Path(path).open("a") as file:
                file.write(json.dumps(asdict(self)) + "\n")


COLUMNS = ("injected", "lost", "worst", "left_out", "data_lost")


def merged(cases: list[Case]) -> list[Case]:
    """One case for each fault and number of processes, in the order of the issue's list."""
    found: dict[tuple, list[Case]] = {}
    for case in sorted(cases, key=lambda case: (case.number, case.processes)):
        found.setdefault((case.number, case.fault, case.processes), []).append(case)
    return [_sum(alike, *key) for key, alike in found.items()]


def _sum(cases: list[Case], number: int = 0, fault: str = "**all**", processes: int = 0) -> Case:
    values = {name: (max if name == "worst" else sum)(getattr(c, name) for c in cases) for name in COLUMNS}
    seconds = max((case.seconds for case in cases if case.seconds is not None), default=None)
    return Case(number, fault, processes, seconds=seconds, **values)


def table(cases: list[Case]) -> str:
    """Markdown."""
    lines = [
        "| fault | processes | injected | steps repeated | most for one | left out | data lost | noticed within |",
        "|---|---|---|---|---|---|---|---|",
    ]
    for case in [*merged(cases), _sum(cases)]:
        noticed = "" if case.seconds is None else f"{case.seconds:.1f} s"
        cells = [case.fault, case.processes or "", *(getattr(case, name) for name in COLUMNS), noticed]
        lines.append(f"| {' | '.join(map(str, cells))} |")
    return "\n".join(lines)


if __name__ == "__main__":
    print(table([Case(**json.loads(line)) for line in Path(sys.argv[1]).read_text().splitlines()]))

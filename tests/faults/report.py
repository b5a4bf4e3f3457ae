"""What the fault suite did, counted: one JSON line per case, and the table of docs/reliability.md made of them.

LLMRECIPES_FAULTS_REPORT=faults.jsonl python -m pytest tests/faults
python tests/faults/report.py faults.jsonl
"""

from __future__ import annotations

import json
import os
import sys
from dataclasses import asdict, dataclass, field
from pathlib import Path

VARIABLE = "LLMRECIPES_FAULTS_REPORT"


@dataclass
class Case:
    """One row.

    Attributes:
        number: of the issue's list. fault: in words. processes: of the job.
        injected: faults. lost: optimizer steps that had to be computed again because of all of them.
        worst: the most that a single fault cost. data_lost: samples that were repeated or left out in what counts.
        seconds: longest time from a fault to the end of the job, where the job has to notice it.
    """

    number: int
    fault: str
    processes: int
    injected: int = 0
    lost: int = 0
    worst: int = 0
    data_lost: int = 0
    seconds: float | None = None
    notes: str = field(default="")

    def add(self, lost: int = 0, seconds: float | None = None) -> None:
        """One more fault, and what it cost."""
        self.injected += 1
        self.lost += lost
        self.worst = max(self.worst, lost)
        if seconds is not None:
            self.seconds = max(self.seconds or 0.0, seconds)

    def write(self) -> None:
        """Append to the report, if one is asked for; called when everything about the case was found right."""
        if path := os.environ.get(VARIABLE):
            with Path(path).open("a") as file:
                file.write(json.dumps(asdict(self)) + "\n")


def table(cases: list[Case]) -> str:
    """Markdown."""
    lines = [
        "| fault | processes | injected | steps repeated, all | most for one fault | data lost | noticed within |",
        "|---|---|---|---|---|---|---|",
    ]
    for case in sorted(cases, key=lambda case: (case.number, case.processes)):
        noticed = "" if case.seconds is None else f"{case.seconds:.0f} s"
        cells = [case.fault, case.processes, case.injected, case.lost, case.worst, case.data_lost, noticed]
        lines.append(f"| {' | '.join(map(str, cells))} |")
    total = [sum(getattr(case, name) for case in cases) for name in ("injected", "lost", "data_lost")]
    worst = max((case.worst for case in cases), default=0)
    lines.append(f"| **all** | | **{total[0]}** | **{total[1]}** | **{worst}** | **{total[2]}** | |")
    return "\n".join(lines)


if __name__ == "__main__":
    print(table([Case(**json.loads(line)) for line in Path(sys.argv[1]).read_text().splitlines()]))

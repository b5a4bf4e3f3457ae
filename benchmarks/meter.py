"""What a program under measurement records: time of each unit of work, figures to compare, memory, the machine's rate.

Only the standard library, so that importing this costs no program anything; torch where it is there already.
"""

from __future__ import annotations

import json
import os
import time
from pathlib import Path

OUTPUT_VARIABLE = "BENCH_OUTPUT"  # set by benchmarks.paired: where a program writes its record
MATMUL_SIZE = 2048


class Meter:
    """Marks the ends of units of work; what lies before the first mark is the start of the program.

    CPU seconds are those of the process over all threads, user and system; children are not in them.
    """

    def __init__(self) -> None:
        self._marks: list[tuple[float, float]] = []
        self._first_wall = 0.0
        self.checks: list[float] = []

    def mark(self, check: float | None = None) -> None:
        """A unit of work has just ended; ``check`` is a figure that every program must agree on (such as the loss)."""
        self._marks.append((time.process_time(), time.perf_counter()))
        if len(self._marks) == 1:
            self._first_wall = seconds_since_start()
        if check is not None:
            self.checks.append(check)

    @property
    def count(self) -> int:
        """Marks so far."""
        return len(self._marks)

    def record(self) -> dict[str, object]:
        """All that was measured; ``units[0]`` is from the start of the process, the others from mark to mark."""
        (cpu, wall), *rest = self._marks
        units = [{"cpu": cpu, "wall": self._first_wall}]
        for now in rest:
            units.append({"cpu": now[0] - cpu, "wall": now[1] - wall})
            cpu, wall = now
        return {"units": units, "checks": self.checks, "memory_mib": peak_memory()}


def write_record(record: dict[str, object]) -> None:
    """Write the record where the runner looks for it; to standard output when the program was started by hand."""
    text = json.dumps(record, indent=1)
    if OUTPUT_VARIABLE in os.environ:
        Path(os.environ[OUTPUT_VARIABLE]).write_text(text + "\n", encoding="utf-8")
    else:
        print(text)


def peak_memory(kind: str = "VmHWM") -> float:
    """Peak resident memory of this process in MiB (``RssAnon``: what it holds now beside mapped files).

    From /proc and not ``ru_maxrss``, which begins with the memory of whoever started the process.
    """
    for line in Path("/proc/self/status").read_text(encoding="ascii").splitlines():
        if line.startswith(kind + ":"):
            return int(line.split()[1]) / 1024
    raise RuntimeError(f"/proc/self/status has no {kind}")


def reset_peak_memory() -> float:
    """Let the peak begin anew at what is resident now (Linux); returns that, in MiB."""
    Path("/proc/self/clear_refs").write_text("5", encoding="ascii")
    return peak_memory("VmRSS")


def seconds_since_start() -> float:
    """Wall seconds since this process was started, to 10 ms."""
    started = int(Path("/proc/self/stat").read_text(encoding="utf-8").rpartition(")")[2].split()[19])
    uptime = float(Path("/proc/uptime").read_text(encoding="ascii").split()[0])
    return uptime - started / os.sysconf("SC_CLK_TCK")


def matmul_rate(dtype: str, seconds: float = 1.0) -> float:
    """What the machine gives now: GFLOP per CPU second of ``torch.mm`` of two square matrices of 2,048."""
    import torch

    kind = {"bf16": torch.bfloat16, "fp32": torch.float32}[dtype]
    with torch.no_grad():
        a, b = (torch.randn(MATMUL_SIZE, MATMUL_SIZE).to(kind) for _ in range(2))
        out = torch.mm(a, b)
        torch.mm(a, b, out=out)
        start, count = time.process_time(), 0
        while time.process_time() - start < seconds:
            torch.mm(a, b, out=out)
            count += 1
        return 2 * MATMUL_SIZE**3 * count / (time.process_time() - start) / 1e9

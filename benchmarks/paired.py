"""Runs programs in turn, A B A B, and compares what they recorded: medians, spread, and rows that are void.

Two programs are compared only within one round: one after the other, so that a machine that is busy now and idle later
slows both. A row is void when the programs did not compute the same.
"""

from __future__ import annotations

import json
import os
import shutil
import statistics
import subprocess
import time
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any, Literal

from benchmarks.meter import OUTPUT_VARIABLE

Measure = Literal["steps", "first"]


@dataclass(frozen=True)
class Program:
    """One side of a comparison.

    Args:
        name: for the table. command: with ``{place}`` holders, filled by the runner.
        environment: variables it gets beside the group's.
        note: what a reader of the table should know.
    """

    name: str
    command: tuple[str, ...]
    environment: Mapping[str, str] = field(default_factory=dict)
    note: str = ""


@dataclass(frozen=True)
class Peer:
    """A program to compare with, and what is aimed at: ours over it in speed (at least) and memory (at most)."""

    program: Program
    speed: float | None = None
    memory: float | None = None


@dataclass(frozen=True)
class Group:
    """Programs that do the same work under the same settings.

    Args:
        case: letter of the case. name: its settings, such as ``bf16, compile``.
        ours, peers: the programs. environment: for all of them.
        work: units of work in one record of a program, such as tokens per step. unit: their name.
        flops: model FLOPs per unit of work; None where there is no model.
        measure: ``steps`` after the warm-up, or the ``first`` one with the start of the program.
        tolerance: how far figures may differ before the row is void; of the figure itself where ``relative``.
        checks: how many of the first figures are compared.
        short: part of the short form.
        steps: how many steps the workers are asked for beyond the warm-up; None = the runner's number.
        limit: CPU seconds that ours may take at most, where that is the aim and not a ratio.
    """

    case: str
    name: str
    ours: Program
    peers: tuple[Peer, ...]
    work: float
    unit: str
    flops: float | None = None
    environment: Mapping[str, str] = field(default_factory=dict)
    measure: Measure = "steps"
    tolerance: float = 1e-3
    relative: bool = False
    checks: int = 3
    short: bool = False
    warmup: int | None = None
    steps: int | None = None
    limit: float | None = None

    @property
    def key(self) -> str:
        """Unique among groups."""
        return f"{self.case} {self.name}"

    @property
    def programs(self) -> list[Program]:
        """Ours first."""
        return [self.ours, *(peer.program for peer in self.peers)]


@dataclass(frozen=True)
class Plan:
    """How much is run: ``rounds`` of every program, ``warmup`` steps that do not count and ``steps`` that do."""

    rounds: int
    warmup: int
    steps: int


@dataclass(frozen=True)
class Figures:
    """Of one run: units of work per CPU second and per second, CPU and wall seconds of a record, memory in MiB."""

    per_cpu: float
    per_second: float
    cpu: float
    wall: float
    memory: float
    matmul: float | None


@dataclass(frozen=True)
class Ratio:
    """Ours over a peer's: median of the rounds, and the lowest and highest."""

    median: float
    low: float
    high: float


def run_group(group: Group, plan: Plan, places: Mapping[str, str], folder: Path) -> dict[str, list[dict[str, Any]]]:
    """Every program once per round, in the same order in each.

    Args:
        group: what to run. plan: how often. places: values of the holders in commands.
        folder: for records and the output of programs.

    Returns:
        name of the program -> its records, one per round; a failed run has ``error`` and nothing else.
    """
    warmup = plan.warmup if group.warmup is None else group.warmup
    steps = plan.steps if group.steps is None else group.steps
    found: dict[str, list[dict[str, Any]]] = {program.name: [] for program in group.programs}
    for number in range(plan.rounds):
        for program in group.programs:
            name = f"{group.key} {program.name} {number}".replace(" ", "_").replace("/", "_").replace(",", "")
            filled = {**places, "steps": str(warmup + steps), "run": name}
            record = run_program(program, group.environment, filled, folder / name)
            record["warmup"] = warmup
            if "error" not in record:  # twelve bytes a weight in its checkpoint, and nothing that is compared
                shutil.rmtree(folder / name, ignore_errors=True)
            found[program.name].append(record)
    return found


def run_program(
    program: Program, environment: Mapping[str, str], places: Mapping[str, str], base: Path
) -> dict[str, Any]:
    """One run in a process of its own; ``base`` + ``.json`` and ``.log`` are its record and what it printed."""
    output, log = base.with_name(base.name + ".json"), base.with_name(base.name + ".log")
    output.unlink(missing_ok=True)
    command = [part.format_map(places) for part in program.command]
    variables = os.environ | {"OMP_NUM_THREADS": str(os.cpu_count()), "GOMP_SPINCOUNT": "2000"}
    variables |= {**environment, **program.environment, OUTPUT_VARIABLE: str(output)}
    # Installers compile what they install; what runs from its source tree would be compiled anew at every start.
    variables.pop("PYTHONDONTWRITEBYTECODE", None)
    load = os.getloadavg()[0]
    with log.open("w", encoding="utf-8") as out:
        done = subprocess.run(command, env=variables, stdout=out, stderr=subprocess.STDOUT, check=False)
    if done.returncode != 0 or not output.exists():
        lines = [line for line in log.read_text(encoding="utf-8", errors="replace").splitlines() if line.strip()]
        return {"error": f"exit {done.returncode}: {lines[-1][:200] if lines else 'no output'}"}
    record: dict[str, Any] = json.loads(output.read_text(encoding="utf-8"))
    return record | {"load": load, "time": time.strftime("%Y-%m-%dT%H:%M:%S%z")}


def figures(record: Mapping[str, Any], work: float, measure: Measure) -> Figures:
    """What one run's record says; the middle of its counted steps. A record may know its ``work`` itself."""
    units = record["units"]
    counted = units[:1] if measure == "first" else units[record["warmup"] :]
    if not counted:
        raise ValueError(f"{len(units)} records, {record['warmup']} of them warm-up: none is left to count")
    cpu, wall = (statistics.median(unit[clock] for unit in counted) for clock in ("cpu", "wall"))
    rate, work = record.get("matmul_gflop_per_cpu_s"), record.get("work", work)
    return Figures(work / cpu, work / wall, cpu, wall, record["memory_mib"], rate)


def middle(found: Sequence[Figures]) -> Figures:
    """Medians over rounds."""
    rates = [one.matmul for one in found if one.matmul is not None]
    names = ("per_cpu", "per_second", "cpu", "wall", "memory")
    medians = [statistics.median(getattr(one, name) for one in found) for name in names]
    return Figures(*medians, statistics.median(rates) if rates else None)


def ratio(ours: Sequence[float], peers: Sequence[float]) -> Ratio:
    """Ours over the peer's, round by round."""
    found = [a / b for a, b in zip(ours, peers, strict=True)]
    return Ratio(statistics.median(found), min(found), max(found))


def void_reason(group: Group, ours: Sequence[Mapping[str, Any]], peers: Sequence[Mapping[str, Any]]) -> str | None:
    """Why two programs' rows must not be compared; None when they may be."""
    for who, records in (("ours", ours), ("it", peers)):
        for record in records:
            if "error" in record:
                return f"{who} failed: {record['error']}"
    for a, b in zip(ours, peers, strict=True):
        mine, theirs = a["checks"][: group.checks], b["checks"][: group.checks]
        if len(mine) != len(theirs) or not mine:
            return f"{len(mine)} figures to compare, the peer has {len(theirs)}"
        for step, (x, y) in enumerate(zip(mine, theirs, strict=True), 1):
            allowed = group.tolerance * (abs(x) if group.relative else 1.0)
            if not abs(x - y) <= allowed:  # also when one is not a number
                return f"not the same: figure {step} is {x:.6g} and {y:.6g}"
    return None

"""Compare with other libraries: ``python -m benchmarks --peers .venv-peers/bin/python``.

Results go to ``--results`` (JSON, merged: groups that are not run keep what they had) and, as a table, between the
markers of ``--table``. ``--list`` shows the groups and starts nothing.
"""

from __future__ import annotations

import argparse
import json
import os
import platform
import sys
from pathlib import Path
from typing import Any

from benchmarks.cases import TITLES, groups
from benchmarks.paired import Group, Plan, run_group
from benchmarks.table import group_rows, put_between_markers, tables

SHORT, FULL = Plan(rounds=2, warmup=2, steps=3), Plan(rounds=3, warmup=3, steps=6)


def arguments() -> argparse.Namespace:
    """The command line."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--peers", default=".venv-peers/bin/python", help="interpreter of the peers' environment")
    parser.add_argument("--inputs", default="runs/bench/inputs")
    parser.add_argument("--work", type=Path, default=Path("runs/bench/work"))
    parser.add_argument("--results", type=Path, default=Path("runs/bench/results.json"))
    parser.add_argument("--table", type=Path, default=None, help="Markdown file with the markers")
    parser.add_argument("--full", action="store_true", help="every group, more rounds and steps")
    parser.add_argument("--only", nargs="*", default=[], help="these groups (such as 'A bf16') or cases (A)")
    parser.add_argument("--rounds", type=int, default=None)
    parser.add_argument("--list", action="store_true")
    return parser.parse_args()


def chosen(asked: argparse.Namespace) -> list[Group]:
    """The groups to run."""
    if asked.only:
        return [group for group in groups() if {group.key, group.case} & set(asked.only)]
    return [group for group in groups() if asked.full or group.short]


def machine() -> dict[str, Any]:
    """What the figures were measured on."""
    model = ""
    for line in Path("/proc/cpuinfo").read_text(encoding="utf-8").splitlines():
        if line.startswith("model name"):
            model = line.partition(":")[2].strip()
            break
    return {"cpu": model, "cpus": os.cpu_count(), "python": platform.python_version(), "system": platform.platform()}


def read_results(path: Path) -> dict[str, Any]:
    """What earlier runs left; ``groups``: key -> program -> records."""
    if not path.exists():
        return {"groups": {}}
    found: dict[str, Any] = json.loads(path.read_text(encoding="utf-8"))
    return found


def main() -> None:
    """Run, write, print."""
    asked = arguments()
    plan = FULL if asked.full else SHORT
    if asked.rounds:
        plan = Plan(asked.rounds, plan.warmup, plan.steps)
    if asked.list:
        print("\n".join(f"{'short' if group.short else '     '}  {group.key}" for group in groups()))
        return
    asked.work.mkdir(parents=True, exist_ok=True)
    places = {"ours": sys.executable, "peers": asked.peers, "inputs": asked.inputs, "work": str(asked.work)}
    for group in chosen(asked):
        records = run_group(group, plan, places, asked.work)
        results = read_results(asked.results)  # again: another run may have added to it meanwhile
        results["machine"] = machine()
        results["groups"][group.key] = records
        asked.results.write_text(json.dumps(results, indent=1) + "\n", encoding="utf-8")
        print(f"{group.key}\n" + "\n".join(group_rows(group, records)), flush=True)
    if asked.table is not None:
        put_between_markers(asked.table, tables(groups(), read_results(asked.results)["groups"], TITLES))


if __name__ == "__main__":
    main()

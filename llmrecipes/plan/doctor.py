"""What this machine lacks for training, and what to do about it.

Each probe runs under a limit of time, and one that fails says so and leaves the others alone. Whatever may crash or
hang inside a library (torch, a driver) runs in a process of its own.
"""

from __future__ import annotations

import json
import threading
from collections.abc import Callable
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Literal

from llmrecipes.plan import probes
from llmrecipes.plan.probes import Finding, Needs

_SIGNS = {"ok": "ok   ", "warn": "warn ", "block": "BLOCK"}


@dataclass(frozen=True)
class Probe:
    """One question to the machine."""

    name: str
    ask: Callable[[Needs], list[Finding]]


PROBES = (
    Probe("python", probes.python),
    Probe("compiler", probes.compiler),
    Probe("driver", probes.driver),
    Probe("torch", probes.torch),
    Probe("network", probes.network),
    Probe("host", probes.host),
    Probe("disk", probes.disk),
    Probe("clock", probes.clock),
    Probe("slurm", probes.slurm),
    Probe("tokenizer", probes.tokenizer),
)


def examine(needs: Needs, timeout: float, asked: tuple[Probe, ...] = PROBES) -> dict[str, list[Finding]]:
    """Ask everything, side by side; a probe that takes longer than ``timeout`` seconds is left behind and named."""
    found: dict[str, list[Finding]] = {}

    def ask(probe: Probe) -> None:
        try:
            found[probe.name] = probe.ask(needs)
        except Exception as error:
            what = f"could not be examined: {type(error).__name__}: {error}"
            found[probe.name] = [Finding("warn", what, "the others are not affected; look at it by hand")]

    threads = {probe.name: threading.Thread(target=ask, args=(probe,), daemon=True) for probe in asked}
    for thread in threads.values():
        thread.start()
    for name, thread in threads.items():
        thread.join(timeout)
        if thread.is_alive():
            late = f"no answer within {timeout:g} s"
            found[name] = [
                Finding("warn", late, "something hangs there (a file system, a driver), or the machine is busy")
            ]
    return {probe.name: found[probe.name] for probe in asked}


def worst(found: dict[str, list[Finding]]) -> Literal["ok", "warn", "block"]:
    """The gravest of all findings."""
    states = {finding.state for findings in found.values() for finding in findings}
    return "block" if "block" in states else "warn" if "warn" in states else "ok"


def run(recipe: Path | None, run_root: Path, tokenizer: Path | None, timeout: float, as_json: bool) -> int:
    """The command; 1 when something blocks.

    Raises:
        UserError: the recipe has mistakes.
    """
    found = examine(probes.needs_of(recipe, run_root, tokenizer, timeout), timeout)
    state = worst(found)
    if as_json:
        said = {name: [asdict(finding) for finding in findings] for name, findings in found.items()}
        print(json.dumps({"state": state, "probes": said}, ensure_ascii=False))
        return int(state == "block")
    for name, findings in found.items():
        for finding in findings:
            print(f"{_SIGNS[finding.state]} {name:10} {finding.what}")
            if finding.do:
                print(f"{'':16} -> {finding.do}")
    print({"ok": "nothing is missing", "warn": "nothing blocks", "block": "something blocks"}[state])
    return int(state == "block")

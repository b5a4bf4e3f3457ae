"""What a run has measured, read from its folder. Torch-free."""

from __future__ import annotations

import json
from dataclasses import dataclass
from pathlib import Path
from statistics import median

from llmrecipes.errors import UserError


@dataclass(frozen=True)
class Measured:
    """Of a run: tokens per second (median of the second half), peak memory in bytes (None: unknown)."""

    name: str
    tokens_per_second: float
    memory: float | None


def read_run(folder: Path) -> Measured:
    """Figures of ``metrics.jsonl`` in a run folder.

    Raises:
        UserError: there is none, or no step in it was timed.
    """
    path = folder / "metrics.jsonl" if folder.is_dir() else folder
    try:
        lines = path.read_text(encoding="utf-8").splitlines()
        records = [json.loads(line) for line in lines if line.strip()]
    except OSError as error:
        raise UserError(f"--run {folder}: {path} cannot be read ({error.strerror}): name a run folder") from None
    except ValueError:
        raise UserError(f"--run {folder}: {path} is not JSON lines") from None
    rates = [r["tokens_per_second"] for r in records if isinstance(r, dict) and r.get("tokens_per_second")]
    if not rates:
        raise UserError(f"--run {folder}: no step of it was timed; let it train some steps first")
    memory = [r["memory_gib"] for r in records if isinstance(r, dict) and r.get("memory_gib")]
    return Measured(str(folder), median(rates[len(rates) // 2 :]), max(memory) * 2**30 if memory else None)

"""A run in a few lines of a terminal."""

from __future__ import annotations

from collections.abc import Sequence
from itertools import pairwise

from llmrecipes.watch.alarms import Alarm
from llmrecipes.watch.reading import State

BARS = "▁▂▃▄▅▆▇█"
WIDTH = 60


def view(state: State, found: Sequence[Alarm], now: float) -> list[str]:
    """The lines.

    Args:
        state: of the run.
        found: its alarms.
        now: seconds since 1970.
    """
    lines = [f"{state.name}  {_progress(state, now)}"]
    if state.steps:
        lines.append("  " + "  ".join(_figures(state)))
        losses = [r["loss"] for r in state.steps if r["loss"] is not None]
        if len(losses) > 1:
            lines.append(f"  loss  {sparkline(losses, WIDTH)}  {losses[0]:.3f} -> {losses[-1]:.3f}")
    if state.checkpoint:
        room = state.free // state.checkpoint_bytes if state.checkpoint_bytes else 0
        lines.append(
            f"  checkpoint  {state.checkpoint}, {state.checkpoint_bytes / 1e6:,.0f} MB; room for {room:,} more"
        )
    for rank in state.ranks.get("ranks", [])[:16]:
        lines.append(f"  {rank['rank']}  step {rank['step']}  waits {rank['waits']:.0%}  {rank['place']}")
    return lines + [f"  ALARM {alarm.kind}: {alarm.message}" for alarm in found]


def _progress(state: State, now: float) -> str:
    last = state.max_steps
    done = f"step {state.step:,}" + (f" of {last:,} ({100 * state.step / last:.1f}%)" if last else "")
    if state.done:
        return f"{done}  done"
    if not state.steps:
        return f"{done}  nothing logged yet"
    left = ""
    if last and state.seconds_per_step is not None:
        left = f"  about {duration((last - state.step) * state.seconds_per_step)} left"
    return f"{done}{left}  last sign {duration(max(0.0, now - state.touched))} ago"


def _figures(state: State) -> list[str]:
    record = state.steps[-1]
    shown = [f"{name} {record[key]:{form}}" for key, name, form in FORMS if record.get(key) is not None]
    if state.validation.get("val_loss") is not None:
        shown.append(f"val_loss {state.validation['val_loss']:.4f} (step {state.validation['step']})")
    if record.get("max_violation"):
        dead = sum(load == 0 for layer in record.get("expert_load", []) for load in layer)
        shown.append(
            f"maxvio {max(record['max_violation']):.2f}" + (f", {dead} experts without tokens" if dead else "")
        )
    return shown


FORMS = (
    ("loss", "loss", ".4f"),
    ("grad_norm", "grad", ".3f"),
    ("lr", "lr", ".2e"),
    ("tokens_per_second", "tok/s", ",.0f"),
)


def sparkline(values: Sequence[float], width: int) -> str:
    """Values as bars, each the mean of a stretch of them."""
    count = min(width, len(values))
    edges = [round(i * len(values) / count) for i in range(count + 1)]
    means = [sum(values[a:b]) / (b - a) for a, b in pairwise(edges)]
    low, high = min(means), max(means)
    step = (high - low) / (len(BARS) - 1) or 1.0
    return "".join(BARS[round((value - low) / step)] for value in means)


def duration(seconds: float) -> str:
    """``42 s``, ``7 min``, ``5.2 h``, ``2.1 d``."""
    for size, unit in ((86400, "d"), (3600, "h")):
        if seconds >= 2 * size:
            return f"{seconds / size:.1f} {unit}"
    return f"{seconds / 60:.0f} min" if seconds >= 120 else f"{seconds:.0f} s"

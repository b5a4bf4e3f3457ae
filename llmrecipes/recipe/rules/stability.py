"""The stability guard against the checkpoints it may have to go back to."""

from __future__ import annotations

from collections.abc import Iterator

from llmrecipes.recipe.rules.facts import Facts, Finding

_LEAST = {"window": 8, "min_history": 4, "patience": 1, "rollback_to": 1, "max_rollbacks": 0}


def stability_problems(facts: Facts) -> Iterator[Finding]:
    """Numbers that are too small, ranges of steps, checkpoints enough for a rollback, ``resume_lr``."""
    for key, least in _LEAST.items():
        value = facts.integer("stability", key)
        if value is not None and value < least:
            yield Finding(("stability", key), f"stability.{key} {value} is less than {least}")
    window, history = (facts.integer("stability", key) for key in ("window", "min_history"))
    if (window or 128) < (history or 32):
        what = f"stability.window {window or 128} is shorter than min_history {history or 32}: no step is ever judged"
        yield Finding(("stability", "window" if window else "min_history"), what)
    for key in ("loss_threshold", "grad_threshold"):
        threshold = facts.number("stability", key)
        if threshold is not None and threshold <= 0:
            yield Finding(
                ("stability", key), f"stability.{key} {threshold} is not positive: every step would be a spike"
            )
    yield from _ranges(facts)
    yield from _kept(facts)
    yield from _resume_lr(facts)


def _ranges(facts: Facts) -> Iterator[Finding]:
    path = ("stability", "skip_steps")
    ranges = facts.get(*path)
    if not isinstance(ranges, list) or not facts.sound(path):
        return
    for pair in ranges:
        if not (isinstance(pair, list) and len(pair) == 2):
            yield Finding(path, f"stability.skip_steps {pair} is not a pair", "write [[first, last]], both included")
        elif not 1 <= pair[0] <= pair[1]:
            yield Finding(path, f"stability.skip_steps {pair}: steps count from 1, the first before the last")


def _kept(facts: Facts) -> Iterator[Finding]:
    """A spike that lasts ``patience`` steps must not push out the checkpoints from before it."""
    rolls_back = "rollback" in (facts.get("stability", "action"), facts.get("stability", "non_finite"))
    every = facts.steps("checkpoint", "every") if facts.has("checkpoint", "every") else 500
    if not rolls_back or not every:
        return
    kept = facts.integer("checkpoint", "keep_last") or 2
    wanted = facts.integer("stability", "rollback_to") or 1
    meanwhile = -(-((facts.integer("stability", "patience") or 5) - 1) // every)
    if kept < wanted + meanwhile:
        what = f"checkpoint.keep_last {kept} is too few for stability.rollback_to {wanted}"
        if meanwhile:
            what += f": up to {meanwhile} are written while patience lasts"
        yield Finding(("stability", "rollback_to"), what, f"set checkpoint.keep_last to {wanted + meanwhile}")


def _resume_lr(facts: Facts) -> Iterator[Finding]:
    asked, length = facts.get("resume_lr"), facts.get("cool_down")
    if asked == "cool_down" and length is None:
        yield Finding(("resume_lr",), "resume_lr cool_down needs a length", "add cool_down: 2000 steps")
    elif asked in ("override", "restart") and length is not None:
        yield Finding(("cool_down",), f"cool_down contradicts resume_lr {asked}", "leave one out")

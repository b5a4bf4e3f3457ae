"""Learning-rate schedules against the run they belong to.

A week was lost to a learning rate that reached its floor after 20 of 175,000 steps: such recipes are refused here.
"""

from __future__ import annotations

from collections.abc import Iterator

from llmrecipes.recipe.rules.facts import MODEL, SCHEDULE, Facts, Finding

_NAME = "model.init_args.schedule"


def schedule_problems(facts: Facts) -> Iterator[Finding]:
    """Decay against run, warm-up against decay, floor against peak, learning rate against zero."""
    floor = facts.number(*SCHEDULE, "floor")
    if floor is not None and floor > 1:
        what = f"{_NAME}: floor {floor} is above the peak (the lowest rate is a fraction of the highest)"
        yield Finding((*SCHEDULE, "floor"), what, "write 0.1 for a tenth of lr")
    elif floor is not None and floor < 0:
        yield Finding((*SCHEDULE, "floor"), f"{_NAME}: floor {floor} is negative")
    rate = facts.number(*MODEL, "optimizer", "init_args", "lr")
    if rate is not None and rate <= 0:
        what = f"model.init_args.optimizer: lr {rate} is not positive"
        yield Finding((*MODEL, "optimizer", "init_args", "lr"), what)
    name = str(facts.get(*MODEL, "schedule", "class_path")).rpartition(".")[2]
    yield from _stable_decay(facts) if name == "WarmupStableDecay" else _decay_to_floor(facts)


def _decay_to_floor(facts: Facts) -> Iterator[Finding]:
    """A decay counted from the start of the run; absent = the whole run."""
    run, warmup, decay = facts.max_steps, facts.steps(*SCHEDULE, "warmup"), facts.steps(*SCHEDULE, "decay")
    if run and decay is not None and decay < run / 2:
        what = (
            f"{_NAME}: the learning rate decays in {decay:,} of {run:,} steps and stays at its floor for the other "
            f"{run - decay:,}"
        )
        yield Finding((*SCHEDULE, "decay"), what, "write decay: null for the whole run")
    if warmup is None:
        return
    if decay is not None and warmup > decay:
        what = f"{_NAME}: warmup ({warmup:,} steps) is longer than decay ({decay:,} steps, warm-up included)"
        yield Finding((*SCHEDULE, "warmup"), what)
    elif run and warmup > run:
        what = f"{_NAME}: warmup ({warmup:,} steps) is longer than the run ({run:,} steps)"
        yield Finding((*SCHEDULE, "warmup"), what)


def _stable_decay(facts: Facts) -> Iterator[Finding]:
    """A decay that is the last part of the run."""
    run, warmup, decay = facts.max_steps, facts.steps(*SCHEDULE, "warmup"), facts.steps(*SCHEDULE, "decay")
    if run and warmup is not None and decay is not None and warmup + decay > run:
        what = f"{_NAME}: warmup ({warmup:,} steps) and decay ({decay:,} steps) do not fit in the run ({run:,} steps)"
        yield Finding((*SCHEDULE, "decay"), what)

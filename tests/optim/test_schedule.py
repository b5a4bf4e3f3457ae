"""Schedules against their closed forms, with the first and the last update exact."""

from __future__ import annotations

import itertools
import math

import pytest

from llmrecipes.optim import Constant, CoolDown, RunLength, WarmupCosine, WarmupStableDecay

RUN = RunLength(max_steps=100, tokens_per_step=50)


def factors(schedule, run=RUN, steps=None):
    return [schedule.factor(step, run) for step in range(steps or run.max_steps)]


def cosine(t, warmup, end, floor):
    """The closed form for the t-th update, from 1."""
    if t < warmup:
        return t / warmup
    angle = math.pi * min(1.0, (t - warmup) / (end - warmup))
    return floor + (1 - floor) * (1 + math.cos(angle)) / 2


@pytest.mark.parametrize(("warmup", "decay", "floor"), [(10, 80, 0.1), (1, 100, 0.0), (0, 50, 0.05), (100, 100, 0.1)])
def test_warmup_cosine_is_its_closed_form(warmup, decay, floor):
    found = factors(WarmupCosine(f"{warmup} steps", f"{decay} steps", floor))
    if warmup == decay:
        assert found[:-1] == [t / 100 for t in range(1, 100)]
    else:
        assert found == pytest.approx([cosine(t, warmup, decay, floor) for t in range(1, 101)], abs=1e-15)


def test_first_and_last_updates_are_exact():
    found = factors(WarmupCosine("10 steps", "80 steps", 0.1))
    assert found[0] == 1 / 10
    assert found[8] == 9 / 10
    assert found[9] == 1.0  # the last update of the warm-up has the whole peak
    assert found[10] < 1.0
    assert found[44] == pytest.approx(0.55, abs=1e-15)  # half way between 10 and 80
    assert found[78] > 0.1
    assert found[79:] == [0.1] * 21  # exactly the floor, and for ever
    assert all(a > b for a, b in itertools.pairwise(found[9:80]))


def test_mutant_off_by_one_would_be_noticed():
    """Counting updates from 0 starts at a rate of zero and misses the floor: a classic."""

    def mutant(step):
        return cosine(step, 10, 100, 0.1)

    found = factors(WarmupCosine("10 steps", None, 0.1))
    assert mutant(0) == 0.0 != found[0]
    assert mutant(99) > 0.1 == found[99]


def test_no_decay_given_is_the_whole_run():
    for steps in (20, 100, 1000):
        run = RunLength(steps, 50)
        schedule = WarmupCosine("10 steps", None, 0.1)
        assert schedule.decay_steps(run) == steps
        assert factors(schedule, run) == factors(WarmupCosine("10 steps", f"{steps} steps", 0.1), run)
        assert schedule.factor(steps - 1, run) == 0.1
        assert schedule.factor(steps - 2, run) > 0.1


@pytest.mark.parametrize(
    ("tokens", "steps"), [("500 tokens", 10), ("501 tokens", 11), ("0.5k tokens", 10), ("1 token", 1)]
)
def test_tokens_equal_steps(tokens, steps):
    assert factors(WarmupCosine(tokens, None)) == factors(WarmupCosine(f"{steps} steps", None))
    assert factors(Constant(tokens)) == factors(Constant(f"{steps} steps"))
    pair = WarmupStableDecay("5 steps", tokens), WarmupStableDecay("5 steps", f"{steps} steps")
    assert factors(pair[0]) == factors(pair[1])
    assert WarmupCosine("1 steps", "4000 tokens").decay_steps(RUN) == 80


def test_constant():
    assert factors(Constant()) == [1.0] * 100
    found = factors(Constant("4 steps"))
    assert found == [0.25, 0.5, 0.75, *[1.0] * 97]
    assert Constant().decay_steps(RUN) is None


@pytest.mark.parametrize(
    ("shape", "form"),
    [
        ("linear", lambda x: 1 - x),
        ("sqrt", lambda x: 1 - math.sqrt(x)),
        ("cosine", lambda x: (1 + math.cos(math.pi * x)) / 2),
    ],
)
@pytest.mark.parametrize("floor", [0.0, 0.05])
def test_warmup_stable_decay(shape, form, floor):
    schedule = WarmupStableDecay("10 steps", "20 steps", floor, shape)
    found = factors(schedule)
    assert found[:10] == pytest.approx([t / 10 for t in range(1, 11)])
    assert found[9:80] == [1.0] * 71  # the plateau is exactly flat
    assert found[80:] == pytest.approx([floor + (1 - floor) * form(t / 20) for t in range(1, 21)], abs=1e-15)
    assert found[99] == floor  # the fall ends with the run
    assert schedule.factor(150, RUN) == floor
    assert schedule.decay_steps(RUN) == 100


@pytest.mark.parametrize(
    "base", [Constant("4 steps"), WarmupCosine("4 steps", None, 0.1), WarmupStableDecay("4 steps", "20 steps")]
)
@pytest.mark.parametrize("start", [1, 3, 30, 90])
def test_cool_down_goes_on_from_the_rate_it_finds(base, start):
    cooled = CoolDown(base, start, "10 steps")
    assert cooled.decay_steps(RUN) == start + 10
    found = factors(cooled, steps=start + 12)
    assert found[:start] == factors(base, steps=start)
    before = base.factor(start - 1, RUN)
    assert found[start:] == pytest.approx([*(before * (1 - t / 10) for t in range(1, 11)), 0.0, 0.0], abs=1e-15)
    assert found[start + 9] == 0.0
    # No jump: each fall is as large as the next.
    assert found[start - 1] - found[start] == pytest.approx(found[start] - found[start + 1])


def test_cool_down_to_a_floor_in_tokens_and_other_shapes():
    cooled = CoolDown(Constant(), 50, "1000 tokens", floor=0.1, shape="sqrt")
    found = factors(cooled, steps=71)
    assert found[49] == 1.0
    assert found[50] == pytest.approx(0.1 + 0.9 * (1 - math.sqrt(1 / 20)))
    assert found[69] == found[70] == 0.1


def test_factors_are_pure_functions_of_the_step():
    """A resumed run asks for its step only; asking in any order gives the same."""
    for schedule in (WarmupCosine("10 steps", None), WarmupStableDecay("10 steps", "20 steps"), Constant("3 steps")):
        forward = factors(schedule)
        assert [schedule.factor(step, RUN) for step in reversed(range(100))] == forward[::-1]


@pytest.mark.parametrize("text", ["10", "10 iterations", "1.5 steps", "-3 steps", "ten steps", ""])
def test_a_length_without_a_sensible_unit_is_refused(text):
    with pytest.raises(ValueError, match=r"is not a"):
        WarmupCosine(text)

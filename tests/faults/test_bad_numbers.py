"""A gradient that is not a number, a loss that jumps: the state never sees them."""

from __future__ import annotations

import pytest
import torch
from broken_runs import Inject, assert_same, differences, fit, last_step, steps_to_repeat
from helpers import trajectory, write_recipe
from report import Case

from llmrecipes.checkpoint import newest_whole
from llmrecipes.modules import PretrainModule

STEPS, BAD = 24, 14
RELEASE = pytest.mark.release
QUICK = {"window": 8, "min_history": 4, "patience": 2}


def nan_gradient(bad_rank: int, *steps: int) -> Inject:
    """One element of one gradient on one rank, once per named step (from 1); losses are finite."""

    def inject(rank: int) -> None:
        real = PretrainModule._backward

        def backward(self, terms, counts):
            real(self, terms, counts)
            if self.trainer.global_step + 1 in steps and rank == bad_rank:
                gradient = next(p.grad for p in self.model.parameters() if p.grad is not None)
                local = gradient.to_local() if hasattr(gradient, "to_local") else gradient
                local.view(-1)[:1] = float("nan")

        PretrainModule._backward = backward

    return inject


def spike(*steps: int) -> Inject:
    """The loss of these steps is eight times what it should be."""

    def inject(rank: int) -> None:
        real = PretrainModule.loss_terms

        def loss_terms(self, batch):
            terms = real(self, batch)
            if self.training and self.trainer.global_step + 1 in steps:
                terms["loss"] = terms["loss"]._replace(sum=terms["loss"].sum * 8.0)
            return terms

        PretrainModule.loss_terms = loss_terms

    return inject


@pytest.fixture
def train(tmp_path, little):
    """``train("name", fault, non_finite="rollback")``: run folder of 24 steps, and what was printed."""

    def run(name: str, fault: Inject, ranks: int = 1, expect: int = 0, **stability):
        recipe = little(ranks, steps=STEPS)
        recipe["stability"] = QUICK | stability
        recipe["checkpoint"]["keep_last"] = 4
        (tmp_path / name).mkdir(exist_ok=True)
        write_recipe(tmp_path / name, recipe)
        return tmp_path / name / "run", fit(tmp_path / name, ranks=ranks, inject=fault, expect=expect)

    return run


def nothing(rank: int) -> None:
    """No fault."""


def records(folder):
    """The trajectory; why a step was passed over depends on who decided it."""
    return [{k: bool(v) if k == "skipped" else v for k, v in r.items()} for r in trajectory(folder)]


def assert_as_clean(run, clean, ranks=1, since=0):
    """Equal in all but the reasons why steps were passed over, from step ``since`` on."""
    later = lambda folder: [r for r in records(folder) if r["step"] > since]  # noqa: E731
    found = differences(run, clean, ranks, later)
    assert set(found) <= {"state"}  # of the guard: rollbacks made, ranges known
    assert later(run)


@pytest.mark.parametrize(("ranks", "bad_rank"), [(1, 0), pytest.param(2, 1, marks=RELEASE)])
def test_nan_gradient_stops_the_run_before_the_step(train, ranks, bad_rank):
    case = Case(7, "gradient that is not a number: stop", ranks)
    run, text = train("run", nan_gradient(bad_rank, BAD), ranks, expect=1)
    (said,) = [line for line in text.splitlines() if "stopped: " in line]
    assert f"step {BAD}: gradient norm is nan; the step was not applied." in said
    assert said.endswith("The last good checkpoint is run/checkpoints/step=000012.")
    assert newest_whole(run / "checkpoints")[0].name == "step=000012"
    case.add(lost=steps_to_repeat(run))
    train("run", nothing, ranks)
    assert_same(run, train("clean", nothing, ranks)[0], ranks)
    case.write()


@pytest.mark.parametrize(
    ("action", "passed_over", "ranks", "bad_rank"),
    [
        ("skip_step", [BAD, BAD], 1, 0),
        ("rollback", [13, BAD], 2, 1),
        pytest.param("skip_step", [BAD, BAD], 2, 1, marks=RELEASE),
        pytest.param("rollback", [13, BAD], 1, 0, marks=RELEASE),
    ],
)
def test_nan_gradient_and_the_run_goes_on(train, action, passed_over, ranks, bad_rank):
    case = Case(7, f"gradient that is not a number: {action}", ranks)
    run, text = train("run", nan_gradient(bad_rank, BAD), ranks, non_finite=action)
    clean, _ = train("clean", nothing, ranks, skip_steps=[passed_over])
    assert f"step {BAD}: gradient norm is nan" in text
    # Step 14 has a record of its own where it was computed and left out.
    assert_as_clean(run, clean, ranks, since=BAD if action == "skip_step" else 0)
    assert last_step(run) == STEPS - (0 if action == "skip_step" else 2)
    case.add(left_out=passed_over[1] - passed_over[0] + 1)
    case.write()


@pytest.mark.parametrize(
    ("action", "bad", "passed_over", "ranks"),
    [
        ("skip_step", [14], [14, 14], 2),
        ("rollback", [14, 15], [13, 15], 1),
        pytest.param("skip_step", [14], [14, 14], 1, marks=RELEASE),
        pytest.param("rollback", [14, 15], [13, 15], 2, marks=RELEASE),
    ],
)
def test_loss_spike(train, action, bad, passed_over, ranks):
    case = Case(8, f"loss spike: {action}", ranks)
    run, text = train("run", spike(*bad), ranks, action=action)
    clean, _ = train("clean", spike(*bad), ranks, skip_steps=[passed_over])
    assert "step 14: loss" in text
    assert_as_clean(run, clean, ranks, since=14 if action == "skip_step" else 0)
    case.add(left_out=passed_over[1] - passed_over[0] + 1)
    case.write()


def test_mutant_that_applies_the_spike_differs(train):
    run, _ = train("run", spike(14), action="warn")
    clean, _ = train("clean", spike(14), skip_steps=[[14, 14]])
    with pytest.raises(AssertionError):
        assert_as_clean(run, clean, since=14)
    assert torch.isfinite(torch.tensor([r["loss"] for r in trajectory(run) if "loss" in r])).all()

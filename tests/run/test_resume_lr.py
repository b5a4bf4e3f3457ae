"""The learning rate of a resumed run: kept, unless asked otherwise; every change recorded and made once."""

from __future__ import annotations

import shutil

import pytest
import yaml
from helpers import trajectory, write_recipe

from llmrecipes.checkpoint import read_info
from llmrecipes.optim import Constant, CoolDown, Restart, RunLength, WarmupCosine
from llmrecipes.recipe import Duration, check
from llmrecipes.run.lr_changes import plan_rate

RATE = ["--model.init_args.optimizer.init_args.lr", 0.001]
LONGER = ["--trainer.max_steps", 18, "--checkpoint.every", "2 steps"]


def rates(folder):
    return {r["step"]: r["lr"] for r in trajectory(folder) if "lr" in r}


def changes(folder, step):
    return read_info(folder / "checkpoints" / f"step={step:06d}")["progress"]["lr_changes"]


def refused(capsys, code):
    assert code == 2
    return capsys.readouterr().err


def test_keep_refuses_another_rate_and_says_what_could_be_asked(fit, go_on, capsys):
    text = refused(capsys, fit(*RATE))
    assert "model.optimizer.init_args.lr: 0.003 -> 0.001" in text
    assert "--resume_lr override" in text


def test_only_the_rate_may_differ(fit, go_on, capsys):
    text = refused(capsys, fit(*RATE, "--model.init_args.clip_norm", 2, "--resume_lr", "override"))
    assert "model.clip_norm: 1 -> 2" in text
    assert ".lr:" not in text
    assert "--resume_lr" not in text


def test_override_takes_the_new_rate_at_the_global_step(fit, go_on, finished, capsys):
    words = [*RATE, "--resume_lr", "override", *LONGER]
    assert fit(*words) == 0
    out = capsys.readouterr().out
    assert "learning rate: override from step 9 on (model.optimizer.init_args.lr: 0.003 -> 0.001)" in out
    before, after = rates(finished), rates(go_on)
    assert {s: after[s] for s in range(1, 10)} == {s: before[s] for s in range(1, 10)}
    assert {s: after[s] for s in range(10, 13)} == pytest.approx({s: before[s] / 3 for s in range(10, 13)})
    (change,) = changes(go_on, 18)
    assert (change["kind"], change["step"]) == ("override", 9)
    assert change["changes"] == ["model.optimizer.init_args.lr: 0.003 -> 0.001"]


def resumed_at(folder, fit, step, words):
    """The run again, as if it had been killed after the checkpoint of ``step``."""
    shutil.rmtree(folder / "checkpoints" / "step=000018")
    (folder / "DONE").unlink()
    assert (folder / "checkpoints" / f"step={step:06d}").exists()
    assert fit(*words) == 0
    return trajectory(folder)


@pytest.mark.parametrize("kind", ["override", "restart"])
def test_a_repeated_command_changes_nothing_and_later_ones_need_not_ask(fit, go_on, kind, capsys):
    words = [*RATE, "--resume_lr", kind, *LONGER]
    assert fit(*words) == 0
    whole, recorded = trajectory(go_on), changes(go_on, 18)
    assert len(recorded) == 1
    assert resumed_at(go_on, fit, 16, words) == whole  # a scheduler repeats the command
    assert changes(go_on, 18) == recorded
    assert resumed_at(go_on, fit, 16, [*RATE, *LONGER]) == whole  # a person does not
    assert changes(go_on, 18) == recorded
    capsys.readouterr()
    shutil.rmtree(go_on / "checkpoints" / "step=000018")
    assert "0.001 -> 0.003" in refused(capsys, fit(*LONGER))  # the old recipe is another one now


def test_restart_warms_up_again_over_what_remains(fit, go_on, capsys):
    words = ["--resume_lr", "restart", *LONGER]
    config = ["--model.init_args.schedule.init_args.decay", "9 steps"]
    assert fit(*words, *config) == 0
    schedule, length = WarmupCosine("3 steps", "9 steps"), RunLength(9, 128)
    expected = {step + 10: 0.003 * schedule.factor(step, length) for step in range(9)}
    assert {s: r for s, r in rates(go_on).items() if s > 9} == pytest.approx(expected)
    whole = trajectory(go_on)
    capsys.readouterr()
    assert resumed_at(go_on, fit, 16, [*words, *config]) == whole
    assert "the restart begun at step 9 goes on; --resume_lr restart is not applied again" in capsys.readouterr().out


def test_restart_needs_no_change_of_the_recipe(fit, go_on):
    assert fit("--resume_lr", "restart", *LONGER) == 0
    found = rates(go_on)
    assert found[10] == pytest.approx(0.001)
    assert found[12] == pytest.approx(0.003)
    assert [c["kind"] for c in changes(go_on, 18)] == ["restart"]


def test_cool_down_by_its_other_name(fit, go_on, capsys):
    words = ["--resume_lr", "cool_down", "--cool_down", "4 steps", "--checkpoint.every", "2 steps"]
    assert fit(*words) == 0
    found = rates(go_on)
    assert max(found) == 13
    assert [found[s] for s in (10, 11, 12, 13)] == pytest.approx([found[9] * f for f in (0.75, 0.5, 0.25, 0)])
    assert [(c["kind"], c["duration"]) for c in changes(go_on, 13)] == [("cool_down", "4 steps")]


def test_a_fresh_run_has_nothing_to_change(fit, tmp_path, finished):
    assert fit("--resume_lr", "override") == 0
    assert trajectory(tmp_path / "dense") == trajectory(finished)
    assert changes(tmp_path / "dense", 12) == []


# ---- the plan


LENGTH = RunLength(100, 10)
OLD = {"model": {"optimizer": {"init_args": {"lr": 1.0}}}}
NEW = {"model": {"optimizer": {"init_args": {"lr": 2.0}}}}


def steps_through(*launches):
    """Plans of launches one after the other, each from a checkpoint of the one before: (kind, length, step, recipe)."""
    progress = {"trajectory": OLD, "lr_changes": [], "cool_down": None}
    for kind, length, step, recipe in launches:
        plan = plan_rate(kind, None if length is None else Duration.parse(length), step, progress, recipe)
        progress = {"trajectory": recipe, "lr_changes": plan.changes, "cool_down": plan.cool_down}
    return plan


@pytest.mark.parametrize(
    ("launches", "kinds", "restart", "cool_down"),
    [
        ([("override", None, 10, NEW), ("override", None, 20, NEW)], ["override"], None, None),
        ([("override", None, 10, NEW), ("override", None, 20, OLD)], ["override", "override"], None, None),
        ([("restart", None, 10, OLD), ("restart", None, 20, OLD)], ["restart"], 10, None),
        ([("restart", None, 10, OLD), ("restart", None, 20, NEW)], ["restart", "restart"], 20, None),
        ([("restart", None, 10, OLD), ("override", None, 20, OLD)], ["restart", "override"], None, None),
        (
            [("restart", None, 10, OLD), ("keep", "5 steps", 20, OLD), ("keep", None, 22, OLD)],
            ["restart", "cool_down"], 10, (20, "5 steps"),
        ),
        (
            [("keep", "5 steps", 10, OLD), ("cool_down", "9 steps", 12, OLD)],
            ["cool_down"], None, (10, "5 steps"),
        ),
        ([("keep", "5 steps", 10, OLD), ("override", None, 12, OLD)], ["cool_down", "override"], None, None),
        ([("override", None, 10, OLD)], [], None, None),
    ],
)  # fmt: skip
def test_plans(launches, kinds, restart, cool_down):
    plan = steps_through(*launches)
    assert [change["kind"] for change in plan.changes] == kinds
    assert (plan.restart, plan.cool_down) == (restart, cool_down)
    assert plan.end(LENGTH) == (100 if cool_down is None else cool_down[0] + 5)


def test_a_cool_down_of_an_older_version_goes_on():
    progress = {"trajectory": OLD, "cool_down": [10, "5 steps"]}
    assert plan_rate("keep", None, 12, progress, OLD).cool_down == (10, "5 steps")


def test_restart_is_the_schedule_of_a_run_that_begins_there():
    for base in (WarmupCosine("5 steps", None), Constant("5 steps"), WarmupCosine("50 tokens", "200 tokens")):
        again = Restart(base, 40)
        assert [again.factor(s, LENGTH) for s in range(40, 100)] == [
            base.factor(s, RunLength(60, 10)) for s in range(60)
        ]
        end = base.decay_steps(RunLength(60, 10))
        assert again.decay_steps(LENGTH) == (None if end is None else 40 + end)
    cooled = CoolDown(Restart(Constant("5 steps"), 40), 42, "10 steps")
    assert cooled.factor(42, LENGTH) == pytest.approx(0.4 * 0.9)


# ---- the check


@pytest.mark.parametrize(
    ("section", "expected"),
    [
        ({"resume_lr": "cool_down"}, "resume_lr cool_down needs a length - add cool_down: 2000 steps"),
        ({"resume_lr": "restart", "cool_down": "9 steps"}, "cool_down contradicts resume_lr restart - leave one out"),
        ({"resume_lr": "overide"}, "'overide'"),
        ({"stability": {"action": "rolback"}}, "'rolback'"),
        ({"stability": {"skip_steps": [[5, 3]]}}, "skip_steps [5, 3]: steps count from 1, the first before the last"),
        ({"stability": {"skip_steps": [[5]]}}, "skip_steps [5] is not a pair"),
        ({"stability": {"window": 16}}, "stability.window 16 is shorter than min_history 32"),
        ({"stability": {"patience": 0}}, "stability.patience 0 is less than 1"),
        ({"stability": {"loss_threshold": 0}}, "stability.loss_threshold 0 is not positive"),
        ({"stability": {"action": "rollback", "rollback_to": 3}}, "set checkpoint.keep_last to 5"),
    ],
)
def test_mistakes_are_named_before_anything_starts(tmp_path, recipe, section, expected):
    path = write_recipe(tmp_path, recipe() | section)
    problems = [str(problem) for problem in check(path)]
    assert len(problems) == 1, problems
    assert expected in problems[0]


def test_a_good_section_passes(tmp_path, recipe):
    section = {"stability": {"action": "rollback", "patience": 3, "skip_steps": [[3, 5], [8, 8]]}, "resume_lr": "keep"}
    config = yaml.safe_load(yaml.safe_dump(recipe() | section))
    assert check(write_recipe(tmp_path, config)) == []

"""Spikes injected into real runs: what each action leaves behind, also when it is killed halfway."""

from __future__ import annotations

import json
import os
import shutil

import pytest
from helpers import cli, trajectory, write_recipe

from llmrecipes.callbacks.events import read_events
from llmrecipes.checkpoint import read_tensors

STEPS = 24
LATE = pytest.param(True, marks=pytest.mark.release)
QUICK = {"window": 8, "min_history": 4, "patience": 2}


@pytest.fixture
def train(tmp_path, recipe, capsys):
    """``train("name", [14, 15], action="rollback")``: run folder and exit code of a run with poisoned steps."""

    def run(name, steps, *words, factor=8.0, late=False, moe=False, expected=0, **stability):
        config = recipe(moe=moe, steps=STEPS)
        config["name"] = name
        config["model"]["class_path"] = "poison.Poisoned"
        config["model"]["init_args"] |= {"steps": steps, "factor": factor, "late": late}
        config["stability"] = QUICK | stability
        config["checkpoint"] = {"every": "3 steps", "keep_last": 3}
        path = write_recipe(tmp_path, config, f"{name}.yaml")
        code = cli("fit", "--config", path, "--run_root", tmp_path, *words)
        captured = capsys.readouterr()
        assert code == expected, captured.out + captured.err
        (tmp_path / name / "output.txt").write_text(captured.out + captured.err)
        return tmp_path / name

    return run


def output(folder):
    return (folder / "output.txt").read_text()


def records(folder):
    """The trajectory; why a step was passed over depends on who decided it."""
    return [{k: bool(v) if k == "skipped" else v for k, v in r.items()} for r in trajectory(folder)]


def tensors(folder, step=STEPS):
    checkpoint = folder / "checkpoints" / f"step={step:06d}"
    return {part: read_tensors(checkpoint, part) for part in ("model", "optimizer")}


def assert_same_run(a, b):
    assert records(a) == records(b)
    one, two = tensors(a), tensors(b)
    for part in ("model", "optimizer"):
        assert one[part].keys() == two[part].keys()
        assert one[part]
        assert all(one[part][k].equal(two[part][k]) for k in one[part]), part


def kinds(folder):
    return [(e["step"], e["event"]) for e in read_events(folder / "events.jsonl")]


def test_a_healthy_run_is_not_touched(train):
    watched = train("watched", [], action="rollback", non_finite="rollback")
    unwatched = train("unwatched", [], window=8, min_history=8, loss_threshold=1e9, grad_threshold=1e9)
    assert_same_run(watched, unwatched)
    assert not (watched / "events.jsonl").exists()
    assert not (watched / "skipped.json").exists()


def test_warn_tells_and_goes_on(train):
    run = train("run", [14, 15], action="warn")
    assert kinds(run) == [(14, "spike"), (15, "spike")]
    assert "warning: step 14: loss " in output(run)
    assert "step 16: healthy again after 2 bad steps from 14 on" in output(run)
    assert not any("refused" in r or "skipped" in r for r in trajectory(run))
    event = read_events(run / "events.jsonl")[0]
    assert event["loss"] > 20
    assert event["loss_deviations"] > 10
    assert event["in_a_row"] == 1


@pytest.mark.parametrize("late", [False, LATE], ids=["at once", "late"])
def test_skip_step_leaves_the_update_out(train, late):
    run = train("run", [14], action="skip_step", late=late)
    refused = [r["step"] for r in trajectory(run) if r.get("refused")]
    assert refused == [14]
    assert "step 14: loss" in output(run)
    assert "its update is left out (1 in a row)" in output(run)
    # The step counts, its data is consumed, the state is that of a run which never saw the data.
    clean = train("clean", [14], skip_steps=[[14, 14]])
    assert [r for r in records(run) if r["step"] > 14] == [r for r in records(clean) if r["step"] > 14]
    assert all(tensors(run)["model"][k].equal(v) for k, v in tensors(clean)["model"].items())


def test_skip_step_gives_up_when_the_state_is_bad(train):
    run = train("run", [14, 15, 16], action="skip_step", expected=1)
    assert kinds(run)[-1] == (15, "give up")
    last = output(run).splitlines()[-1]
    assert last.startswith("stopped: step 15: loss")
    assert last.endswith(f"The last good checkpoint is {run}/checkpoints/step=000012.")


@pytest.mark.parametrize("late", [False, LATE], ids=["at once", "late"])
@pytest.mark.parametrize("moe", [pytest.param(False, marks=pytest.mark.release), True], ids=["dense", "moe"])
def test_rollback_is_the_clean_run_that_skipped(train, moe, late):
    """Steps 14 and 15 are bad, the last checkpoint is of step 12; none is made of step 15."""
    run = train("run", [14, 15], action="rollback", moe=moe, late=late)
    assert kinds(run) == [(14, "spike"), (15, "spike"), (15, "rollback")]
    clean = train("clean", [14, 15], moe=moe, skip_steps=[[13, 15]])
    assert_same_run(run, clean)
    assert [r["step"] for r in records(run) if "skipped" in r] == [13, 14, 15]
    assert json.loads((run / "skipped.json").read_text())["rollbacks"][0] | {"reason": ""} == {
        "to": 12, "at": 15, "reason": ""
    }  # fmt: skip
    assert f"rollback 1: back to {run}/checkpoints/step=000012; the data of steps 13 to 15 is passed over" in output(
        run
    )


def test_a_rollback_over_a_checkpoint_and_a_validation(train):
    """Patience lets a checkpoint (15) and a validation (16) into the spike: both are set aside."""
    run = train("run", [14, 15, 16, 17], action="rollback", patience=4)
    clean = train("clean", [14, 15, 16, 17], skip_steps=[[13, 17]])
    assert_same_run(run, clean)
    assert (run / "checkpoints" / "quarantined-step=000015" / "manifest.json").exists()
    assert not any(r["step"] == 16 and "val_loss" in r for r in records(run))


def test_the_second_last_checkpoint(train):
    run = train("run", [14, 15], action="rollback", rollback_to=2)
    clean = train("clean", [14, 15], skip_steps=[[10, 15]])
    assert_same_run(run, clean)


def test_two_rollbacks_then_it_gives_up(train):
    run = train("run", [9, 10, 15, 16, 20, 21], action="rollback", max_rollbacks=2, expected=1)
    assert [k for k in kinds(run) if k[1] in ("rollback", "give up")] == [
        (10, "rollback"), (16, "rollback"), (21, "give up")
    ]  # fmt: skip
    last = output(run).splitlines()[-1]
    assert "rolled back 2 times already (stability.max_rollbacks)" in last
    assert last.endswith(f"The last good checkpoint is {run}/checkpoints/step=000018.")
    twice = train("twice", [9, 10, 15, 16], action="rollback", max_rollbacks=2)
    clean = train("clean", [9, 10, 15, 16], skip_steps=[[9, 10], [13, 16]])  # step 8 was the best so far and saved
    assert_same_run(twice, clean)


def test_nowhere_to_go_back_to(train):
    words = ["--checkpoint.every", "9 steps", "--checkpoint.keep_best", "false"]
    run = train("run", [6, 7], *words, action="rollback")
    assert "no whole checkpoint from before step 6 to go back to" in output(run)
    assert not (run / "skipped.json").exists()
    run = train("nan", [6], *words, factor=float("nan"), non_finite="rollback", expected=1)
    assert "holds no checkpoint from before it." in output(run).splitlines()[-1]


@pytest.mark.parametrize("late", [False, LATE], ids=["at once", "late"])
def test_not_finite(train, late):
    stopped = train("stopped", [14], factor=float("nan"), late=late, expected=1)
    assert output(stopped).splitlines()[-1].startswith("stopped: step 14: gradient norm is nan, loss is nan; the step")
    run = train("skipped", [14], factor=float("nan"), late=late, non_finite="skip_step")
    clean = train("clean", [14], factor=float("nan"), skip_steps=[[14, 14]])
    assert [r for r in records(run) if r["step"] > 14] == [r for r in records(clean) if r["step"] > 14]
    (bad,) = [r for r in records(run) if r.get("refused")]
    assert bad["step"] == 14
    assert bad["loss"] is None
    back = train("back", [14], factor=float("nan"), late=late, non_finite="rollback")
    clean = train("further", [14], factor=float("nan"), skip_steps=[[13, 14]])
    assert_same_run(back, clean)


POINTS = (
    "append_event", "write_rollbacks", "quarantine", "point_latest", "rewind", "go_back",
    "step 15", "step 16", "step 17", "step 18",
)  # fmt: skip


def die_after(monkeypatch, point):
    """Let this process end, as ``kill -9`` would, right after ``point``."""
    from llmrecipes.callbacks import Logging
    from llmrecipes.checkpoint.callback import Checkpoints
    from llmrecipes.run import rollback

    if point.startswith("step"):
        owner, name = Logging, "on_train_batch_end"
    else:
        owner, name = {"rewind": (Logging, "rewind"), "go_back": (Checkpoints, "go_back")}.get(point, (rollback, point))
    real = getattr(owner, name)

    def deadly(*args):
        result = real(*args)
        if not point.startswith("step") or args[1].global_step == int(point.split()[1]):
            os._exit(9)
        return result

    monkeypatch.setattr(owner, name, deadly)


@pytest.fixture(scope="module")
def references():
    """Runs that the tests of all points compare with, made by the first of them."""
    return {}


# In make test: before the decision is on record, after it, after the files, and while the steps are done again.
QUICK_POINTS = ("append_event", "write_rollbacks", "go_back", "step 16")


@pytest.mark.parametrize(
    "point", [pytest.param(point, marks=[pytest.mark.release] * (point not in QUICK_POINTS)) for point in POINTS]
)
def test_killed_in_or_after_a_rollback_and_resumed(train, tmp_path, point, references):
    spike = {"action": "rollback", "patience": 3}
    kill(train, point, "run", [14, 15, 16], **spike)
    run = tmp_path / "run"
    train("run", [14, 15, 16], **spike)
    if not references:
        references["whole"] = train("whole", [14, 15, 16], **spike)
        references["clean"] = train("clean", [14, 15, 16], skip_steps=[[13, 16]])
    whole, clean = references["whole"], references["clean"]
    assert_same_run(run, whole)
    assert trajectory(run) == trajectory(whole)
    assert_same_run(run, clean)
    assert read_events(run / "events.jsonl") == read_events(whole / "events.jsonl")
    assert len(POINTS) == 10


def kill(train, point, name, steps, **spike):
    """Train until ``point`` in a process of its own, which dies there."""
    pid = os.fork()
    if pid == 0:
        try:
            with pytest.MonkeyPatch.context() as patch:
                die_after(patch, point)
                train(name, steps, **spike)
        finally:
            os._exit(1)
    assert os.waitstatus_to_exitcode(os.waitpid(pid, 0)[1]) == 9


def test_mutant_that_forgets_what_skipped_json_distrusts(train, tmp_path, monkeypatch):
    from llmrecipes.run import folder

    spike = {"action": "rollback", "patience": 3}
    monkeypatch.setattr(folder, "finish_rollbacks", lambda run: None)
    kill(train, "write_rollbacks", "run", [14, 15, 16], **spike)
    train("run", [14, 15, 16], **spike)
    assert records(tmp_path / "run") != records(train("whole", [14, 15, 16], **spike))


def test_mutant_that_does_not_restore_the_optimizer(train, monkeypatch):
    from llmrecipes.checkpoint import callback

    clean = train("clean", [14, 15], skip_steps=[[13, 15]])
    monkeypatch.setattr(callback, "load_optimizer", lambda *arguments: None)
    assert records(train("run", [14, 15], action="rollback")) != records(clean)


def test_a_resumed_run_judges_as_the_uninterrupted_one(train, tmp_path, monkeypatch):
    """Killed just before the spike, the history comes from the checkpoint; the mutant forgets it and sees nothing."""
    from llmrecipes.callbacks import StabilityGuard

    whole = train("whole", [14], action="skip_step")
    for name in ("good", "mutant"):
        kill(train, "step 13", name, [14], action="skip_step")
        if name == "mutant":
            monkeypatch.setattr(StabilityGuard, "_know", lambda self, knowledge: None)
        train(name, [14], action="skip_step")
    assert_same_run(tmp_path / "good", whole)
    assert records(tmp_path / "mutant") != records(whole)


def test_skip_steps_that_come_too_late_are_named(train):
    train("run", [], "--trainer.max_steps", 12)
    words = ["--resume_lr", "override"]  # the schedule ends with the run
    run = train("run", [], *words, skip_steps=[[2, 4], [11, 14], [20, 21]])
    text = output(run)
    assert "stability.skip_steps [2, 4]: 12 steps were trained without it: no effect" in text
    assert "stability.skip_steps [11, 14]: 12 steps were trained without it: steps 13 to 14 will be passed over" in text
    assert "[20, 21]:" not in text
    assert [r["step"] for r in records(run) if "skipped" in r] == [13, 14, 20, 21]
    shutil.rmtree(run / "checkpoints" / "step=000024")
    (run / "DONE").unlink()
    again = train("run", [], *words, skip_steps=[[2, 4], [11, 14], [20, 21]])
    assert "[20, 21]:" not in output(again)  # it was known when they were passed over

"""The run folder: one owner, what is recorded at each launch, stepping aside."""

from __future__ import annotations

import copy
import json
import os
import signal
import subprocess
import sys
import time
from dataclasses import asdict

import pytest
import torch
from helpers import REPOSITORY

from llmrecipes.checkpoint import TrainingState, write_checkpoint
from llmrecipes.errors import UserError
from llmrecipes.recipe import ModelConfig
from llmrecipes.run import environment as environment_module
from llmrecipes.run.environment import git_state, record_launch
from llmrecipes.run.folder import decide_resume, lock, mark_done


def test_lock_is_released_with_its_owner_and_names_it(tmp_path):
    owner = lock(tmp_path / "run")
    assert (tmp_path / "run" / ".lock").read_text() == str(os.getpid())
    with pytest.raises(UserError, match=rf"belongs to process {os.getpid()}, which trains there; stop it"):
        lock(tmp_path / "run")
    owner.close()
    lock(tmp_path / "run").close()


def test_lock_of_another_process_dies_with_kill_9(tmp_path):
    pid = os.fork()
    if pid == 0:
        try:
            owner = lock(tmp_path / "run")
            (tmp_path / "ready").touch()
            time.sleep(60)
            owner.close()
        finally:
            os._exit(1)
    try:
        end = time.monotonic() + 30
        while not (tmp_path / "ready").exists():
            assert time.monotonic() < end
            time.sleep(0.01)
        with pytest.raises(UserError, match=f"belongs to process {pid}"):
            lock(tmp_path / "run")
    finally:
        os.kill(pid, signal.SIGKILL)
        os.waitpid(pid, 0)
    lock(tmp_path / "run").close()


def test_required_makes_no_folder_when_there_is_nothing(tmp_path):
    with pytest.raises(UserError, match="nothing to resume from"):
        lock(tmp_path / "run", must_hold_checkpoints=True)
    assert not (tmp_path / "run").exists()


@pytest.mark.parametrize("content", [None, "", "[{"])
def test_each_launch_is_added_also_after_a_torn_write(tmp_path, content):
    if content is not None:
        (tmp_path / "environment.json").write_text(content)
    for launch in (1, 2):
        record_launch(tmp_path, f"seed: {launch}\n")
        launches = json.loads((tmp_path / "environment.json").read_text(encoding="utf-8"))
        assert len(launches) == launch
        assert (tmp_path / "recipe.yaml").read_text() == f"seed: {launch}\n"
    assert launches[-1]["packages"]["torch"].startswith("2.")
    assert sorted(p.name for p in tmp_path.iterdir()) == ["environment.json", "recipe.yaml"]


def test_git_state(tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    assert git_state() is None  # outside a repository
    git = ["git", "-c", "user.name=t", "-c", "user.email=t@t"]
    for words in (["init", "-q"], ["commit", "-q", "--allow-empty", "-m", "first"]):
        subprocess.run([*git, *words], check=True, cwd=tmp_path)
    state = git_state()
    assert len(state["commit"]) == 40
    assert state["changed"] == []
    (tmp_path / "new.py").touch()
    assert git_state()["changed"] == ["?? new.py"]
    monkeypatch.setenv("PATH", "")  # no git installed
    assert git_state() is None


def test_the_command_is_recorded_without_the_folder_of_the_program(monkeypatch):
    monkeypatch.setattr(sys, "argv", ["/somewhere/bin/llmrecipes", "fit", "--config", "r.yaml"])
    assert environment_module.environment()["command"] == ["llmrecipes", "fit", "--config", "r.yaml"]


def test_never_steps_aside_as_often_as_asked(tmp_path):
    for content in "abc":
        (tmp_path / "metrics.jsonl").write_text(content)
        mark_done(tmp_path, 3)
        assert decide_resume(tmp_path, "never", {}) is None
        assert not (tmp_path / "metrics.jsonl").exists()
        assert not (tmp_path / "DONE").exists()
    kept = sorted(path.read_text() for path in tmp_path.glob("before-*/metrics.jsonl"))
    assert kept == ["a", "b", "c"]
    assert decide_resume(tmp_path, "never", {}) is None  # nothing to move
    assert len(list(tmp_path.glob("before-*"))) == 3


def test_helpers_find_the_repository():
    assert (REPOSITORY / "pyproject.toml").is_file()


def test_a_checkpoint_of_a_version_without_an_option_goes_on(tmp_path):
    """And one that was trained with another value of it does not."""
    present = {"model": {"config": asdict(ModelConfig(vocab_size=9, dim=8, num_layers=1, num_heads=1, ffn_dim=8))}}
    recorded = copy.deepcopy(present)
    for name in ("norm_position", "rotary_fraction", "logit_divisor"):
        del recorded["model"]["config"][name]
    info = {"progress": {"trajectory": recorded, "consumed_tokens": 0}}
    tensors = {"x": torch.zeros(1)}
    write_checkpoint(tmp_path / "checkpoints", TrainingState(3, tensors, tensors, tensors, info))
    resume = decide_resume(tmp_path, "auto", present)
    assert resume.step == 3 and resume.progress["trajectory"] == present
    present["model"]["config"]["rotary_fraction"] = 0.5
    with pytest.raises(UserError) as caught:
        decide_resume(tmp_path, "auto", present)
    assert "  model.config.rotary_fraction: 1 -> 0.5" in caught.value.problems

"""Saving while training goes on: the file holds the moment of the call, and failures come back to all ranks."""

from __future__ import annotations

import threading
import time

import pytest
import torch
import torch.distributed as dist
from meshes import join, net, train
from ranks import run_ranks
from states import Saboteur, disk_full, small_state

from llmrecipes.checkpoint import CheckpointError, TrainingState, newest_whole, write_checkpoint
from llmrecipes.checkpoint.background import BackgroundSave
from llmrecipes.checkpoint.ranks import rank
from llmrecipes.checkpoint.state import optimizer_state, rng_state


def everything(folder):
    return {str(path.relative_to(folder)): path.read_bytes() for path in folder.rglob("*") if path.is_file()}


def writer(root, before=lambda: None):
    def write(state, group):
        before()
        write_checkpoint(root, state, group=group)

    return write


def test_the_file_holds_the_moment_of_the_call(tmp_path):
    """What changes after start() is not in it; a mutant without the copy is noticed."""
    changed = threading.Event()
    write_checkpoint(tmp_path / "expected", small_state())
    expected = everything(tmp_path / "expected")
    for name, start in (
        ("copied", BackgroundSave.start),
        ("mutant", lambda save, state, write: BackgroundSave.start(save, TrainingState(3, {}, {}, state.rng), write)),
    ):
        changed.clear()
        save, state = BackgroundSave(), small_state()
        root = tmp_path / name
        if name == "mutant":
            start(save, state, lambda _, group, s=state, r=root: (changed.wait(), write_checkpoint(r, s)))
        else:
            start(save, state, writer(root, changed.wait))
        assert save.in_flight
        for tensor in (*state.model.values(), *state.optimizer.values()):
            tensor.fill_(5)
        changed.set()
        save.finish()
        assert not save.in_flight
        found = everything(root)
        rng = "step=000003/rng-00000.safetensors"
        found[rng] = expected[rng]  # of another moment
        same = {k: v == expected[k] for k, v in found.items() if "manifest" not in k}
        assert all(same.values()) == (name == "copied"), same


def test_buffers_are_made_once(tmp_path):
    save, seen = BackgroundSave(), []
    for step in (3, 4):
        save.start(small_state(step), lambda state, group: seen.append(state))
        save.finish()
    first, second = ([t.data_ptr() for t in s.model.values() if t.numel()] for s in seen)
    assert first == second
    assert len(first) == 6
    save.start(TrainingState(5, {"fp32": torch.ones(9)}, {}, {}), lambda state, group: seen.append(state))
    save.finish()
    assert seen[-1].model["fp32"].shape == (9,)  # another shape is not forced into the old room


def test_the_next_one_waits_and_a_failure_is_raised_once(tmp_path, monkeypatch):
    save, order = BackgroundSave(), []
    for n in range(3):
        save.start(small_state(n), lambda state, group: (time.sleep(0.02), order.append(state.step)))
    save.finish()
    assert order == [0, 1, 2]
    with monkeypatch.context() as patch:
        Saboteur(patch, 5, disk_full)
        save.start(small_state(6), writer(tmp_path))
        with pytest.raises(CheckpointError, match="No space left"):
            save.finish()
    save.finish()
    save.poll()
    assert list(tmp_path.iterdir()) == []
    save.start(small_state(7), writer(tmp_path))
    save.finish()
    assert newest_whole(tmp_path)[0].name == "step=000007"


def train_and_save(root, fail_on):
    """The thread's collectives and the training's run side by side."""
    model, optimizer = net("full-2", seed=1)
    train(model, optimizer, 1)
    save, raised_at = BackgroundSave(), None

    def wait():
        if rank() == 1:
            time.sleep(0.2)  # its thread is later: rank 0 must not notice the failure a step earlier
        if rank() == fail_on:
            raise CheckpointError("the disk is full")

    def write(state, group):
        from llmrecipes.checkpoint.ranks import together

        together(wait, "writing failed", group)
        write_checkpoint(root, state, group=group)

    state = TrainingState(1, dict(model.state_dict()), optimizer_state(model, optimizer), rng_state())
    save.start(state, write)
    steps_meanwhile = 0
    for step in range(2, 10_000):
        train(model, optimizer, 1)
        try:
            save.poll()
        except CheckpointError as error:
            raised_at = (step, str(error))
        if not save.in_flight:
            break
        steps_meanwhile += 1
    return step, steps_meanwhile, raised_at


@pytest.mark.parametrize("fail_on", [None, 0, 1])
def test_all_ranks_learn_the_outcome_at_the_same_step(tmp_path, fail_on):
    first, second = run_ranks(2, train_and_save, tmp_path, fail_on)
    assert first == second
    _, steps_meanwhile, raised_at = first
    assert steps_meanwhile >= 1
    if fail_on is None:
        assert raised_at is None
        assert newest_whole(tmp_path)[0].name == "step=000001"
    else:
        assert raised_at[1] == f"the disk is full (rank {fail_on})"
        assert list(tmp_path.iterdir()) == []


def save_both_ways(root):
    model, optimizer = net("full-2", seed=1)
    train(model, optimizer, 2)
    torch.manual_seed(3)
    state = TrainingState(2, dict(model.state_dict()), optimizer_state(model, optimizer), rng_state())
    write_checkpoint(root / "now", state)
    save = BackgroundSave()
    save.start(state, writer(root / "meanwhile"))
    with torch.no_grad():
        for parameter in model.parameters():
            parameter.zero_()
    save.finish()
    dist.barrier()


def test_sharded_the_same_files_either_way(tmp_path):
    run_ranks(2, save_both_ways, tmp_path)
    now, meanwhile = everything(tmp_path / "now"), everything(tmp_path / "meanwhile")
    assert now == meanwhile
    assert len(now) == 8


def abandoned(root):
    join()
    save, go_on = BackgroundSave(), threading.Event()
    save.start(small_state(), lambda state, group: go_on.wait(30))
    started = time.monotonic()
    save.abandon(seconds=0.1)
    go_on.set()
    return save.in_flight, time.monotonic() - started


def test_a_failing_process_does_not_wait_for_ever(tmp_path):
    for in_flight, seconds in run_ranks(2, abandoned, tmp_path):
        assert not in_flight
        assert seconds < 5

"""One rank fails, all ranks know, nobody waits, nothing is left behind, what was there before stays."""

from __future__ import annotations

import multiprocessing
import os
import signal
import time

import pytest
import torch.distributed as dist
from meshes import join, placed_tensors
from ranks import free_port, rank_environment, run_ranks
from states import Saboteur, disk_full, kill_9

from llmrecipes.checkpoint import CheckpointError, TrainingState, checkpoints, newest_whole, verify, write_checkpoint
from llmrecipes.checkpoint.ranks import rank, ranks, together
from llmrecipes.checkpoint.shards import local
from llmrecipes.checkpoint.state import rng_state


def test_alone_it_is_a_plain_call():
    assert (rank(), ranks()) == (0, 1)
    assert together(lambda: 5, "counting failed") == [5]
    with pytest.raises(CheckpointError, match=r"^counting failed: no more fingers$") as caught:
        together(lambda: _raise(OSError("no more fingers")), "counting failed")
    assert isinstance(caught.value.__cause__, OSError)
    with pytest.raises(AssertionError, match="our bug"):
        together(lambda: _raise(AssertionError("our bug")), "counting failed")


def _raise(error):
    raise error


def outcomes():
    """What each of three ranks sees of actions that fail on some of them."""
    join()
    me, seen = rank(), []
    for failing, error in (
        ([], None),
        ([1], OSError("disk")),
        ([0, 2], CheckpointError("step 3 is not saved")),
        ([0, 1, 2], OSError("disk")),
        ([2], AssertionError("our bug")),
    ):
        try:
            seen.append(together(lambda me=me, f=failing, e=error: _raise(e) if me in f else me, "writing failed"))
        except (CheckpointError, AssertionError) as caught:
            seen.append(f"{type(caught).__name__}: {caught}")
    return seen


def test_everybody_returns_or_everybody_raises():
    results = run_ranks(3, outcomes)
    for number, seen in enumerate(results):
        ours = "AssertionError: our bug"
        bug = ours if number == 2 else f"CheckpointError: writing failed: {ours} (rank 2)"
        assert seen == [
            [0, 1, 2],
            "CheckpointError: writing failed: disk (rank 1)",
            "CheckpointError: step 3 is not saved (rank 0, and also on rank 2)",
            "CheckpointError: writing failed: disk (rank 0, and also on ranks 1, 2)",
            bug,
        ]


def state(step):
    tensors = placed_tensors("full-2")
    return TrainingState(step, tensors, {f"{n}.exp_avg": t * 2 for n, t in tensors.items()}, rng_state(), {"a": 1})


def everything(folder):
    return {str(path.relative_to(folder)): path.read_bytes() for path in folder.rglob("*") if path.is_file()}


def fail_at_every_write_of(root, victim):
    """Both ranks save again and again; the victim's n-th write fails, for every n."""
    join()
    older = write_checkpoint(root, state(3))
    dist.barrier()
    before, messages = everything(root), []
    for at in range(1, 100):
        with pytest.MonkeyPatch.context() as patch:
            saboteur = Saboteur(patch, at if rank() == victim else 0, disk_full)
            try:
                write_checkpoint(root, state(6), {"metrics.jsonl": b"{}\n"})
                messages.append(None)
            except CheckpointError as error:
                messages.append(str(error))
        dist.barrier()
        last = rank() == victim and saboteur.count < at
        (done,) = broadcast(last, victim)
        if done:
            return messages
        if "rename" in (saboteur.calls[-2:-1] or [""]) and messages[-1]:  # the last fsync, after the rename
            assert newest_whole(root)[0].name == "step=000006"
        elif rank() == 0:
            assert everything(root) == before, saboteur.calls
            assert [path.name for path in root.iterdir()] == [older.name]
        dist.barrier()
    raise AssertionError("no end")


def broadcast(value, source):
    values = [value]
    dist.broadcast_object_list(values, src=source)
    return values


@pytest.mark.parametrize(("victim", "writes"), [(1, 15), (0, 35)])
def test_a_failing_write_of_one_rank_is_an_error_on_all(tmp_path, victim, writes):
    first, second = run_ranks(2, fail_at_every_write_of, tmp_path / "checkpoints", victim)
    assert first == second
    assert first.pop() is None
    assert len(first) >= writes
    expected = f"step=000006 failed: [Errno 28] No space left on device (rank {victim})"
    assert all(message.endswith(expected) for message in first), first
    assert verify(tmp_path / "checkpoints" / "step=000006") is None


def save_not_finite(root, name, part):
    join()
    bad = state(6)
    if rank() == 1:
        local(getattr(bad, part)[name]).view(-1)[-1] = float("nan")
    with pytest.raises(CheckpointError) as caught:
        write_checkpoint(root, bad)
    return str(caught.value)


@pytest.mark.parametrize(
    ("part", "name"), [("model", "even"), ("optimizer", "experts.exp_avg"), ("model", "plain.bias")]
)
def test_what_is_not_finite_on_one_rank_is_refused_by_all(tmp_path, part, name):
    root = tmp_path / "checkpoints"
    messages = run_ranks(2, save_not_finite, root, name, part)
    assert messages == [f"step 6 is not saved: {name} is not finite (rank 1)"] * 2
    assert not root.exists()


def save_and_flip(root, victim):
    """A disk under one rank that keeps other bytes than it was given."""
    join()
    fsync = os.fsync

    def flip(descriptor):
        fsync(descriptor)
        path = os.readlink(f"/proc/self/fd/{descriptor}")
        if rank() == victim and "/optimizer/shard" in path:
            with open(path, "r+b") as file:
                file.seek(-1, os.SEEK_END)
                file.write(b"\xff")

    os.fsync = flip
    with pytest.raises(CheckpointError) as caught:
        write_checkpoint(root, state(6))
    return str(caught.value)


@pytest.mark.parametrize("victim", [0, 1])
def test_every_rank_reads_back_what_it_wrote(tmp_path, victim):
    messages = run_ranks(2, save_and_flip, tmp_path, victim)
    reason = f"optimizer/shard-{victim:05d}.safetensors has a wrong checksum (rank {victim})"
    assert messages[0] == messages[1]
    assert messages[0].endswith(f"reads back differently from what was written: {reason}")
    assert list(tmp_path.iterdir()) == []


def save_beside_the_dying(root, victim, at):
    join()
    write_checkpoint(root, state(3))
    dist.barrier()
    if rank() == victim:
        Saboteur(pytest.MonkeyPatch(), at, kill_9)
    started = time.monotonic()
    try:
        write_checkpoint(root, state(6))
    except CheckpointError as error:
        (root.parent / "seen").write_text(str(error))
    (root.parent / "seconds").write_text(str(time.monotonic() - started))


@pytest.mark.parametrize(("victim", "at"), [(1, 1), (1, 4), (1, 9), (0, 2), (0, 12)])
def test_a_rank_killed_while_saving_is_an_error_on_the_others_and_no_wait(tmp_path, victim, at):
    root, port = tmp_path / "checkpoints", free_port()

    def child(number):
        os.environ.update(rank_environment(number, 2, port))
        save_beside_the_dying(root, victim, at)
        os._exit(0)

    processes = [multiprocessing.get_context("fork").Process(target=child, args=(n,)) for n in range(2)]
    for process in processes:
        process.start()
    for process in processes:
        process.join(60)
    assert [p.exitcode for p in processes] == [-signal.SIGKILL if n == victim else 0 for n in range(2)]
    seen = (tmp_path / "seen").read_text()
    assert "step=000006 failed: another process does not answer" in seen
    assert float((tmp_path / "seconds").read_text()) < 20
    assert newest_whole(root) == (root / "step=000003", [])
    assert [path.name for path in checkpoints(root)] == ["step=000003"]

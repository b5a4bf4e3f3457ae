"""Which checkpoints stay, and what happens when deleting one is cut short."""

from __future__ import annotations

import os
import shutil
import signal

import pytest
from states import Saboteur, kill_9, small_state

from llmrecipes.checkpoint import (
    checkpoints,
    newest_whole,
    quarantine,
    retention,
    verify,
    whole_checkpoints,
    write_checkpoint,
)
from llmrecipes.checkpoint.files import checkpoint_name
from llmrecipes.checkpoint.retention import point_latest, purge, remove_leftovers, set_aside_after


def fake(root, *steps):
    for step in steps:
        (root / checkpoint_name(step)).mkdir()
        (root / checkpoint_name(step) / "manifest.json").write_text("{}")


def steps(root):
    return [int(path.name.partition("=")[2]) for path in checkpoints(root)]


@pytest.mark.parametrize(
    ("keep_last", "keep_every", "protected", "kept"),
    [
        (1, None, [], [900]),
        (2, None, [], [800, 900]),
        (2, None, [300], [300, 800, 900]),
        (2, None, [-1], [800, 900]),
        (1, 400, [], [400, 800, 900]),
        (1, 400, [100], [100, 400, 800, 900]),
        (3, 1000, [700], [700, 800, 900]),
        (20, None, [], [100, 200, 300, 400, 500, 600, 700, 800, 900]),
    ],
)
def test_purge_keeps_the_newest_the_multiples_and_the_best(tmp_path, keep_last, keep_every, protected, kept):
    fake(tmp_path, *range(100, 1000, 100))
    removed = purge(tmp_path, keep_last, keep_every, protected)
    assert steps(tmp_path) == kept
    assert len(removed) == 9 - len(kept)
    assert not any(path.exists() for path in removed)
    assert purge(tmp_path, keep_last, keep_every, protected) == []


def test_purge_leaves_what_is_no_checkpoint(tmp_path):
    fake(tmp_path, 1, 2, 3)
    (tmp_path / "validated.json").write_text("{}")
    (tmp_path / "broken-step=000009").mkdir()
    point_latest(tmp_path, tmp_path / "step=000003")
    purge(tmp_path, 1, None, [])
    assert {p.name for p in tmp_path.iterdir()} == {"step=000003", "latest", "validated.json", "broken-step=000009"}


def test_a_removal_cut_short_leaves_no_checkpoint_that_counts(tmp_path, monkeypatch):
    """Killed at every single deletion: the folder either verifies or has no manifest any more."""
    outcomes = set()
    for at in range(1, 30):
        root = tmp_path / str(at)
        for step in (3, 6):
            write_checkpoint(root, small_state(step))
        pid = os.fork()
        if pid == 0:
            try:
                Saboteur(monkeypatch, at, kill_9, [(os, "unlink"), (os, "rmdir")])
                purge(root, 1, None, [])
            finally:
                os._exit(0)
        code = os.waitstatus_to_exitcode(os.waitpid(pid, 0)[1])
        old = root / "step=000003"
        outcomes.add("gone" if not old.exists() else "whole" if verify(old) is None else verify(old))
        assert newest_whole(root) == (root / "step=000006", [])
        if code == 0:
            break
        assert code == -signal.SIGKILL
    assert at >= 6
    assert outcomes == {"whole", "manifest.json is missing", "gone"}


def test_latest_is_moved_in_one_stroke(tmp_path):
    fake(tmp_path, 1, 2)
    for step in (1, 2):
        point_latest(tmp_path, tmp_path / checkpoint_name(step))
        assert os.readlink(tmp_path / "latest") == checkpoint_name(step)
    assert (tmp_path / "latest" / "manifest.json").exists()
    assert steps(tmp_path) == [1, 2]  # the link itself is none
    shutil.rmtree(tmp_path / checkpoint_name(2))
    point_latest(tmp_path, tmp_path / checkpoint_name(1))  # also over a dangling link
    assert (tmp_path / "latest").exists()


def test_leftovers_of_killed_writers_are_removed(tmp_path):
    fake(tmp_path, 1)
    for name in (".tmp-step=000002-77", ".old-step=000001-77"):
        (tmp_path / name).mkdir()
        (tmp_path / name / "model.safetensors").write_bytes(b"half")
    remove_leftovers(tmp_path)
    assert [p.name for p in tmp_path.iterdir()] == ["step=000001"]
    remove_leftovers(tmp_path / "absent")


def test_broken_later_ones_no_longer_count_as_the_newest(tmp_path):
    """Else ``keep_last: 1`` would keep a broken checkpoint of the lost future and delete the good one."""
    for step in (3, 6, 9):
        write_checkpoint(tmp_path, small_state(step))
    (tmp_path / "step=000009" / "model" / "shard-00000.safetensors").unlink()
    path, _ = newest_whole(tmp_path)
    assert path.name == "step=000006"
    set_aside_after(tmp_path, 6)
    write_checkpoint(tmp_path, small_state(7))
    purge(tmp_path, 1, None, [])
    assert steps(tmp_path) == [7]
    assert newest_whole(tmp_path) == (tmp_path / "step=000007", [])
    assert (tmp_path / "broken-step=000009").is_dir()
    fake(tmp_path, 9)
    set_aside_after(tmp_path, 7)  # a second one of that name
    assert steps(tmp_path) == [7]


def test_quarantined_ones_never_count_and_are_never_overwritten(tmp_path):
    for step in (3, 6, 9, 12):
        write_checkpoint(tmp_path, small_state(step))
    renamed = quarantine(tmp_path, 6)
    assert [path.name for path in renamed] == ["quarantined-step=000009", "quarantined-step=000012"]
    assert all(verify(path) is None for path in renamed)  # there to be looked at
    assert steps(tmp_path) == [3, 6]
    assert newest_whole(tmp_path) == (tmp_path / "step=000006", [])
    fake(tmp_path, 9)
    assert quarantine(tmp_path, 6) == [tmp_path / "quarantined-step=000009.2"]
    fake(tmp_path, 9, 20)
    purge(tmp_path, 1, None, [])
    set_aside_after(tmp_path, 20)
    remove_leftovers(tmp_path)
    assert quarantine(tmp_path, 20) == []
    assert {p.name for p in tmp_path.iterdir()} == {
        "quarantined-step=000009",
        "quarantined-step=000009.2",
        "quarantined-step=000012",
        "step=000020",
    }


def test_whole_ones_newest_first_and_none_verified_before_its_turn(tmp_path, monkeypatch):
    for step in (3, 6, 9, 12):
        write_checkpoint(tmp_path, small_state(step))
    (tmp_path / "step=000009" / "state.json").unlink()
    asked = []
    monkeypatch.setattr(retention, "verify", lambda path: asked.append(path.name) or verify(path))
    found = whole_checkpoints(tmp_path)
    assert next(found) == tmp_path / "step=000012"
    assert asked == ["step=000012"]
    assert list(found) == [
        f"{tmp_path}/step=000009 is broken and passed over: state.json is missing",
        tmp_path / "step=000006",
        tmp_path / "step=000003",
    ]
    assert newest_whole(tmp_path, before=12)[0] == tmp_path / "step=000006"
    assert newest_whole(tmp_path, before=6) == (tmp_path / "step=000003", [])
    assert newest_whole(tmp_path, before=3) == (None, [])

"""A checkpoint is written whole or not at all, and says why it is not whole."""

from __future__ import annotations

import json
import os
import re
import shutil
import signal

import pytest
import torch
from helpers import REPOSITORY
from states import Saboteur, disk_full, kill_9, small_state

from llmrecipes.checkpoint import (
    CheckpointError,
    TrainingState,
    checkpoints,
    newest_whole,
    read_checkpoint,
    verify,
    write_checkpoint,
)
from llmrecipes.checkpoint.files import checkpoint_name, step_of

METRICS = {"metrics.jsonl": b'{"step": 1}\n'}


def everything(folder):
    return {path.relative_to(folder): path.read_bytes() for path in folder.rglob("*") if path.is_file()}


def test_round_trip_of_every_kind_of_tensor(tmp_path):
    state = small_state(step=625)
    path = write_checkpoint(tmp_path / "checkpoints", state)
    assert path.name == "step=000625"
    assert verify(path) is None
    back = read_checkpoint(path)
    assert (back.step, back.info) == (625, state.info)
    seen = 0
    for part in ("model", "optimizer", "rng"):
        before, after = getattr(state, part), getattr(back, part)
        assert before.keys() == after.keys()
        for name, tensor in before.items():
            assert after[name].dtype == tensor.dtype, name
            assert after[name].shape == tensor.shape, name
            assert torch.equal(after[name], tensor), name
            seen += 1
    assert seen == len(state.model) + 3 + len(state.rng) >= 14
    assert back.optimizer["fp32.step"].ndim == 0
    assert back.model["bf16"].dtype == torch.bfloat16


def test_attachments_are_part_of_it(tmp_path):
    path = write_checkpoint(tmp_path / "c", small_state(), attachments={"metrics.jsonl": b'{"step": 1}\n'})
    assert (path / "metrics.jsonl").read_text() == '{"step": 1}\n'
    assert "metrics.jsonl" in json.loads((path / "manifest.json").read_text())["files"]
    (path / "metrics.jsonl").write_text('{"step": 2}\n')
    assert verify(path) == "metrics.jsonl has a wrong checksum"


def count_writes(tmp_path, monkeypatch):
    with monkeypatch.context() as patch:
        saboteur = Saboteur(patch, 0, disk_full)
        write_checkpoint(tmp_path / "dry", small_state(), attachments=METRICS)
    assert set(saboteur.calls) == {"put", "fsync", "mkdir", "open", "rename"}
    shutil.rmtree(tmp_path / "dry")
    return saboteur.calls


def test_failing_at_any_write_leaves_the_older_one_and_nothing_else(tmp_path, monkeypatch):
    calls = count_writes(tmp_path, monkeypatch)
    root = tmp_path / "checkpoints"
    older = write_checkpoint(root, small_state(3))
    before, refused = everything(root), 0
    for at in range(1, len(calls) + 1):
        with monkeypatch.context() as patch:
            Saboteur(patch, at, disk_full)
            with pytest.raises(CheckpointError, match=r"step=000006 failed: .*No space left on device"):
                write_checkpoint(root, small_state(6), attachments=METRICS)
        if at == len(calls):  # the folder's own fsync, after the rename: all of it is there
            assert calls[-1] == "fsync"
            assert newest_whole(root) == (root / "step=000006", [])
            continue
        assert everything(root) == before, calls[at - 1]
        assert [p.name for p in root.iterdir()] == [older.name], calls[at - 1]
        assert newest_whole(root) == (older, [])
        refused += 1
    assert refused == len(calls) - 1 >= 45


def test_failing_while_the_same_step_is_written_again_keeps_the_first(tmp_path, monkeypatch):
    root = tmp_path / "checkpoints"
    first = small_state(3)
    path = write_checkpoint(root, first)
    again = TrainingState(3, {"other": torch.ones(2)}, {}, first.rng)
    for at in range(1, 100):
        with monkeypatch.context() as patch:
            saboteur = Saboteur(patch, at, disk_full)
            try:
                write_checkpoint(root, again)
            except CheckpointError:
                pass
            else:
                assert saboteur.count < at > 30
                break
        assert verify(path) is None
        kept = read_checkpoint(path).model.keys()
        assert kept == (again.model.keys() if saboteur.calls[-2:] == ["rename", "fsync"] else first.model.keys())
        shutil.rmtree(root)
        write_checkpoint(root, first)
    assert read_checkpoint(path).model.keys() == {"other"}
    assert [p.name for p in root.iterdir()] == ["step=000003"]


def test_kill_9_at_any_write_leaves_the_older_one(tmp_path, monkeypatch):
    calls = count_writes(tmp_path, monkeypatch)
    root = tmp_path / "checkpoints"
    older = write_checkpoint(root, small_state(3))
    before = everything(older)
    outcomes = []
    for at in range(1, len(calls) + 1):
        pid = os.fork()
        if pid == 0:
            try:
                Saboteur(monkeypatch, at, kill_9)
                write_checkpoint(root, small_state(6), attachments=METRICS)
            finally:
                os._exit(1)
        assert os.waitstatus_to_exitcode(os.waitpid(pid, 0)[1]) == -signal.SIGKILL
        found, broken = newest_whole(root)
        assert broken == []  # never half a checkpoint under a final name
        assert everything(older) == before
        outcomes.append(found.name)
    assert outcomes == ["step=000003"] * (len(calls) - 1) + ["step=000006"]


@pytest.mark.parametrize("value", [float("nan"), float("inf"), -float("inf")])
@pytest.mark.parametrize("part", ["model", "optimizer"])
def test_what_is_not_finite_is_refused(tmp_path, part, value):
    state = small_state(6)
    next(iter(getattr(state, part).values())).view(-1)[-1] = value
    with pytest.raises(CheckpointError, match=r"step 6 is not saved: fp32[.a-z]* is not finite$"):
        write_checkpoint(tmp_path / "checkpoints", state)
    assert not (tmp_path / "checkpoints").exists()


def test_a_full_disk_is_noticed_before_writing(tmp_path, monkeypatch):
    monkeypatch.setattr(shutil, "disk_usage", lambda path: shutil._ntuple_diskusage(100, 90, 10))
    with pytest.raises(CheckpointError, match=r"has 0\.00 GiB free, step 3 needs"):
        write_checkpoint(tmp_path, small_state())
    assert list(tmp_path.iterdir()) == []


def test_what_reads_back_differently_never_gets_its_name(tmp_path, monkeypatch):
    """A disk that stores other bytes than it was given."""
    fsync, flipped = os.fsync, []

    def flip(descriptor):
        fsync(descriptor)
        path = os.readlink(f"/proc/self/fd/{descriptor}")
        if "/model/shard" in path:
            with open(path, "r+b") as file:
                file.seek(-1, os.SEEK_END)
                file.write(b"\xff")
            flipped.append(path)

    monkeypatch.setattr(os, "fsync", flip)
    with pytest.raises(
        CheckpointError, match=r"reads back differently .*model/shard-00000\.safetensors has a wrong checksum$"
    ):
        write_checkpoint(tmp_path, small_state())
    assert len(flipped) == 1
    assert list(tmp_path.iterdir()) == []


def truncate(path):
    path.write_bytes(path.read_bytes()[:-1])


def flip_bit(path):
    data = bytearray(path.read_bytes())
    data[len(data) // 2] ^= 1
    path.write_bytes(data)


def edit_manifest(**changes):
    def edit(path):
        manifest = json.loads(path.read_text()) | changes
        path.write_text(json.dumps(manifest))

    return edit


@pytest.mark.parametrize(
    ("file", "damage", "reason"),
    [
        ("model/shard-00000.safetensors", truncate, r"model/shard-00000.safetensors has \d+ bytes, \d+ were written"),
        ("optimizer/shard-00000.safetensors", flip_bit, "optimizer/shard-00000.safetensors has a wrong checksum"),
        ("model/shard-00000.safetensors", lambda p: p.unlink(), "model/shard-00000.safetensors is missing"),
        ("state.json", flip_bit, "state.json has a wrong checksum"),
        ("rng-00000.safetensors", lambda p: p.unlink(), "rng-00000.safetensors is missing"),
        ("manifest.json", lambda p: p.unlink(), "manifest.json is missing"),
        ("manifest.json", truncate, "manifest.json cannot be read: .*"),
        ("manifest.json", lambda p: p.write_bytes(b"\x80\0"), "manifest.json cannot be read: .*"),
        ("manifest.json", lambda p: p.write_text("[]"), "manifest.json cannot be read: .*"),
        ("manifest.json", lambda p: p.write_text('{"format": 2}'), "manifest.json cannot be read: .*"),
        ("manifest.json", edit_manifest(format=1), r"format 1 is not the one this version reads \(2\)"),
    ],
)
def test_a_broken_one_says_why_and_the_one_before_is_found(tmp_path, file, damage, reason):
    older, newest = (write_checkpoint(tmp_path, small_state(step)) for step in (3, 6))
    damage(newest / file)
    assert re.fullmatch(reason, verify(newest))
    path, broken = newest_whole(tmp_path)
    assert path == older
    assert len(broken) == 1
    assert re.fullmatch(f"{newest} is broken and passed over: {reason}", broken[0])


def test_every_flipped_bit_and_every_cut_is_noticed(tmp_path):
    path = write_checkpoint(tmp_path, small_state())
    seen = 0
    files = [f for f in sorted(path.rglob("*")) if f.is_file() and f.name != "manifest.json"]
    assert len(files) == 4
    for file in files:
        whole = file.read_bytes()
        for position in range(0, len(whole), max(1, len(whole) // 20)):
            damaged = bytearray(whole)
            damaged[position] ^= 0x10
            for content in (bytes(damaged), whole[:position]):
                file.write_bytes(content)
                assert verify(path).startswith(f"{file.relative_to(path)} has ")
                seen += 1
        file.write_bytes(whole)
    assert verify(path) is None
    assert seen > 100


def test_names():
    assert [checkpoint_name(step) for step in (0, 625, 12_345_678)] == ["step=000000", "step=000625", "step=12345678"]
    names = ["step=000625", "step=12345678", "step=", "step=-1", "latest", ".tmp-step=000006-12", "broken-step=000006"]
    assert [step_of(REPOSITORY / name) for name in names] == [625, 12345678, None, None, None, None, None]


def test_newest_by_number_and_not_by_name(tmp_path):
    for step in (999_999, 1_000_000):
        write_checkpoint(tmp_path, small_state(step))
    assert [p.name for p in checkpoints(tmp_path)] == ["step=999999", "step=1000000"]
    assert newest_whole(tmp_path)[0].name == "step=1000000"
    assert newest_whole(tmp_path / "absent") == (None, [])


def test_nothing_is_ever_unpickled():
    files = sorted((REPOSITORY / "llmrecipes").rglob("*.py"))
    assert len(files) > 50
    forbidden = re.compile(
        r"torch\.(load|save)\(|\bpickle\b(?!\.)|np\.load\((?!.*allow_pickle=False)|(?<![\w.])eval\(|exec\("
    )
    found = [
        f"{file.name}: {line.strip()}"
        for file in files
        for line in file.read_text(encoding="utf-8").splitlines()
        if forbidden.search(line) and '"""' not in line
    ]
    assert found == []

"""A disk that is full before a checkpoint, in the middle of one, or while the metrics are written."""

from __future__ import annotations

import os
import subprocess

import pytest
from broken_runs import assert_same, fit, steps_to_repeat
from helpers import write_recipe
from report import Case

from llmrecipes.checkpoint import durable, newest_whole
from llmrecipes.distributed import StepMarks


@pytest.fixture
def small_disk(tmp_path):
    """A file system of 2 MB; made by root only."""
    disk = tmp_path / "disk"
    disk.mkdir()
    made = subprocess.run(["mount", "-t", "tmpfs", "-o", "size=2m", "tmpfs", disk], capture_output=True, text=True)
    if made.returncode:
        pytest.skip(f"a small disk needs the right to mount a tmpfs: {made.stderr.strip()}")
    try:
        yield disk
    finally:
        subprocess.run(["umount", "--lazy", disk], check=True)


def fill(disk, leave: int = 0) -> None:
    """Take all space but ``leave`` bytes."""
    free = os.statvfs(disk).f_bavail * os.statvfs(disk).f_frsize
    with (disk / "filler").open("ab") as file:
        file.write(bytes(max(0, free - leave)))


def at_step(disk, step: int, leave: int = 0):
    """Something else fills the disk when a step begins: seen before the next checkpoint is begun."""

    def inject(rank: int) -> None:
        real = StepMarks.on_train_batch_start

        def start(self, trainer, *arguments):
            if trainer.global_step + 1 == step:
                fill(disk, leave)
            real(self, trainer, *arguments)

        StepMarks.on_train_batch_start = start

    return inject


def at_file(disk, name: str):
    """Something else fills the disk while a checkpoint is written, when this file of rank 0 is begun."""

    def inject(rank: int) -> None:
        real = durable.put

        def put(file, piece):
            if rank == 0 and name in file.name:
                fill(disk)
            real(file, piece)

        durable.put = put

    return inject


@pytest.mark.parametrize("ranks", [1, 2])
def test_disk_full(small_disk, little, whole, ranks, stride):
    case = Case(2, "disk full: while logging, before and within a checkpoint, at the launch", ranks)
    write_recipe(small_disk, little(ranks))
    run = small_disk / "run"
    faults = [
        (0, at_step(small_disk, 1)),  # the first line of metrics.jsonl
        (3, at_step(small_disk, 6, leave=8192)),  # too little, noticed beforehand
        *((3, at_file(small_disk, name)) for name in ("rng", "model/", "optimizer/", "state.json", "manifest.json")),
        (3, lambda rank: rank == 0 and fill(small_disk)),  # nothing can be done at all
    ]
    if ranks > 1:
        faults = faults[:2] + faults[2 :: stride(4)]
    for step, fault in faults:
        text = fit(small_disk, ranks=ranks, inject=fault, expect=1)
        (line,) = [line for line in text.splitlines() if "stopped: " in line]
        assert "Traceback" not in text, text
        assert "No space left" in line or "no space left" in line or "GiB free" in line, line
        newest, broken = newest_whole(run / "checkpoints")
        assert not broken
        assert (newest is None and step == 0) or newest.name == f"step={step:06d}"
        case.add(lost=steps_to_repeat(run))
        (small_disk / "filler").unlink()
    fit(small_disk, ranks=ranks)
    assert_same(run, whole(ranks), ranks)
    case.write()

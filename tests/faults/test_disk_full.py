"""A disk that is full before a checkpoint, in the middle of one, or while the metrics are written."""

from __future__ import annotations

import os
import subprocess

import pytest
from broken_runs import assert_same, differences, fit, last_step, steps_to_repeat
from helpers import write_recipe
from report import Case

from llmrecipes.callbacks.metrics_file import MetricsFile
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


def at_piece(disk, number: int):
    """Something else fills the disk while a checkpoint is written, before its piece of this number."""

    def inject(rank: int) -> None:
        real, count = durable.put, iter(range(1, 10**6))

        def put(file, piece):
            if rank == 0 and next(count) == number:
                fill(disk)
            real(file, piece)

        durable.put = put

    return inject


def in_metrics(disk, step: int):
    """The disk is full, to the last byte of the last page, when a step is to be logged."""

    def inject(rank: int) -> None:
        real = MetricsFile.append

        def append(file, record):
            if record["step"] == step:
                fill(disk)
                with file.path.open("ab") as padding:  # up to the end of the page, then of the disk
                    size = padding.tell()
                    padding.write(bytes(-size % 4096))
                    padding.flush()
                    os.ftruncate(padding.fileno(), size)
                    os.posix_fallocate(padding.fileno(), 0, size)
                file.full = True
            real(file, record)

        MetricsFile.append = append

    return inject


PIECES_OF_A_CHECKPOINT = 44


@pytest.mark.parametrize("ranks", [1, 2])
def test_disk_full(small_disk, little, whole, ranks):
    case = Case(2, "disk full: before a checkpoint, within one, while logging", ranks)
    write_recipe(small_disk, little(ranks))
    run, start = small_disk / "run", PIECES_OF_A_CHECKPOINT if ranks == 1 else PIECES_OF_A_CHECKPOINT + 2
    faults = [
        ("stopped: ", at_step(small_disk, 3, leave=4096)),
        ("stopped: ", at_piece(small_disk, 2)),
        ("stopped: ", at_piece(small_disk, start + 4)),
        ("stopped: ", at_piece(small_disk, start + 20)),
        ("stopped: ", at_step(small_disk, last_step(run) + 1)),
    ]
    for said, fault in faults:
        before, _ = newest_whole(run / "checkpoints")
        text = fit(small_disk, ranks=ranks, inject=fault, expect=1)
        lines = [line for line in text.splitlines() if said in line]
        assert len(lines) == 1, text
        assert "Traceback" not in text, text
        assert "space" in lines[0] or "free" in lines[0]
        newest, broken = newest_whole(run / "checkpoints")
        assert not broken
        assert newest == before or newest.name > before.name
        case.add(lost=steps_to_repeat(run))
        (small_disk / "filler").unlink()
    fit(small_disk, ranks=ranks)
    assert_same(run, whole(ranks), ranks)
    case.write()

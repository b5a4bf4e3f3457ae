"""``kill -9`` at every moment at which a checkpoint, and what goes with it, changes something on disk."""

from __future__ import annotations

import json
import os
import shutil
import signal
from itertools import count
from pathlib import Path

import pytest
from broken_runs import Job, assert_same, differences, fit, fork, launched, steps_to_repeat
from helpers import write_recipe
from report import Case
from write_points import WritePoints

from llmrecipes.checkpoint import newest_whole, read_info
from llmrecipes.checkpoint.callback import Checkpoints
from llmrecipes.distributed import StepMarks

BOUNDARY = 9


def move_to(copy: Path) -> None:
    """This process goes on in a copy of its working directory, with the files that it has open."""
    here = Path.cwd()
    shutil.copytree(here, copy, symlinks=True)
    for link in Path("/proc/self/fd").iterdir():
        try:
            target = Path(os.readlink(link))
        except FileNotFoundError:
            continue  # the listing itself
        if target.is_relative_to(here) and target.is_file():
            descriptor = os.open(copy / target.relative_to(here), os.O_WRONLY | os.O_APPEND)
            os.dup2(descriptor, int(link.name))
            os.close(descriptor)
    os.chdir(copy)


def die_everywhere(before_save=None, stride: int = 1, thread: str | None = None, until: int = BOUNDARY):
    """A fault for one process: at the boundary it forks, again and again, a copy of itself that dies some points later.

    A copy that comes alive to the step after ``until`` knows how many points there are.
    """

    def inject(rank: int) -> None:
        points, explorer = WritePoints("run", thread), os.getpid()
        end, start, save = StepMarks.on_train_batch_end, StepMarks.on_train_batch_start, Checkpoints.save

        def at_end(self, trainer, *arguments):
            if trainer.global_step == BOUNDARY:
                saver(trainer).finish()
                for number in count(1):
                    pid = fork()
                    if pid == 0:
                        move_to(Path.cwd().parent / str(number))
                        points.arm(1 + stride * (number - 1))
                        break
                    code = os.waitstatus_to_exitcode(os.waitpid(pid, 0)[1])
                    if code != -signal.SIGKILL:
                        os._exit(code)
            end(self, trainer, *arguments)

        def at_start(self, trainer, *arguments):
            if os.getpid() != explorer and trainer.global_step == until:
                saver(trainer).finish()
                Path("points.json").write_text(json.dumps(points.names))
                os._exit(0)
            start(self, trainer, *arguments)

        StepMarks.on_train_batch_end, StepMarks.on_train_batch_start = at_end, at_start
        if before_save is not None:
            Checkpoints.save = lambda *arguments: (before_save(*arguments), save(*arguments))[1]

    return inject


def saver(trainer) -> Checkpoints:
    return next(callback for callback in trainer.callbacks if isinstance(callback, Checkpoints))


def explore(folder: Path, recipe: dict, inject=None) -> tuple[list[Path], list[str]]:
    """Folders that kills left, one per point, and the points' names."""
    (folder / "0").mkdir()
    write_recipe(folder / "0", recipe)
    fit(folder / "0", inject=inject or die_everywhere())
    *dead, alive = (folder / str(number) for number in range(1, sum(path.is_dir() for path in folder.iterdir())))
    return dead, json.loads((alive / "points.json").read_text())


@pytest.mark.slow
def test_one_process(tmp_path, little, whole, stride):
    case = Case(1, "kill -9 at every write point of a checkpoint", 1)
    dead, names = explore(tmp_path, little())
    assert len(dead) == len(names) > 50
    for kind in ("mkdir", "open", "write", "fsync", "rename", "symlink", "remove", "rmdir"):
        assert any(name.startswith(kind) for name in names), kind
    resumed_from = set()
    for number, (folder, name) in enumerate(zip(dead, names, strict=True)):
        case.add(lost=steps_to_repeat(folder / "run"))
        resumed_from.add(newest_whole(folder / "run" / "checkpoints")[0].name)
        if number % stride(8):
            continue
        fit(folder)
        assert differences(folder / "run", whole()) == [], name
        left = {path.name for path in (folder / "run" / "checkpoints").iterdir() if path.is_dir()}
        assert {folder for folder in left if "latest" not in folder} == {"step=000009", "step=000012"}, name
    assert resumed_from == {"step=000006", "step=000009"}
    case.write()


def test_mutant_that_purges_first_is_found(tmp_path, little, whole):
    """Whoever makes room before the new checkpoint is there loses everything to the same kills."""

    def purge_first(checkpoints, trainer, module):
        if trainer.global_step == BOUNDARY:
            for path in checkpoints.root(trainer).glob("step=*"):
                shutil.rmtree(path)

    dead, names = explore(tmp_path, little(), die_everywhere(purge_first, stride=8))
    victim = dead[3]
    assert names[24].startswith("write")
    assert newest_whole(victim / "run" / "checkpoints")[0] is None
    assert steps_to_repeat(victim / "run") == BOUNDARY


def test_in_the_background(tmp_path, little, stride):
    """Training has gone on when the process dies in the middle of a save; the checkpoint before it is used."""
    case = Case(10, "kill -9 while a checkpoint is written in the background", 1)
    recipe = little()
    recipe["checkpoint"]["async_save"] = True
    recipe["trainer"]["val_check_interval"] = 12
    dead, names = explore(tmp_path, recipe, die_everywhere(stride=5, thread="checkpoint", until=BOUNDARY + 2))
    assert len(dead) == -(-len(names) // 5) > 12
    (tmp_path / "whole").mkdir()
    write_recipe(tmp_path / "whole", recipe)
    fit(tmp_path / "whole")
    resumed_from = set()
    for number, folder in enumerate(dead):
        case.add(lost=steps_to_repeat(folder / "run"))
        resumed_from.add(newest_whole(folder / "run" / "checkpoints")[0].name)
        if number % stride(3):
            continue
        fit(folder)
        assert_same(folder / "run", tmp_path / "whole" / "run")
    assert resumed_from == {"step=000006", "step=000009"}
    case.write()


def die_in_first_save(victim: int, point: int):
    """A fault for several processes: ``victim`` dies at a point of the first boundary with a checkpoint."""

    def inject(rank: int) -> None:
        if rank != victim:
            return
        points = WritePoints("run", every_piece=False)
        end, start = StepMarks.on_train_batch_end, StepMarks.on_train_batch_start

        def at_end(self, trainer, *arguments):
            if not points.names:
                points.arm(point)
            end(self, trainer, *arguments)

        def at_start(self, trainer, *arguments):
            if points.armed:
                points.armed = False
                Path(f"points-{victim}.json").write_text(json.dumps(points.names))
            start(self, trainer, *arguments)

        StepMarks.on_train_batch_end, StepMarks.on_train_batch_start = at_end, at_start

    return inject


@pytest.mark.slow
@pytest.mark.parametrize("victim", [0, 1])
def test_two_processes(tmp_path, little, victim, stride):
    """One long run, killed once at every point of ``victim``, each launch at the next; a checkpoint at every step."""
    every = stride(6 if victim == 0 else 3)
    steps = 60 // stride(2)
    recipe = little(ranks=2, steps=steps)
    recipe["checkpoint"]["every"] = "1 step"
    recipe["trainer"]["val_check_interval"] = 1 if victim == 0 else steps
    case = Case(1, f"kill -9 at every write point of rank {victim}, the others with it", 2)
    for name in ("broken", "whole"):
        (tmp_path / name).mkdir()
        write_recipe(tmp_path / name, recipe)
    run = tmp_path / "broken" / "run"
    for point in count(1, every):
        with launched(tmp_path / "broken", ranks=2, inject=die_in_first_save(victim, point)) as job:
            job.until(lambda job=job: bool(job.ended))
            if job.ended[next(iter(job.ended))] != -signal.SIGKILL:
                job.expect(0)
                break
        case.add(lost=steps_to_repeat(run))
    # How many there are depends on what the kill before left to be removed.
    names = json.loads((tmp_path / "broken" / f"points-{victim}.json").read_text())
    assert abs(every * case.injected - len(names)) < 10 + every
    assert every * case.injected > (45 - 3 * (every - 1) if victim == 0 else 8)
    assert read_info(newest_whole(run / "checkpoints")[0])["step"] == steps
    fit(tmp_path / "whole", ranks=2)
    assert_same(run, tmp_path / "whole" / "run", ranks=2)
    case.write()


def test_mutant_without_optimizer_state_is_found(tmp_path, little, whole):
    """The comparison sees a resume that forgets the optimizer's state."""
    from llmrecipes.checkpoint import callback

    write_recipe(tmp_path, little())
    with launched(tmp_path) as job:
        job.until_step(tmp_path / "run", 7)

    def forget(rank: int) -> None:
        callback.load_optimizer = lambda folder, model, optimizer: None

    Job(tmp_path, inject=forget).expect(0)
    assert {"metrics", "model", "optimizer"} <= set(differences(tmp_path / "run", whole()))

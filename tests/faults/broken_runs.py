"""Launches of ``llmrecipes fit`` that may be killed, stopped and broken: forked, because imports take seconds.

A fault is put into the forked process by a function that it calls before anything else; the recipe is the same with
and without it, so that whatever resumes cannot tell. Recipes are parsed once: that takes longer than these runs.
"""

from __future__ import annotations

import os
import random
import signal
import sys
import time
import traceback
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from pathlib import Path
from unittest import mock

import lightning.pytorch as L
import torch
from helpers import cli, trajectory
from lightning.pytorch.utilities.rank_zero import rank_zero_only
from ranks import free_port, rank_environment

from llmrecipes.callbacks import loss_curve
from llmrecipes.checkpoint import newest_whole, read_checkpoint, read_info, read_rng
from llmrecipes.process import SIGNALS
from llmrecipes.run import environment
from llmrecipes.run import fit as fit_module
from llmrecipes.run.recipe_cli import RecipeCLI

Inject = Callable[[int], object]
NO_FAULT: Inject = lambda rank: None  # noqa: E731
STOPPED = 75
_parsed: dict[tuple, RecipeCLI] = {}


def fork() -> int:
    """``os.fork``, after which Python's generator goes on in the child: it would be seeded anew."""
    state = random.getstate()
    pid = os.fork()
    if pid == 0:
        random.setstate(state)
    return pid


def parsed(folder: Path, words: tuple, variables: dict[str, str]) -> RecipeCLI:
    """The recipe of a folder as a rank with these variables reads it; for forked processes to run."""
    options = ("--config", "recipe.yaml", "--run_root", ".", *map(str, words))
    rank = {key: value for key, value in variables.items() if key != "MASTER_PORT"}
    key = ((folder / "recipe.yaml").read_text(), options, *sorted(rank.items()))
    if key not in _parsed:
        before = Path.cwd()
        os.chdir(folder)
        try:
            # The Trainer tells everybody its rank; this process, which goes on to other tests, has none.
            with mock.patch.dict(os.environ, variables), mock.patch.object(rank_zero_only, "rank", 0):
                _parsed[key] = RecipeCLI("fit", list(options))
        finally:
            os.chdir(before)
    return _parsed[key]


def _ready(recipe: RecipeCLI) -> Callable[..., RecipeCLI]:
    def read(subcommand: str, words: list[str]) -> RecipeCLI:
        L.seed_everything(recipe.settings["seed"], verbose=False)
        return recipe

    return read


class Job:
    """One launch; every rank is a process of its own, as torchrun starts them.

    Args:
        folder: working directory and run root; holds ``recipe.yaml`` unless the words say otherwise.
        words: after ``fit --config recipe.yaml --run_root .``.
        ranks: how many; 1 = without any environment of a launcher.
        inject: called in every process with its rank.
    """

    def __init__(self, folder: Path, *words: object, ranks: int = 1, inject: Inject = NO_FAULT) -> None:
        torch.set_num_threads(1)
        self.folder = folder
        self.started = time.monotonic()
        sys.stdout.flush()
        port = free_port()
        signal.pthread_sigmask(signal.SIG_BLOCK, SIGNALS)  # as the launcher does: they must find handlers
        try:
            self.pids = [
                self._fork(rank, rank_environment(rank, ranks, port) if ranks > 1 else {}, words, inject)
                for rank in range(ranks)
            ]
        finally:
            signal.pthread_sigmask(signal.SIG_UNBLOCK, SIGNALS)
        self._codes: dict[int, int] = {}

    def _fork(self, rank: int, variables: dict[str, str], words: tuple, inject: Inject) -> int:
        recipe = parsed(self.folder, words, variables)
        pid = fork()
        if pid:
            return pid
        code = 70
        try:
            with self._output(rank).open("w") as file:
                os.dup2(file.fileno(), 1)
                os.dup2(file.fileno(), 2)
            sys.stdout, sys.stderr = os.fdopen(1, "w"), os.fdopen(2, "w")
            os.environ.update(variables)
            rank_zero_only.rank = rank
            os.chdir(self.folder)
            for module in (loss_curve, fit_module):
                module.draw_loss_curve = lambda metrics, picture: False  # takes longer than a run
            environment.git_state = lambda: None
            fit_module.RecipeCLI = _ready(recipe)
            inject(rank)
            code = cli("fit", "--config", "recipe.yaml", "--run_root", ".", *words)
        except SystemExit as error:
            code = error.code if isinstance(error.code, int) else 1
        except BaseException:
            traceback.print_exc()
        finally:
            try:
                sys.stdout.flush()
                sys.stderr.flush()
            finally:
                os._exit(code)

    def _output(self, rank: int) -> Path:
        """Beside the folder, which may be on a disk that is full."""
        return self.folder.with_name(f"{self.folder.name}-output-{rank}.txt")

    @property
    def ended(self) -> dict[int, int]:
        """Rank -> exit code (negative: the signal) of those that have ended."""
        for rank, pid in enumerate(self.pids):
            if rank not in self._codes:
                found, status = os.waitpid(pid, os.WNOHANG)
                if found:
                    self._codes[rank] = os.waitstatus_to_exitcode(status)
        return self._codes

    def wait(self, seconds: float = 90) -> list[int]:
        """The exit codes of all ranks; what does not end in time is killed and fails the test."""
        try:
            self.until(lambda: len(self.ended) == len(self.pids), seconds)
        finally:
            self.kill()
        return [self._codes[rank] for rank in range(len(self.pids))]

    def until(self, condition: Callable[[], bool], seconds: float = 90) -> None:
        """Wait for a condition."""
        end = time.monotonic() + seconds
        while not condition():
            assert time.monotonic() < end, f"not within {seconds} s; ended: {self.ended}\n{self.output()}"
            time.sleep(0.002)

    def until_step(self, run: Path, step: int) -> None:
        """Wait until ``step`` is logged."""
        self.until(lambda: bool(self.ended) or last_step(run) >= step)

    def kill(self) -> None:
        """End what is left, as a power failure would."""
        for rank, pid in enumerate(self.pids):
            if rank not in self.ended:
                os.kill(pid, signal.SIGKILL)
                self._codes[rank] = os.waitstatus_to_exitcode(os.waitpid(pid, 0)[1])

    def output(self, rank: int | None = None) -> str:
        """What a rank, or all, printed."""
        ranks = range(len(self.pids)) if rank is None else [rank]
        return "".join(self._output(r).read_text() for r in ranks)

    def expect(self, *codes: int, seconds: float = 90) -> str:
        """Wait for these exit codes (one = of all ranks); returns what was printed."""
        wanted = list(codes) if len(codes) > 1 else list(codes) * len(self.pids)
        found = self.wait(seconds)
        assert found == wanted, f"exit codes {found}, not {wanted}\n{self.output()}"
        return self.output()


@contextmanager
def launched(folder: Path, *words: object, ranks: int = 1, inject: Inject = NO_FAULT) -> Iterator[Job]:
    """A job that does not outlive the test."""
    job = Job(folder, *words, ranks=ranks, inject=inject)
    try:
        yield job
    finally:
        job.kill()


def fit(folder: Path, *words: object, ranks: int = 1, inject: Inject = NO_FAULT, expect: int = 0) -> str:
    """Run a launch to its end; returns what it printed."""
    return Job(folder, *words, ranks=ranks, inject=inject).expect(expect)


def last_step(run: Path) -> int:
    """The newest training step in the metrics, 0 before the first."""
    try:
        return (run / "metrics.jsonl").read_bytes().count(b'"grad_norm"')
    except FileNotFoundError:  # not there yet, or moved aside by a launch that begins anew
        return 0


def steps_to_repeat(run: Path) -> int:
    """Steps that a killed run logged after its newest whole checkpoint: what the fault costs."""
    path, _ = newest_whole(run / "checkpoints")
    return last_step(run) - (read_info(path)["step"] if path else 0)


def differences(run: Path, whole: Path, ranks: int = 1, records: Callable[[Path], list] = trajectory) -> list[str]:
    """In what a finished run differs from the uninterrupted one, to the last bit; empty when it does not."""
    found = [] if records(run) == records(whole) else ["metrics"]
    one, two = (newest_whole(folder / "checkpoints")[0] for folder in (run, whole))
    if one is None or two is None or one.name != two.name:
        return [*found, f"checkpoints {one} {two}"]
    left, right = read_checkpoint(one), read_checkpoint(two)
    for part in ("model", "optimizer"):
        a, b = getattr(left, part), getattr(right, part)
        assert a, "nothing to compare"
        if a.keys() != b.keys() or not all(a[name].equal(b[name]) for name in a):
            found.append(part)
    for rank in range(ranks):
        a, b = read_rng(one, rank), read_rng(two, rank)
        if a is None or b is None or not all(a[name].equal(b[name]) for name in a):
            found.append(f"generators of rank {rank}")
    if left.info != right.info:
        found.append("state")
    return found


def assert_same(run: Path, whole: Path, ranks: int = 1, records: Callable[[Path], list] = trajectory) -> None:
    """The promise: resumed, and nobody could tell."""
    assert differences(run, whole, ranks, records) == []
    steps = [record["step"] for record in trajectory(run) if "val_loss" not in record]
    assert steps == list(range(1, len(steps) + 1)), "a step is missing or twice in the metrics"

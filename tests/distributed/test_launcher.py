"""Children of the launcher: their ends are named, none is orphaned, no signal is lost."""

from __future__ import annotations

import os
import signal
import subprocess
import sys
import time
from pathlib import Path

import pytest
from lightning.fabric.plugins.environments import LightningEnvironment

from llmrecipes.distributed.launcher import RankLauncher, ranks_end_together
from llmrecipes.errors import RankFailure, UserError
from llmrecipes.process import SIGNALS

REPOSITORY = Path(__file__).parents[2]


@pytest.fixture
def launch(monkeypatch):
    """``launch(code)``: a launcher whose one child runs this Python code."""
    for name in ("MASTER_ADDR", "MASTER_PORT", "NODE_RANK", "LOCAL_RANK", "WORLD_SIZE"):
        monkeypatch.delenv(name, raising=False)
    launchers = []

    def start(code: str) -> RankLauncher:
        launcher = RankLauncher(LightningEnvironment(), num_processes=2, num_nodes=1)
        launcher.command = [sys.executable, "-c", code]
        launcher.deaths = []
        launcher.on_death = lambda *death: launcher.deaths.append(death)
        launchers.append(launcher)
        launcher.start()
        return launcher

    yield start
    for launcher in launchers:
        launcher.end()


def until(condition, seconds=20.0):
    end = time.monotonic() + seconds
    while not condition():
        assert time.monotonic() < end
        time.sleep(0.01)


def test_a_killed_child_is_named(launch):
    launcher = launch("import time; time.sleep(60)")
    launcher.procs[0].kill()
    until(lambda: launcher.deaths)
    pid = launcher.procs[0].pid
    assert launcher.deaths == [(f"rank 1 (pid {pid} on {os.uname().nodename}) was killed by SIGKILL", 1)]


@pytest.mark.parametrize("code", [1, 2])
def test_a_child_that_fails_gives_others_time_to_say_why(launch, monkeypatch, code):
    monkeypatch.setattr("llmrecipes.distributed.launcher.PATIENCE", 0.5)
    launcher = launch(f"raise SystemExit({code})")
    until(lambda: launcher.deaths)
    ((message, exit_code),) = launcher.deaths
    assert message.endswith(f"ended with exit code {code}") and exit_code == code


@pytest.mark.parametrize("code", [0, 75])
def test_ends_that_were_agreed_are_no_deaths(launch, code):
    launcher = launch(f"raise SystemExit({code})")
    assert launcher.wait() is None
    assert launcher.deaths == [] and launcher.procs[0].returncode == code


def test_what_does_not_end_is_killed(launch):
    launcher = launch("import signal, time; signal.signal(signal.SIGTERM, signal.SIG_IGN); time.sleep(60)")
    assert "did not end; it was killed" in launcher.wait(0.5)
    assert launcher.procs[0].returncode == -signal.SIGKILL


def test_children_are_started_once_and_know_their_rank(launch, tmp_path):
    names = ("RANK", "LOCAL_RANK", "WORLD_SIZE", "NODE_RANK", "MASTER_ADDR")
    file = tmp_path / "environment"
    launcher = launch(f"import os; open({str(file)!r}, 'w').write(' '.join(os.environ[n] for n in {names}))")
    assert launcher.launch(lambda a, b: a + b, 1, b=2) == 3
    assert len(launcher.procs) == 1 and launcher.wait() is None
    assert file.read_text() == "1 1 2 0 127.0.0.1"


SLOW_CHILD = """
import sys, time
time.sleep(0.5)  # imports: a signal in this time must neither kill nor be lost
from llmrecipes.process import StopSignals, start_as_child
start_as_child()
with StopSignals() as signals:
    end = time.monotonic() + 20
    while signals.received is None and time.monotonic() < end:
        time.sleep(0.01)
    sys.exit(75 if signals.received else 3)
"""


@pytest.mark.parametrize("number", SIGNALS)
def test_a_signal_while_a_child_starts_waits_for_it(launch, number):
    launcher = launch(SLOW_CHILD)
    os.kill(launcher.procs[0].pid, number)
    assert launcher.wait() is None
    assert launcher.procs[0].returncode == 75


def test_mutant_child_without_blocked_signals_is_killed(launch, monkeypatch):
    monkeypatch.setattr("llmrecipes.distributed.launcher.SIGNALS", ())
    launcher = launch(SLOW_CHILD)
    os.kill(launcher.procs[0].pid, signal.SIGUSR1)
    assert "was killed by SIGUSR1" in launcher.wait()


PARENT = '''
import os, sys, time
from lightning.fabric.plugins.environments import LightningEnvironment
from llmrecipes.distributed.launcher import RankLauncher
launcher = RankLauncher(LightningEnvironment(), num_processes=2, num_nodes=1)
child = """
import time
from llmrecipes.process import start_as_child
start_as_child()
print("ready", flush=True)
time.sleep(60)
"""
launcher.command = [sys.executable, "-c", child]
launcher.start()
print(launcher.procs[0].pid, flush=True)
time.sleep(60)
'''


@pytest.mark.release  # tests/run/test_many_ends.py has it with a whole training
def test_a_stopped_child_dies_with_its_parent():
    parent = subprocess.Popen([sys.executable, "-c", PARENT], stdout=subprocess.PIPE, text=True, cwd=REPOSITORY)
    lines = [parent.stdout.readline().strip(), parent.stdout.readline().strip()]
    assert "ready" in lines
    child = int(next(line for line in lines if line != "ready"))
    os.kill(child, signal.SIGSTOP)
    parent.kill()
    parent.wait()
    until(lambda: state(child) in ("", "Z"))


def state(pid: int) -> str:
    """R, S, T, Z ... of a process; nothing when it is gone."""
    try:
        return Path(f"/proc/{pid}/stat").read_text().rpartition(")")[2].split()[0]
    except FileNotFoundError:
        return ""


class Strategy:
    def __init__(self, launcher):
        self.launcher = launcher


def test_the_end_of_a_rank_is_the_end_of_its_children(launch):
    launcher = launch("import time; time.sleep(60)")
    with pytest.raises(UserError), ranks_end_together(Strategy(launcher), lambda error: 2):
        raise UserError("before they met")
    assert launcher.procs[0].returncode == -signal.SIGKILL
    launcher = launch("raise SystemExit(4)")
    with (
        pytest.raises(RankFailure, match=r"rank 1 .* ended with exit code 4"),
        ranks_end_together(Strategy(launcher), int),
    ):
        pass

"""The processes of one machine: started by rank 0, never orphaned, and a death among them named at once.

Lightning's own observer takes every exit code for a crash (also 75), kills the whole job with SIGKILL in silence, and
leaves a stopped child behind for ever.
"""

from __future__ import annotations

import os
import signal
import socket
import subprocess
import sys
import threading
import time
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from typing import Any

from lightning.fabric.plugins import ClusterEnvironment
from lightning.fabric.utilities.distributed import _set_num_threads_if_needed
from lightning.pytorch.strategies.launchers.subprocess_script import _SubprocessScriptLauncher

from llmrecipes.errors import RankFailure
from llmrecipes.process import LAUNCHER_VARIABLE, SIGNALS

EXPECTED_CODES = (0, 75)
POLL = 0.2
# A child that ends with an error of the user's says so itself; rank 0, which has the same recipe, may too.
PATIENCE = 8.0


class RankLauncher(_SubprocessScriptLauncher):
    """Starts the other ranks of this machine by the command that started this one, once.

    Args:
        cluster_environment: knows addresses and numbers.
        num_processes, num_nodes: of the job.
    """

    def __init__(self, cluster_environment: ClusterEnvironment, num_processes: int, num_nodes: int) -> None:
        super().__init__(cluster_environment, num_processes, num_nodes)
        self.command: list[str] | None = None
        self.on_death: Callable[[str, int], None] = self._end_with
        self._first_rank = 0
        self._over = threading.Event()

    def launch(self, function: Callable[..., Any], *args: Any, trainer: Any = None, **kwargs: Any) -> Any:  # noqa: ARG002
        """Start the other processes if that has not been done, then call the function."""
        self.start()
        _set_num_threads_if_needed(num_processes=self.num_processes)
        return function(*args, **kwargs)

    def start(self) -> None:
        """Start the other processes, unless they run already or others start them."""
        if self.procs or self.cluster_environment.creates_processes_externally:
            return
        self.cluster_environment.validate_settings(num_devices=self.num_processes, num_nodes=self.num_nodes)
        self._first_rank = self.cluster_environment.node_rank() * self.num_processes
        # A signal to the whole process group must wait for the child's handlers, and not kill it while it starts.
        signal.pthread_sigmask(signal.SIG_BLOCK, SIGNALS)
        try:
            self.procs = [self._start(local_rank) for local_rank in range(1, self.num_processes)]
        finally:
            signal.pthread_sigmask(signal.SIG_UNBLOCK, SIGNALS)
        if self.procs:
            threading.Thread(target=self._observe, daemon=True, name="child-observer").start()

    def _start(self, local_rank: int) -> subprocess.Popen[bytes]:
        # In the child's environment only: Lightning takes a process with LOCAL_RANK for one that others have started.
        environment = {
            **os.environ,
            "MASTER_ADDR": self.cluster_environment.main_address,
            "MASTER_PORT": str(self.cluster_environment.main_port),
            "NODE_RANK": str(self.cluster_environment.node_rank()),
            "WORLD_SIZE": str(self.num_processes * self.num_nodes),
            "LOCAL_RANK": str(local_rank),
            "RANK": str(self._first_rank + local_rank),
            LAUNCHER_VARIABLE: str(os.getpid()),
        }
        return subprocess.Popen(self.command or _this_command(), env=environment)

    def kill(self, signum: Any) -> None:
        """Lightning passes signals on; the ranks agree on stopping by themselves, so only a kill is."""
        if signum == signal.SIGKILL:
            self.end()

    # ---- the children's ends

    def _observe(self) -> None:
        while not self._over.wait(POLL):
            for local_rank, process in enumerate(self.procs, 1):
                code = process.poll()
                if code is not None and code not in EXPECTED_CODES:
                    self._found_dead(local_rank, process, code)
                    return

    def _found_dead(self, local_rank: int, process: subprocess.Popen[bytes], code: int) -> None:
        """A death by signal is news; with an exit code, the rank has said why and the others have heard."""
        if code > 0 and self._over.wait(PATIENCE):
            return
        self.on_death(self._obituary(local_rank, process.pid, code), code if code > 0 else 1)

    def _obituary(self, local_rank: int, pid: int, code: int) -> str:
        how = f"was killed by {signal.Signals(-code).name}" if code < 0 else f"ended with exit code {code}"
        return f"rank {self._first_rank + local_rank} (pid {pid} on {socket.gethostname()}) {how}"

    def _end_with(self, message: str, code: int) -> None:
        """Before the ranks have met: nobody else can say it."""
        print(f"error: {message}", file=sys.stderr, flush=True)
        self.end()
        os._exit(code)

    def wait(self, seconds: float = 30.0) -> str | None:
        """Wait for the children to end by themselves; what is left is killed.

        Returns:
            What was wrong with the first that did not end well.
        """
        self._over.set()
        end = time.monotonic() + seconds
        wrong = []
        for local_rank, process in enumerate(self.procs, 1):
            try:
                code = process.wait(max(0.0, end - time.monotonic()))
            except subprocess.TimeoutExpired:
                wrong.append(f"rank {self._first_rank + local_rank} (pid {process.pid}) did not end; it was killed")
                continue
            if code not in EXPECTED_CODES:
                wrong.append(self._obituary(local_rank, process.pid, code))
        self.end()
        return wrong[0] if wrong else None

    def end(self) -> None:
        """Kill what is left of the children. Not by SIGTERM: to them that is a wish to save, and they may be stuck."""
        self._over.set()
        for process in self.procs:
            if process.poll() is None:
                process.kill()
        for process in self.procs:
            process.wait(10)


def _this_command() -> list[str]:
    import __main__

    if __main__.__spec__ is None:
        return [sys.executable, *sys.argv]
    return [sys.executable, "-m", __main__.__spec__.name.removesuffix(".__main__"), *sys.argv[1:]]


@contextmanager
def ranks_end_together(strategy: Any, exit_code: Callable[[BaseException], int]) -> Iterator[None]:
    """Around all that a rank does: its failure is told to the others, its end waits for theirs.

    Args:
        strategy: of the Trainer; those of other classes than ShardedStrategy have one process.
        exit_code: what the command will end with after an error.

    Raises:
        RankFailure: this rank was well, and a process of this machine was not.
        SystemExit: rank 0 says the same.
    """
    launcher = strategy.launcher if isinstance(strategy.launcher, RankLauncher) else None
    if launcher is not None:
        strategy.watched = True
    try:
        yield
    except BaseException as error:
        code = exit_code(error)
        watchdog = getattr(strategy, "watchdog", None)
        said = watchdog is not None and watchdog.fail(error, code)
        if launcher is not None:
            launcher.wait(PATIENCE if watchdog is not None else 0.0)
        if said:
            raise SystemExit(code) from None
        raise
    watchdog = getattr(strategy, "watchdog", None)
    if watchdog is not None:
        watchdog.leave()
    wrong = launcher.wait() if launcher is not None else None
    if wrong:
        raise RankFailure(wrong)

"""A real Slurm on one machine: munged, slurmctld and several slurmd. Each node is a network namespace of its own.

A node has a host name, an address and an ``/etc/hosts``, so that names, rendezvous and failures are those of a cluster.
No cgroups, no database, no systemd; nothing is written to ``/etc``. Everything that runs in the namespaces made here
is ours, and nothing else is ever ended.
"""

from __future__ import annotations

import contextlib
import json
import os
import re
import shutil
import signal
import subprocess
import sys
import time
from pathlib import Path

from helpers import REPOSITORY

NEEDED = {
    "slurmctld": "slurmctld",
    "slurmd": "slurmd",
    "sbatch": "slurm-client",
    "munged": "munge",
    "ip": "iproute2",
    "flock": "util-linux",
}
ENDED = {"COMPLETED", "FAILED", "CANCELLED", "TIMEOUT", "NODE_FAIL"}
NO_START = Path("/usr/sbin/policy-rc.d")

# Slurm takes less than 5 for cred_expire as nothing said.
# Times are far below production's, which stand in brackets: a dead node is noticed after 60 s [300], so that
# the ranks notice it first, as they do in production, a requeued job
# waits 6 s [120], KILL follows TERM after 10 s [30].
CONFIG = """
ClusterName=llmrecipes
SlurmctldHost={prefix}ctl(10.77.0.254)
SlurmUser=root
SlurmdUser=root
SlurmctldPort=17817
SlurmdPort=17818
AuthType=auth/munge
CredType=cred/munge
AuthInfo=socket={folder}/munge.sock,cred_expire=5
StateSaveLocation={folder}/state
SlurmdSpoolDir={folder}/spool-%n
SlurmctldPidFile={folder}/slurmctld.pid
SlurmdPidFile={folder}/slurmd-%n.pid
SlurmctldLogFile={folder}/slurmctld.log
SlurmdLogFile={folder}/slurmd-%n.log
MailProg=/bin/true
ProctrackType=proctrack/linuxproc
TaskPlugin=task/none
JobAcctGatherType=jobacct_gather/none
AccountingStorageType=accounting_storage/none
MpiDefault=none
SwitchType=switch/none
SlurmdParameters=config_overrides
GresTypes=gpu
SelectType=select/cons_tres
SelectTypeParameters=CR_CPU
SchedulerType=sched/backfill
SchedulerParameters=batch_sched_delay=0,sched_interval=2,sched_min_interval=0,bf_interval=2
SlurmctldTimeout=10
SlurmdTimeout=60
KillWait=10
InactiveLimit=0
MinJobAge=3600
WaitTime=0
ReturnToService=2
JobRequeue=1
"""


def why_not() -> str | None:
    """Why there can be no cluster here; None = it can be made (Debian's packages are installed when missing)."""
    if sys.platform != "linux" or os.geteuid() != 0:
        return "a real Slurm needs root on Linux"
    if _missing() and shutil.which("apt-get") is None:
        return f"{', '.join(_missing())} missing, and there is no apt-get to install them"
    failed = install()
    if failed:
        return f"Slurm cannot be installed: {failed}"
    probe = f"lrp{os.getpid()}"
    done = subprocess.run(["ip", "netns", "add", probe], capture_output=True, text=True)
    subprocess.run(["ip", "netns", "delete", probe], capture_output=True)
    return None if done.returncode == 0 else f"network namespaces cannot be made: {done.stderr.strip()}"


def _missing() -> list[str]:
    return [package for command, package in NEEDED.items() if shutil.which(command) is None]


def install() -> str:
    """Install what is missing without letting the packages start daemons; returns what went wrong."""
    missing = _missing()
    if not missing:
        return ""
    made = not NO_START.exists()
    if made:
        NO_START.write_text("#!/bin/sh\nexit 101\n")
        NO_START.chmod(0o755)
    apt = ["apt-get", "-qq", "-o", "DPkg::Lock::Timeout=120"]
    environment = os.environ | {"DEBIAN_FRONTEND": "noninteractive"}
    try:
        for words in (["update"], ["install", "-y", "--no-install-recommends", *missing]):
            done = subprocess.run([*apt, *words], capture_output=True, text=True, env=environment)
            if done.returncode and words[0] == "install":
                return done.stderr.strip().splitlines()[-1] if done.stderr.strip() else f"apt-get: {done.returncode}"
    finally:
        if made:
            NO_START.unlink()
    return ""


def _run(*words: object) -> str:
    done = subprocess.run([str(word) for word in words], capture_output=True, text=True)
    assert done.returncode == 0, f"{words}\n{done.stdout}{done.stderr}"
    return done.stdout


class Cluster:
    """Nodes n1, n2, ... in partitions, 64 CPUs and 2 make-believe GPUs each.

    Args:
        folder: short (sockets are in it), for state, spool and logs.
        partitions: name -> how many nodes; the first one is the default.
    """

    def __init__(self, folder: Path, partitions: dict[str, int]) -> None:
        self.folder = folder
        self.prefix = f"lr{os.getpid()}"
        self.nodes = [f"n{i + 1}" for i in range(sum(partitions.values()))]
        self.partitions = partitions
        self.slurmd: dict[str, subprocess.Popen] = {}

    # ---- up and down

    def start(self) -> None:
        self._sweep()
        (self.folder / "state").mkdir(parents=True)
        self._write_files()
        _run("ip", "netns", "add", f"{self.prefix}sw")
        self._in_switch("link", "add", "br0", "type", "bridge")
        self._in_switch("link", "set", "br0", "up")
        for number, name in [(254, "ctl"), *enumerate(self.nodes, 1)]:
            self._plug(name, f"10.77.0.{number}")
        key = self.folder / "munge.key"
        key.write_bytes(os.urandom(1024))
        key.chmod(0o400)
        names = {"socket": "sock", "pid-file": "pid", "log-file": "log", "seed-file": "seed"}
        files = [f"--{option}={self.folder}/munge.{end}" for option, end in names.items()]
        self._spawn("ctl", "munged", "--foreground", "--force", f"--key-file={key}", *files)
        self._until(lambda: (self.folder / "munge.sock").exists(), "munged")
        self._spawn("ctl", "slurmctld", "-D", "-f", self.folder / "slurm.conf")
        for node in self.nodes:
            self.restart(node)
        self._until(lambda: self.idle() == len(self.nodes), "nodes")

    def _write_files(self) -> None:
        text = CONFIG.format(prefix=self.prefix, folder=self.folder)
        for number, node in enumerate(self.nodes, 1):
            text += f"NodeName={node} NodeAddr=10.77.0.{number} CPUs=64 RealMemory=1000000 Gres=gpu:2\n"
        first = 0
        for name, count in self.partitions.items():
            default = "YES" if first == 0 else "NO"
            nodes = ",".join(self.nodes[first : first + count])
            text += f"PartitionName={name} Nodes={nodes} Default={default} DefaultTime=30 State=UP\n"
            first += count
        (self.folder / "slurm.conf").write_text(text)
        gres = "\n".join(f"NodeName={node} Name=gpu File=/dev/tty[0-1]" for node in self.nodes)
        (self.folder / "gres.conf").write_text(gres + "\n")
        version = re.findall(r"\d+", _run("slurmd", "-V"))
        if (int(version[0]), int(version[1])) >= (23, 2):  # older ones do not know the key
            (self.folder / "cgroup.conf").write_text("CgroupPlugin=disabled\n")
        names = [("127.0.0.1", "localhost"), ("10.77.0.254", f"{self.prefix}ctl")]
        names += [(f"10.77.0.{number}", node) for number, node in enumerate(self.nodes, 1)]
        (self.folder / "hosts").write_text("".join(f"{address} {name}\n" for address, name in names))

    def _in_switch(self, *words: str) -> None:
        _run("ip", "-n", f"{self.prefix}sw", *words)

    def _plug(self, name: str, address: str) -> None:
        space = f"{self.prefix}{name}"
        _run("ip", "netns", "add", space)
        self._in_switch("link", "add", f"v{name}", "type", "veth", "peer", "name", "eth0", "netns", space)
        self._in_switch("link", "set", f"v{name}", "master", "br0", "up")
        for words in (["link", "set", "lo", "up"], ["addr", "add", f"{address}/24", "dev", "eth0"]):
            _run("ip", "-n", space, *words)
        _run("ip", "-n", space, "link", "set", "eth0", "up")

    def _inside(self, name: str, *words: object) -> list[str]:
        """The command as it would run on that machine: its network, host name and ``/etc/hosts``."""
        host = name if name in self.nodes else f"{self.prefix}{name}"
        setup = f'hostname {host}; mount --bind {self.folder}/hosts /etc/hosts; exec "$@"'
        space = ["nsenter", f"--net=/run/netns/{self.prefix}{name}", "unshare", "--uts", "--mount"]
        return [*space, "sh", "-c", setup, "sh", *map(str, words)]

    def _spawn(self, name: str, *words: object) -> subprocess.Popen:
        log = (self.folder / f"{name}-{words[0]}.out").open("ab")
        return subprocess.Popen(
            self._inside(name, *words), stdin=subprocess.DEVNULL, stdout=log, stderr=log, start_new_session=True
        )

    def stop(self) -> None:
        """End all that runs in the namespaces, and the namespaces."""
        spaces = [f"{self.prefix}{name}" for name in ("ctl", *self.nodes, "sw")]
        for space in spaces:
            self._kill(space)
        for space in spaces:
            subprocess.run(["ip", "netns", "delete", space], capture_output=True)

    def _sweep(self) -> None:
        """End what a test session left that was killed: its process number is in the names."""
        names = [line.split()[0] for line in _run("ip", "netns", "list").splitlines()]
        for space in names:
            owner = re.fullmatch(r"lr(\d+)(?:ctl|sw|n\d+)", space)
            if owner and not Path("/proc", owner[1]).exists():
                self._kill(space)
                subprocess.run(["ip", "netns", "delete", space], capture_output=True)

    def _kill(self, space: str) -> None:
        for _ in range(50):
            done = subprocess.run(["ip", "netns", "pids", space], capture_output=True, text=True)
            pids = [int(pid) for pid in done.stdout.split()]
            if not pids:
                return
            for pid in pids:
                with contextlib.suppress(ProcessLookupError):
                    os.kill(pid, signal.SIGKILL)
            time.sleep(0.05)

    def crash(self, node: str) -> None:
        """As if its power were cut: everything on it ends at once."""
        self._kill(f"{self.prefix}{node}")
        self.slurmd[node].wait()

    def restart(self, node: str) -> None:
        self.slurmd[node] = self._spawn(node, "slurmd", "-D", "-N", node, "-f", self.folder / "slurm.conf")

    def _until(self, condition, what: str, timeout: float = 120) -> None:
        end = time.monotonic() + timeout
        while not condition():
            assert time.monotonic() < end, f"{what}: not ready\n{self.logs()}"
            time.sleep(0.1)

    def logs(self) -> str:
        files = [*self.folder.glob("*.log"), *self.folder.glob("*.out")]
        return "\n".join(f"--- {file.name}\n{file.read_text(errors='replace')[-1500:]}" for file in files)

    # ---- a user's commands

    def run(self, *words: object, check: bool = True, **options) -> subprocess.CompletedProcess[str]:
        """A command as typed on the login node."""
        environment = os.environ | {
            "SLURM_CONF": str(self.folder / "slurm.conf"),
            "PYTHONPATH": os.pathsep.join([str(REPOSITORY), str(REPOSITORY / "tests" / "slurm")]),
            "PATH": f"{Path(sys.executable).parent}:{os.environ['PATH']}",
            "VENV": str(Path(sys.executable).parents[1]),
            "RETRY_PAUSE": "1",
            "OMP_NUM_THREADS": "1",
        }
        environment |= options.pop("env", {})
        done = subprocess.run(self._inside("ctl", *words), capture_output=True, text=True, env=environment, **options)
        if check:
            assert done.returncode == 0, f"{words}\n{done.stdout}{done.stderr}"
        return done

    def sbatch(self, *words: object, cwd: Path, **options) -> str:
        """Submit; returns the job's number."""
        return self.run("sbatch", "--parsable", *words, cwd=cwd, **options).stdout.strip().split(";")[0]

    def idle(self) -> int:
        done = self.run("sinfo", "--noheader", "--Node", "--format=%N %T", check=False)
        return len({line.split()[0] for line in done.stdout.splitlines() if line.split()[1:] == ["idle"]})

    def jobs(self, job: str) -> list[dict[str, str]]:
        """Facts of a job, or of each task of an array."""
        done = self.run("scontrol", "--oneliner", "show", "job", job, check=False)
        return [dict(re.findall(r"(\w+)=(\S*)", line)) for line in done.stdout.splitlines() if "JobId=" in line]

    def states(self, job: str) -> list[str]:
        return [facts["JobState"] for facts in self.jobs(job)]

    def wait(self, job: str, timeout: float = 300) -> list[str]:
        """Until all of it has ended; returns the states."""
        end = time.monotonic() + timeout
        while not (states := self.states(job)) or not set(states) <= ENDED:
            assert time.monotonic() < end, f"job {job}: {self.jobs(job)}\n{self.logs()}"
            time.sleep(0.3)
        return states

    def until(self, condition, what: str, timeout: float = 240) -> None:
        """Until something is seen in files."""
        end = time.monotonic() + timeout
        while not condition():
            queue = self.run("squeue", check=False).stdout if time.monotonic() >= end else ""
            assert time.monotonic() < end, f"waited for {what}\n{queue}"
            time.sleep(0.1)


def steps_logged(run: Path) -> int:
    """The last step in a run's metrics; the last line may be half written."""
    file = run / "metrics.jsonl"
    if not file.exists():
        return 0
    last = 0
    for line in file.read_text().splitlines():
        with contextlib.suppress(json.JSONDecodeError):
            last = json.loads(line)["step"]
    return last

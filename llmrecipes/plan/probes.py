"""The questions that ``llmrecipes doctor`` asks. Torch-free: torch is asked in a process of its own."""

from __future__ import annotations

import json
import os
import platform
import re
import shutil
import socket
import subprocess
import sys
import tempfile
import time
from dataclasses import dataclass
from pathlib import Path
from typing import Any, Literal

from llmrecipes.plan.units import gibibytes

# Oldest driver for each major version of CUDA (NVIDIA's table of minor version compatibility).
_OLDEST_DRIVER = {11: (450, 80), 12: (525, 60), 13: (580, 0)}
_WRITTEN = 64 * 2**20
_SLOW_DISK = 50e6
_LEAST_FREE = 10 * 2**30


@dataclass(frozen=True)
class Finding:
    """An answer: whether it stops a training (``block``), may hurt (``warn``) or is well; and what to do."""

    state: Literal["ok", "warn", "block"]
    what: str
    do: str = ""


@dataclass(frozen=True)
class Needs:
    """What is to be run here.

    Attributes:
        run_root: where runs are written. tokenizer: a folder to try, or None.
        compiles: the recipe fuses its blocks, so that a compiler is needed. gpu: it trains on GPUs.
        ranks: processes. checkpoint: bytes of one, 0 = not known. timeout: seconds for a process that is asked.
    """

    run_root: Path
    tokenizer: Path | None = None
    compiles: bool = False
    gpu: bool = False
    ranks: int = 1
    checkpoint: float = 0.0
    timeout: float = 60.0


def needs_of(recipe: Path | None, run_root: Path, tokenizer: Path | None, timeout: float) -> Needs:
    """What a recipe needs; without one, nothing in particular.

    Raises:
        UserError: the recipe has mistakes.
    """
    if recipe is None:
        return Needs(run_root, tokenizer, timeout=timeout)
    from llmrecipes.recipe import checked_recipe
    from llmrecipes.recipe.rules.facts import CONFIG, DATA, MODEL, Facts
    from llmrecipes.recipe.rules.model import build_config

    facts = Facts(checked_recipe([recipe], files=False).data)
    named = facts.get(*DATA, "tokenizer")
    return Needs(
        run_root,
        tokenizer or (Path(named) if isinstance(named, str) else None),
        compiles=facts.get(*MODEL, "compile") is True,
        gpu=facts.get("trainer", "accelerator") in ("gpu", "cuda"),
        ranks=facts.data_ranks,
        checkpoint=12.0 * build_config(facts.mapping(*CONFIG)).num_params,
        timeout=timeout,
    )


def python(needs: Needs) -> list[Finding]:  # noqa: ARG001
    """The interpreter, and whether it can build extensions (Triton does)."""
    version = platform.python_version()
    found = [Finding("ok", f"Python {version}, {platform.platform()}")]
    if not (3, 11) <= sys.version_info[:2] < (3, 14):
        found = [
            Finding("block", f"Python {version}; 3.11 to 3.13 are needed", "make the environment with one of them")
        ]
    return found


def compiler(needs: Needs) -> list[Finding]:
    """A C++ compiler that really compiles: torch.compile needs one, and so does building flash-attn."""
    name = os.environ.get("CXX") or next((c for c in ("g++", "c++", "clang++") if shutil.which(c)), None)
    state: Literal["warn", "block"] = "block" if needs.compiles else "warn"
    consequence = "the recipe says compile: true" if needs.compiles else "recipes with compile: true stop without it"
    do = f"sudo apt install g++ (or dnf install gcc-c++, module load gcc); {consequence}"
    if name is None:
        return [Finding(state, "no C++ compiler: neither g++ nor c++ nor clang++", do)]
    with tempfile.TemporaryDirectory() as folder:
        source = Path(folder, "probe.cpp")
        source.write_text("#include <vector>\nint main() { return std::vector<int>{0}[0]; }\n", encoding="utf-8")
        target = str(Path(folder, "probe"))
        try:
            done = subprocess.run(
                [*name.split(), str(source), "-o", target], capture_output=True, text=True, timeout=needs.timeout
            )
        except OSError as error:
            return [Finding(state, f"{name} cannot be run: {error.strerror}", do)]
        if done.returncode:
            line = (done.stderr.strip().splitlines() or ["no message"])[-1]
            return [Finding(state, f"{name} does not compile five words of C++: {line}", do)]
    return [Finding("ok", f"{name} compiles")]


def driver(needs: Needs) -> list[Finding]:
    """NVIDIA's driver, and GPUs that something else is using."""
    state: Literal["ok", "block"] = "block" if needs.gpu else "ok"
    if shutil.which("nvidia-smi") is None:
        do = "install NVIDIA's driver, or go to a node with GPUs (srun --gpus=1)" if needs.gpu else ""
        return [Finding(state, "no NVIDIA driver (nvidia-smi is not there)" + ("" if needs.gpu else ": CPU only"), do)]
    query = "--query-gpu=driver_version,name,memory.used,memory.total"
    done = subprocess.run(
        ["nvidia-smi", query, "--format=csv,noheader,nounits"], capture_output=True, text=True, timeout=needs.timeout
    )
    if done.returncode:
        said = ((done.stdout + done.stderr).strip().splitlines() or ["no message"])[0]
        return [Finding(state if needs.gpu else "warn", f"nvidia-smi fails: {said}", "reboot or reinstall the driver")]
    found = []
    for number, line in enumerate(done.stdout.strip().splitlines()):
        version, name, used, total = (part.strip() for part in line.split(","))
        taken = used.isdecimal() and total.isdecimal() and int(used) > 0.05 * int(total)
        what = f"GPU {number}: {name}, driver {version}"
        if taken:
            found.append(Finding("warn", f"{what}, {used} of {total} MiB in use", "nvidia-smi shows by whom"))
        else:
            found.append(Finding("ok", what))
    return found or [Finding(state, "the driver sees no GPU", "check nvidia-smi and CUDA_VISIBLE_DEVICES")]


_LATE = "no answer in time"


def _ask(name: str, timeout: float) -> dict[str, Any] | str:
    """What a process of its own finds out; a sentence where it fails."""
    command = [sys.executable, "-c", f"from llmrecipes.plan.torch_probe import main; main('{name}')"]
    try:
        done = subprocess.run(command, capture_output=True, text=True, timeout=0.9 * timeout, stdin=subprocess.DEVNULL)
    except subprocess.TimeoutExpired:
        return f"{_LATE} ({0.9 * timeout:g} s)"
    for line in done.stdout.splitlines():
        if line.startswith("FACTS "):
            return json.loads(line.removeprefix("FACTS "))
    if done.returncode < 0:
        return f"killed by signal {-done.returncode}"
    return (done.stderr.strip().splitlines() or [f"exit code {done.returncode}"])[-1]


def torch(needs: Needs) -> list[Finding]:
    """Torch, whether it matches driver and GPU, and flash-attn."""
    said = _ask("torch", needs.timeout)
    if isinstance(said, str) and said.startswith(_LATE):
        return [Finding("warn", f"torch: {said}", "a busy machine, or a driver that hangs: repeat with --timeout 300")]
    if isinstance(said, str):
        return [Finding("block", f"torch: {said}", "pip install llmrecipes again, in a fresh environment")]
    found = [Finding("ok", f"torch {said['torch']}, {said['threads']} threads")]
    cuda, gpus = said["cuda"], said["gpus"]
    if cuda and not gpus:
        state: Literal["warn", "block"] = "block" if needs.gpu else "warn"
        version = _driver_version()
        oldest = _OLDEST_DRIVER.get(int(cuda.split(".")[0]))
        if version and oldest and version < oldest:
            have, least = ".".join(map(str, version)), ".".join(map(str, oldest))
            what = f"the driver {have} is too old for torch's CUDA {cuda}: {least} at least"
            found.append(Finding(state, what, "update the driver, or install a torch for an older CUDA"))
        else:
            what = f"torch was built for CUDA {cuda} and sees no GPU"
            found.append(Finding(state, what, "see driver above; CUDA_VISIBLE_DEVICES may hide them"))
    elif not cuda and needs.gpu:
        do = "pip install torch from the index for your CUDA version"
        found.append(Finding("block", "torch is a CPU build, the recipe wants GPUs", do))
    for number, gpu in enumerate(gpus):
        text = f"GPU {number}: {gpu['name']}, {gibibytes(gpu['memory'])}, capability {gpu['capability']}"
        old = float(gpu["capability"]) < 8.0
        do = "precision 16-mixed or 32-true instead of bf16" if old else ""
        found.append(Finding("warn" if old else "ok", text + (", no bf16" if old else ""), do))
    found += _flash(said["flash_attn"], bool(gpus), needs)
    if said["nccl"]:
        found.append(Finding("ok", f"NCCL {said['nccl']}"))
    if needs.gpu and gpus and needs.ranks > len(gpus) and "SLURM_JOB_ID" not in os.environ:
        what = f"the recipe wants {needs.ranks} processes, here are {len(gpus)} GPUs"
        found.append(Finding("warn", what, "set trainer.devices and num_nodes, or run on the cluster"))
    return found


def _flash(version: str | None, gpus: bool, needs: Needs) -> list[Finding]:
    if version is None:
        if not gpus and not needs.gpu:
            return []
        do = "pip install 'llmrecipes[gpu]' (builds for minutes, needs nvcc and g++)"
        return [Finding("warn", "flash-attn is not installed: packed documents are slower", do)]
    if version.startswith("broken"):
        return [Finding("warn", f"flash-attn {version}", "rebuild it for this torch: pip install --no-build-isolation")]
    return [Finding("ok", f"flash-attn {version}")]


def _driver_version() -> tuple[int, int] | None:
    try:
        text = Path("/proc/driver/nvidia/version").read_text(encoding="utf-8")
    except OSError:
        return None
    found = re.search(r"\b(\d{3})\.(\d+)", text)
    return (int(found[1]), int(found[2])) if found else None


def network(needs: Needs) -> list[Finding]:
    """Interfaces that were named exist, this host's name resolves, and gloo forms a group."""
    found = []
    there = sorted(name for _, name in socket.if_nameindex())
    for variable in ("GLOO_SOCKET_IFNAME", "NCCL_SOCKET_IFNAME"):
        asked = os.environ.get(variable)
        names = [name for name in (asked or "").lstrip("^=").split(",") if name]
        exact = variable.startswith("GLOO") or (asked or "").startswith("=")
        missing = [n for n in names if not any(t == n if exact else t.startswith(n) for t in there)]
        if missing and not (asked or "").startswith("^"):
            do = f"one of {', '.join(there)}, or unset it"
            found.append(Finding("block", f"{variable}={asked}: there is no interface {', '.join(missing)}", do))
    host = socket.gethostname()
    try:
        address = socket.gethostbyname(host)
    except OSError:
        do = f"add '127.0.1.1 {host}' to /etc/hosts, or set GLOO_SOCKET_IFNAME to one of {', '.join(there)}"
        found.append(Finding("warn", f"the host name {host} does not resolve", do))
    else:
        state: Literal["ok", "warn"] = "ok"
        do = ""
        if address.startswith("127.") and os.environ.get("SLURM_NNODES", "1") != "1":
            state, do = "warn", "set GLOO_SOCKET_IFNAME and NCCL_SOCKET_IFNAME to the cluster's interface"
        found.append(Finding(state, f"{host} is {address}; interfaces {', '.join(there)}", do))
    said = _ask("gloo", needs.timeout)
    if isinstance(said, str) and said.startswith(_LATE):
        found.append(Finding("warn", f"gloo: {said}", "a busy machine, or a network that hangs: try --timeout 300"))
    elif isinstance(said, str):
        do = f"set GLOO_SOCKET_IFNAME to one of {', '.join(there)}"
        found.append(Finding("block" if needs.ranks > 1 else "warn", f"gloo forms no group: {said}", do))
    else:
        found.append(Finding("ok", "gloo forms a group"))
    return found


def host(needs: Needs) -> list[Finding]:
    """Cores, memory, shared memory, open files."""
    import resource

    cores = len(os.sched_getaffinity(0)) if hasattr(os, "sched_getaffinity") else os.cpu_count() or 1
    found = []
    memory = _available_memory()
    text = f"{cores} cores" + ("" if memory is None else f", {gibibytes(memory)} of memory free")
    if memory is not None and memory < 2 * 2**30:
        found.append(Finding("warn", text, "a training takes 1 GiB and more beside its model"))
    else:
        found.append(Finding("ok", text))
    threads = os.environ.get("OMP_NUM_THREADS")
    if threads and threads.isdecimal() and int(threads) > cores:
        found.append(Finding("warn", f"OMP_NUM_THREADS={threads} on {cores} cores", f"at most {cores}"))
    files = resource.getrlimit(resource.RLIMIT_NOFILE)[0]
    if 0 < files < 1024:
        found.append(Finding("warn", f"only {files} open files allowed", "ulimit -n 65536"))
    if needs.ranks > 1 and Path("/dev/shm").is_dir() and shutil.disk_usage("/dev/shm").total < 2**28:
        size = gibibytes(shutil.disk_usage("/dev/shm").total)
        found.append(Finding("warn", f"/dev/shm has {size}: NCCL needs more", "docker run --shm-size=8g"))
    return found


def _available_memory() -> float | None:
    """Bytes the kernel could still give, within this container's limit."""
    try:
        text = Path("/proc/meminfo").read_text(encoding="utf-8")
    except OSError:
        return None
    found = re.search(r"MemAvailable:\s+(\d+) kB", text)
    free = float(found[1]) * 1024 if found else None
    try:
        limit = float(Path("/sys/fs/cgroup/memory.max").read_text(encoding="utf-8"))
        used = float(Path("/sys/fs/cgroup/memory.current").read_text(encoding="utf-8"))
    except (OSError, ValueError):  # no limit is written as "max"
        return free
    return limit - used if free is None else min(free, limit - used)


def _existing(path: Path) -> Path:
    """The folder, or the nearest one above it that exists."""
    return next(p for p in (path.absolute(), *path.absolute().parents) if p.exists())


def disk(needs: Needs) -> list[Finding]:
    """Right to write where runs go, room for two checkpoints, and speed."""
    place = _existing(needs.run_root)
    if not place.is_dir():
        return [Finding("block", f"{place} is a file, not a folder", "name another --run_root")]
    free = shutil.disk_usage(place).free
    try:
        with tempfile.TemporaryFile(dir=place) as file:
            block = os.urandom(2**20)
            began = time.perf_counter()
            size = min(_WRITTEN, free // 4) // 2**20 * 2**20
            for _ in range(size // 2**20):
                file.write(block)
            file.flush()
            os.fsync(file.fileno())
            seconds = max(time.perf_counter() - began, 1e-9)
    except OSError as error:
        do = "name another --run_root, or ask for the right to write there"
        return [Finding("block", f"{place} cannot be written: {error.strerror}", do)]
    found = []
    need = max(2.2 * needs.checkpoint, 2**28)
    text = f"{place}: {gibibytes(free)} free"
    if free < need:
        found.append(
            Finding("block", f"{text}; two checkpoints take {gibibytes(need)}", "free some, or another --run_root")
        )
    elif free < max(_LEAST_FREE, 2 * need):
        found.append(Finding("warn", text, "little for checkpoints and shards: set checkpoint.keep_last"))
    else:
        found.append(Finding("ok", text))
    rate = size / seconds
    speed = f"{rate / 1e6:,.0f} MB/s written with fsync"
    save = (
        f", a checkpoint of {gibibytes(needs.checkpoint)} in {needs.checkpoint / rate:,.0f} s"
        if needs.checkpoint
        else ""
    )
    slow = rate < _SLOW_DISK
    found.append(
        Finding("warn" if slow else "ok", speed + save, "checkpoint.background: true, or a faster disk" if slow else "")
    )
    return found


def clock(needs: Needs) -> list[Finding]:
    """This machine's clock against that of the file system."""
    now = time.time()
    if time.gmtime(now).tm_year < 2025:
        do = "set it (timedatectl set-ntp true): downloads and tokens would be refused"
        return [Finding("warn", f"the clock says {time.strftime('%Y-%m-%d', time.gmtime(now))}", do)]
    found = []
    try:
        with tempfile.NamedTemporaryFile(dir=_existing(needs.run_root)) as file:
            apart = abs(os.fstat(file.fileno()).st_mtime - time.time())
        if apart > 5:
            do = "ntp on this node: the age of files would mislead"
            found.append(Finding("warn", f"the file system's clock is {apart:.0f} s away from this one's", do))
    except OSError:
        pass  # disk says it
    return found or [Finding("ok", time.strftime("%Y-%m-%d %H:%M:%S %Z", time.localtime(now)))]


def slurm(needs: Needs) -> list[Finding]:
    """Whether what Slurm started and what the recipe expects are the same."""
    if "SLURM_JOB_ID" not in os.environ:
        where = "sbatch is here, not inside a job" if shutil.which("sbatch") else "no Slurm here"
        return [Finding("ok", where)]
    get = os.environ.get
    nodes, tasks = get("SLURM_JOB_NUM_NODES", get("SLURM_NNODES", "?")), get("SLURM_NTASKS", "?")
    found = [Finding("ok", f"job {get('SLURM_JOB_ID')}: {nodes} nodes, {tasks} tasks")]
    if (
        tasks.isdecimal()
        and needs.ranks > 1
        and int(tasks) not in (needs.ranks, int(nodes) if nodes.isdecimal() else 0)
    ):
        do = f"#SBATCH --ntasks={needs.ranks} (one per GPU, with srun), or one per node with torchrun"
        found.append(Finding("block", f"{tasks} tasks, the recipe wants {needs.ranks} processes", do))
    if "SLURM_PROCID" not in os.environ and tasks.isdecimal() and int(tasks) > 1:
        found.append(Finding("warn", "not started by srun: only this task would train", "srun llmrecipes fit ..."))
    if get("SLURM_JOB_NAME") in ("bash", "interactive"):
        do = "start it with sbatch, or unset SLURM_NTASKS"
        found.append(Finding("warn", f"the job's name is {get('SLURM_JOB_NAME')}: Lightning takes it for a shell", do))
    return found


def tokenizer(needs: Needs) -> list[Finding]:
    """Whether the recipe's tokenizer opens, and gives a text back."""
    if needs.tokenizer is None:
        return [Finding("ok", "none named (--tokenizer DIR, or a recipe)")]
    from llmrecipes.data.tokenizer import Tokenizer
    from llmrecipes.errors import UserError

    try:
        opened = Tokenizer(needs.tokenizer)
        ids = opened.encode("日本の the 12")
    except UserError as error:
        return [Finding("block", str(error), "llmrecipes data tokenizer trains one; or copy the folder here")]
    return [Finding("ok", f"{needs.tokenizer}: {opened.vocab_size:,} pieces, {len(ids)} for '日本の the 12'")]

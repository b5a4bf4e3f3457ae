"""Compile the C++ sources of this package for the processor at hand, once, and load them."""

from __future__ import annotations

import ctypes
import fcntl
import hashlib
import logging
import os
import shlex
import shutil
import subprocess
import sys
import tempfile
from pathlib import Path

log = logging.getLogger("llmrecipes")

# The variable that leaves everything to torch when it is "0".
SWITCH = "LLMRECIPES_CPU_KERNELS"
_OPTIONS = ("-std=c++17", "-O3", "-fopenmp", "-shared", "-fPIC")


def processor_vendor() -> str:
    """``AuthenticAMD``, ``GenuineIntel``, ...; nothing where the system does not say (no Linux)."""
    return _told("vendor_id")


def processor_features() -> frozenset[str]:
    """What the processor can do, in the system's words (``avx512f``, ...); nothing where it does not say."""
    return frozenset(_told("flags").split())


def _told(name: str) -> str:
    try:
        text = Path("/proc/cpuinfo").read_text(encoding="utf-8")
    except OSError:
        return ""
    line = next((line for line in text.splitlines() if line.startswith(name)), "")
    return line.partition(":")[2].strip()


def load_library(folder: Path, features: list[str]) -> ctypes.CDLL | None:
    """Load the sources of ``folder``, compiled for ``features`` of the processor; compile where nobody has before.

    The library stays in ``llmrecipes/kernels`` of the user's cache, under the digest of all that it was made of.

    Returns:
        The library, or None, with one line in the log, where there is no compiler or where it fails.
    """
    if sys.platform != "linux":
        return None
    compiler = shlex.split(os.environ.get("CXX") or "g++")
    if shutil.which(compiler[0]) is None:
        log.info(f"no C++ compiler ({compiler[0]}): torch's own attention is used, some times slower on this CPU")
        return None
    # Named rather than "native": a home folder may be shared by machines that differ.
    command = [*compiler, *_OPTIONS, *(f"-m{name}" for name in features)]
    files = sorted(file for file in folder.iterdir() if file.suffix in (".cpp", ".h"))
    digest = hashlib.sha256(b"|".join([*(word.encode() for word in command), *(file.read_bytes() for file in files)]))
    sources = [str(file) for file in files if file.suffix == ".cpp"]
    try:
        return _compiled_once([*command, *sources], _cache() / f"cpu-{digest.hexdigest()[:16]}.so")
    except (OSError, RuntimeError, subprocess.SubprocessError) as error:  # RuntimeError: a user without a home
        said = str(error.stderr if isinstance(error, subprocess.CalledProcessError) else error)
        log.warning(
            f"kernels for this CPU could not be compiled or loaded ({_first_line(said)}): torch's own attention is "
            f"used, some times slower; {SWITCH}=0 in the environment says that this is meant"
        )
        return None


def _first_line(text: str) -> str:
    lines = text.strip().splitlines()
    return next((line for line in lines if "error" in line), lines[0] if lines else "no message")


def _cache() -> Path:
    home = os.environ.get("XDG_CACHE_HOME")
    folder = (Path(home) if home else Path.home() / ".cache") / "llmrecipes" / "kernels"
    folder.mkdir(mode=0o700, parents=True, exist_ok=True)
    return folder


def _compiled_once(command: list[str], library: Path) -> ctypes.CDLL:
    """Of several processes that begin together one compiles, the others wait for it."""
    if not library.exists():
        with (library.parent / "lock").open("w") as lock:
            fcntl.flock(lock, fcntl.LOCK_EX)
            if not library.exists():
                log.info("compiling kernels for this CPU, once: some seconds")
                with tempfile.TemporaryDirectory(dir=library.parent) as folder:
                    made = Path(folder) / library.name
                    subprocess.run([*command, "-o", str(made)], check=True, capture_output=True, text=True, timeout=300)
                    made.replace(library)  # at once: nobody loads half a library
    return ctypes.CDLL(str(library))

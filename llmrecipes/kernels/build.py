"""Compile a C++ source of this package for the processor at hand, once, and load it."""

from __future__ import annotations

import ctypes
import fcntl
import hashlib
import logging
import os
import shutil
import subprocess
import sys
import tempfile
from pathlib import Path

log = logging.getLogger("llmrecipes")

# The variable that leaves everything to torch when it is "0".
SWITCH = "LLMRECIPES_CPU_KERNELS"
_OPTIONS = ("-std=c++17", "-O3", "-fopenmp", "-shared", "-fPIC")


def processor_features() -> frozenset[str]:
    """What the processor can do, in the kernel's words (``avx512f``, ...); nothing where that is not told (no Linux)."""
    try:
        text = Path("/proc/cpuinfo").read_text(encoding="utf-8")
    except OSError:
        return frozenset()
    flags = next((line for line in text.splitlines() if line.startswith("flags")), "")
    return frozenset(flags.partition(":")[2].split())


def load_kernels(source: Path, features: list[str]) -> ctypes.CDLL | None:
    """Load ``source``, compiled for ``features`` of the processor; compile it where no earlier process of ours did.

    The library stays in ``llmrecipes/kernels`` of the user's cache, under the digest of all that it was made of.

    Returns:
        The library, or None, with one line in the log, where there is no compiler or where it fails.
    """
    if os.environ.get(SWITCH) == "0" or sys.platform != "linux":
        return None
    compiler = shutil.which(os.environ.get("CXX") or "g++")
    if compiler is None:
        log.info("no C++ compiler (g++, or $CXX): attention on this CPU is torch's, which takes several times as long")
        return None
    # Named rather than "native": a home folder may be shared by machines that differ.
    words = [*_OPTIONS, *(f"-m{name}" for name in features)]
    made_of = [compiler.encode(), *(word.encode() for word in words), source.read_bytes()]
    name = f"{source.stem}-{hashlib.sha256(b'|'.join(made_of)).hexdigest()[:16]}.so"
    try:
        folder = _cache()
        return _compiled_once([compiler, *words, str(source)], folder / name)
    except (OSError, subprocess.SubprocessError) as error:
        said = error.stderr if isinstance(error, subprocess.CalledProcessError) else error
        first = str(said).strip().splitlines()[:1]
        log.warning(
            f"{source.name} could not be compiled ({' '.join(first)}): torch's attention is used, which takes several "
            f"times as long on this CPU; {SWITCH}=0 says that this is fine"
        )
        return None


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
                log.info(f"compiling {library.stem.partition('-')[0]} for this processor, once, some seconds")
                with tempfile.TemporaryDirectory(dir=library.parent) as folder:
                    made = Path(folder) / library.name
                    subprocess.run(
                        [*command, "-o", str(made)], check=True, capture_output=True, text=True, timeout=300
                    )
                    made.replace(library)  # at once: nobody loads half a library
    return ctypes.CDLL(str(library))

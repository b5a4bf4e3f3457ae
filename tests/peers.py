"""Peers in an environment of their own: nothing of the project depends on them."""

from __future__ import annotations

import hashlib
import os
import shutil
import subprocess
import sys
from pathlib import Path

import pytest

KEPT = Path(__file__).parents[1] / ".pytest_cache" / "peers"  # the next run of the tests finds them


def peer_packages(factory: pytest.TempPathFactory, *requirements: str) -> Path:
    """A folder with packages, beside those that are installed; skips where they cannot be had.

    Args:
        requirements: as for pip; their dependencies are the project's, or named too.
    """
    digest = hashlib.sha256("\n".join([sys.version, *requirements]).encode()).hexdigest()[:16]
    kept = KEPT / digest
    if not kept.is_dir():
        folder = factory.mktemp("peer") / digest
        command = [sys.executable, "-m", "pip", "install", "--quiet", "--no-deps", "--target", str(folder)]
        done = subprocess.run([*command, *requirements], capture_output=True, text=True, timeout=300)
        if done.returncode:
            pytest.skip(f"pip cannot install {' '.join(requirements)} here: {done.stderr.strip().splitlines()[-1]}")
        KEPT.mkdir(parents=True, exist_ok=True)
        arriving = KEPT / f".{digest}.{os.getpid()}"
        shutil.copytree(folder, arriving)
        try:
            arriving.rename(kept)
        except OSError:  # another worker was quicker
            shutil.rmtree(arriving)
    return kept


def run_with_peer(packages: Path, script: Path, *words: object) -> str:
    """Run a script with the peer's packages in front of the path; what it printed."""
    paths = [str(packages), *filter(None, [os.environ.get("PYTHONPATH")])]
    done = subprocess.run(
        [sys.executable, str(script), *map(str, words)],
        capture_output=True,
        text=True,
        timeout=300,
        env=os.environ | {"PYTHONPATH": os.pathsep.join(paths)},
    )
    assert done.returncode == 0, done.stderr[-3000:]
    return done.stdout

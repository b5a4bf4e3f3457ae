"""The one log: on the terminal, beside a progress bar without breaking it, and in the run's ``log.txt``."""

from __future__ import annotations

import logging
import sys
import threading
from pathlib import Path
from typing import Any

from tqdm import tqdm

log = logging.getLogger("llmrecipes")


class ConsoleHandler(logging.Handler):
    """Prints through tqdm, which moves its bar out of the way.

    Args:
        rank: ``rank 3``: only warnings and errors, with this before them; rank 0, which has no name, speaks for all.
    """

    def __init__(self, rank: str = "") -> None:
        super().__init__(logging.WARNING if rank else logging.INFO)
        self._rank = f"[{rank}] " if rank else ""

    def emit(self, record: logging.LogRecord) -> None:
        prefix = "" if record.levelno < logging.WARNING else f"{record.levelname.lower()}: "
        file = sys.stderr if self._rank or record.levelno >= logging.ERROR else sys.stdout
        tqdm.write(self._rank + prefix + record.getMessage(), file=file)
        file.flush()


class LazyFileHandler(logging.FileHandler):
    """A file that comes into being with its first line."""

    def __init__(self, path: Path) -> None:
        super().__init__(path, encoding="utf-8", delay=True)
        self.setLevel(logging.WARNING)

    def _open(self) -> Any:
        Path(self.baseFilename).parent.mkdir(parents=True, exist_ok=True)
        return super()._open()


def start_log(folder: Path | None = None, rank: str = "") -> None:
    """Log to the console and to a file; replaces handlers of an earlier call.

    Args:
        folder: of ``log.txt``; None = console only.
        rank: ``rank 3`` where this is not the first process: its warnings go to ``log-rank00003.txt``.
    """
    # tqdm's own lock is shared with processes forked later: one that is killed while it prints would silence them all.
    tqdm.set_lock(threading.RLock())
    for handler in list(log.handlers):
        handler.close()
        log.removeHandler(handler)
    log.setLevel(logging.INFO)
    log.propagate = False
    log.addHandler(ConsoleHandler(rank))
    if folder is not None:
        file = _file(folder, rank)
        file.setFormatter(logging.Formatter("%(asctime)s %(levelname).1s %(message)s", "%Y-%m-%d %H:%M:%S"))
        log.addHandler(file)


def _file(folder: Path, rank: str) -> logging.FileHandler:
    if rank:
        return LazyFileHandler(folder / f"log-rank{int(rank.split()[-1]):05d}.txt")
    folder.mkdir(parents=True, exist_ok=True)
    return logging.FileHandler(folder / "log.txt", encoding="utf-8")

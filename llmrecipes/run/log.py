"""The one log: on the terminal, beside a progress bar without breaking it, and in the run's ``log.txt``."""

from __future__ import annotations

import logging
import sys
from pathlib import Path

from tqdm import tqdm

log = logging.getLogger("llmrecipes")


class ConsoleHandler(logging.Handler):
    """Prints through tqdm, which moves its bar out of the way."""

    def emit(self, record: logging.LogRecord) -> None:
        prefix = "" if record.levelno < logging.WARNING else f"{record.levelname.lower()}: "
        tqdm.write(prefix + record.getMessage(), file=sys.stdout)
        sys.stdout.flush()


def start_log(folder: Path | None = None) -> None:
    """Log to the console and, when given, to ``folder/log.txt``; replaces handlers of an earlier call."""
    for handler in list(log.handlers):
        handler.close()
        log.removeHandler(handler)
    log.setLevel(logging.INFO)
    log.propagate = False
    log.addHandler(ConsoleHandler())
    if folder is not None:
        folder.mkdir(parents=True, exist_ok=True)
        file = logging.FileHandler(folder / "log.txt", encoding="utf-8")
        file.setFormatter(logging.Formatter("%(asctime)s %(levelname).1s %(message)s", "%Y-%m-%d %H:%M:%S"))
        log.addHandler(file)

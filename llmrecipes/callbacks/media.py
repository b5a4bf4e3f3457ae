"""Tables and pictures for loggers that take them (wandb); others go without."""

from __future__ import annotations

import logging
from collections.abc import Iterable, Sequence
from pathlib import Path
from typing import Any

log = logging.getLogger("llmrecipes")


def show_table(loggers: Iterable[Any], name: str, rows: Sequence[dict[str, Any]], step: int) -> None:
    """A table; every row has the same columns."""
    if rows:
        columns = list(rows[0])
        _show(loggers, "log_table", name, step, columns, [[row[column] for column in columns] for row in rows])


def show_image(loggers: Iterable[Any], name: str, path: Path, step: int) -> None:
    """A picture of a file."""
    if path.exists():
        _show(loggers, "log_image", name, step, [str(path)])


def _show(loggers: Iterable[Any], method: str, name: str, step: int, *what: Any) -> None:
    """What only shows something ends no run."""
    for logger in loggers:
        if hasattr(logger, method):
            try:
                getattr(logger, method)(name, *what, step=step)
            except Exception as error:
                log.warning(f"{name} was not logged: {type(error).__name__}: {error}")

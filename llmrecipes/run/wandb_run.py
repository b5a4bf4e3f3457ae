"""One wandb run per run folder, however often it is resumed."""

from __future__ import annotations

import secrets
from collections.abc import Iterator
from pathlib import Path
from typing import Any

FILE = "wandb_id"


def give_run_id(trainer: Any, folder: Path, fresh: bool) -> str | None:
    """Let the recipe's WandbLogger go on with the run folder's id; one that the recipe gives stays.

    Args:
        trainer: the recipe's section, before anything is built.
        folder: the run folder. fresh: an earlier run there steps aside, and so does its id.

    Returns:
        The id, to be written down once the folder is owned; None without a WandbLogger.
    """
    path = folder / FILE
    known = path.read_text(encoding="utf-8").strip() if path.exists() and not fresh else ""
    run_id = None
    for logger in _wandb_loggers(trainer.get("logger")):
        arguments = logger.setdefault("init_args", {}) if isinstance(logger, dict) else logger.init_args
        run_id = arguments.get("id") or known or secrets.token_hex(4)
        arguments["id"] = run_id
        # jsonargparse keeps what goes to wandb.init beside the logger's own arguments.
        logger["dict_kwargs"] = {"resume": "allow"} | dict(logger.get("dict_kwargs") or {})
    return run_id


def _wandb_loggers(loggers: Any) -> Iterator[Any]:
    for logger in loggers if isinstance(loggers, list) else [loggers]:
        if hasattr(logger, "get") and str(logger.get("class_path")).endswith("WandbLogger"):
            yield logger

"""One wandb run per run folder, however often it is resumed."""

from __future__ import annotations

import logging
import netrc
import os
import secrets
import socket
from collections.abc import Iterator
from pathlib import Path
from typing import Any
from urllib.parse import urlsplit

from llmrecipes.process import rank_name

log = logging.getLogger("llmrecipes")

FILE = "wandb_id"
SERVICE = "https://api.wandb.ai"
PATIENCE = 5.0  # seconds for the service to answer


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
        if reason := why_offline(arguments):
            arguments["offline"] = True
            if not rank_name():  # the first process says it for all
                log.warning(f"wandb is offline, {reason}; `wandb sync` sends what it keeps")
        # jsonargparse keeps what goes to wandb.init beside the logger's own arguments.
        logger["dict_kwargs"] = {"resume": "allow"} | dict(logger.get("dict_kwargs") or {})
    return run_id


def _wandb_loggers(loggers: Any) -> Iterator[Any]:
    for logger in loggers if isinstance(loggers, list) else [loggers]:
        if hasattr(logger, "get") and str(logger.get("class_path")).endswith("WandbLogger"):
            yield logger


def why_offline(arguments: Any) -> str | None:
    """Why a run cannot be sent while it trains; None where it can, or where the user said what to do.

    Args:
        arguments: of the WandbLogger; its ``offline: true`` and ``$WANDB_MODE`` stand.
    """
    if arguments.get("offline") or os.environ.get("WANDB_MODE"):
        return None
    service = urlsplit(os.environ.get("WANDB_BASE_URL") or SERVICE)
    host = service.hostname or ""
    if not _has_key(host):
        return f"no key: neither $WANDB_API_KEY nor an entry for {host} in ~/.netrc (wandb login writes it)"
    try:
        with socket.create_connection((host, service.port or 443), timeout=PATIENCE):
            return None
    except OSError as error:
        return f"{host} does not answer ({error})"


def _has_key(host: str) -> bool:
    if os.environ.get("WANDB_API_KEY"):
        return True
    try:
        return netrc.netrc(os.environ.get("NETRC")).authenticators(host) is not None
    except (OSError, netrc.NetrcParseError):
        return False

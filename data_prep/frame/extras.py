"""Libraries that only data preparation needs: `pip install 'llmrecipes[data]'`."""

from __future__ import annotations

import importlib
from types import ModuleType

from llmrecipes.errors import UserError


def need(module: str, package: str | None = None) -> ModuleType:
    """Imports a module of the extra `data`.

    Raises:
        UserError: it is not installed.
    """
    try:
        return importlib.import_module(module)
    except ImportError as error:
        if error.name is not None and error.name.split(".")[0] != module.split(".")[0]:
            raise  # it is there, and broken in itself: not for us to explain
        raise UserError(f"{package or module} is not installed: pip install 'llmrecipes[data]'") from None

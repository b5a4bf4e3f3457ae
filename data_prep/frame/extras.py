"""Libraries that only data preparation needs: `pip install 'llmrecipes[data]'`, or a smaller extra beside it."""

from __future__ import annotations

import importlib
from types import ModuleType

from llmrecipes.errors import UserError


def need(module: str, package: str | None = None, extra: str = "data") -> ModuleType:
    """Imports a module of an extra.

    Raises:
        UserError: it is not installed.
    """
    try:
        return importlib.import_module(module)
    except ImportError as error:
        if error.name is not None and error.name.split(".")[0] != module.split(".")[0]:
            raise  # it is there, and broken in itself: not for us to explain
        raise UserError(f"{package or module} is not installed: pip install 'llmrecipes[{extra}]'") from None

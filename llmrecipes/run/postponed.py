"""Lightning without the metrics nobody asked for.

Lightning needs two base classes of torchmetrics. ``import torchmetrics`` brings every metric there is, and with them
scipy's signals, transformers' models and matplotlib: half of the CPU time that importing Lightning takes.
"""

from __future__ import annotations

import sys
from importlib import import_module
from importlib.util import find_spec, module_from_spec
from logging import getLogger
from types import ModuleType
from typing import Any

_NAME = "torchmetrics"
_PLOTS = f"{_NAME}.utilities.plot"


def postpone_metrics() -> None:
    """Let ``import torchmetrics`` bring its base classes; any other name of it then imports the rest.

    To be called before Lightning is imported. Where the package is made otherwise than it was in version 1.9, it is
    imported whole, as ever.
    """
    spec = None if _NAME in sys.modules else find_spec(_NAME)
    if spec is None:
        return
    package = module_from_spec(spec)
    package._logger = getLogger(_NAME)  # type: ignore[attr-defined]  # all that the modules below take from the package
    sys.modules[_NAME], sys.modules[_PLOTS] = package, _Plots(_PLOTS)
    try:
        package.__version__ = import_module(f"{_NAME}.__about__").__version__  # type: ignore[attr-defined]
        import_module(f"{_NAME}.utilities")  # first: it and the next import each other
        package.Metric = import_module(f"{_NAME}.metric").Metric  # type: ignore[attr-defined]
        package.MetricCollection = import_module(f"{_NAME}.collections").MetricCollection  # type: ignore[attr-defined]
    except (ImportError, AttributeError):
        for name in [name for name in sys.modules if name.partition(".")[0] == _NAME]:
            del sys.modules[name]
        return
    package.__class__ = _Postponed
    del sys.modules[_PLOTS]


class _Plots(ModuleType):
    """What the base classes take from the module of plots: types, which only annotate, and functions to be called."""

    def __getattr__(self, name: str) -> Any:
        if name.startswith("__"):
            raise AttributeError(name)
        return object if name.startswith("_") else lambda *a, **k: getattr(import_module(_PLOTS), name)(*a, **k)


class _Postponed(ModuleType):
    """A package of which some names are there; asked for another, it is executed as if imported now."""

    def __getattr__(self, name: str) -> Any:
        self.__class__ = ModuleType  # type: ignore[assignment]
        self.__spec__.loader.exec_module(self)  # type: ignore[union-attr]
        return getattr(self, name)

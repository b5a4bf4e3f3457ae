"""Packages whose names are imported when they are used: what reads a metrics file needs no Lightning."""

from __future__ import annotations

from importlib import import_module
from typing import Any


def named(package: str, home: dict[str, str], name: str) -> Any:
    """What ``package.name`` stands for; a package's ``__getattr__`` (PEP 562) returns it.

    Args:
        package: the package's ``__name__``.
        home: the module, within the package, of each public name.
        name: the one asked for.

    Raises:
        AttributeError: the package has no such name; ``from package import module`` then looks for a module.
    """
    if name not in home:
        raise AttributeError(f"module {package!r} has no attribute {name!r}")
    return getattr(import_module(f"{package}.{home[name]}"), name)

"""One mistake in a recipe: where it stands, what is wrong, what to do."""

from __future__ import annotations

import difflib
from collections.abc import Iterable
from dataclasses import dataclass, field

Path = tuple[str | int, ...]


@dataclass(frozen=True)
class Problem:
    """A mistake of the user, printed on one line.

    Args:
        where: ``file:line``, or ``command line: --a.b.c``.
        what: what is wrong.
        hint: what to do, such as ``did you mean 'x'?``; may be empty.
        path: the keys that lead to the value, for code that wants to know whether a value is sound.
    """

    where: str
    what: str
    hint: str = ""
    path: Path = field(default=(), compare=False)

    def __str__(self) -> str:
        text = f"{self.where}: {self.what}" + (f" - {self.hint}" if self.hint else "")
        return " ".join(text.split())


def dotted(path: Iterable[str | int]) -> str:
    """``('a', 'b', 0)`` as ``a.b.0``, the way keys are written on the command line."""
    return ".".join(str(key) for key in path)


def closest(name: object, known: Iterable[str], cutoff: float = 0.6) -> str | None:
    """The known name most like ``name``, or None when none is near."""
    matches = difflib.get_close_matches(str(name), list(known), n=1, cutoff=cutoff)
    return matches[0] if matches else None


def did_you_mean(name: str | None) -> str:
    """The hint for a suggestion; empty for none."""
    return f"did you mean '{name}'?" if name else ""

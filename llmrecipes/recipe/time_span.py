"""Times by the clock: ``3h50m``, ``90m``, ``2d``."""

from __future__ import annotations

import re

_SECONDS = {"d": 86400, "h": 3600, "m": 60, "s": 1}
_PATTERN = re.compile(r"(?:(\d+(?:\.\d+)?)d)?(?:(\d+(?:\.\d+)?)h)?(?:(\d+(?:\.\d+)?)m)?(?:(\d+(?:\.\d+)?)s)?")


class TimeSpan:
    """A time by the clock, in seconds. Immutable.

    Not a dataclass on purpose: jsonargparse would then ask for ``{seconds}`` instead of ``3h50m``.

    Args:
        seconds: above 0.
    """

    __slots__ = ("seconds",)
    seconds: float

    def __init__(self, seconds: float) -> None:
        object.__setattr__(self, "seconds", float(seconds))

    def __setattr__(self, name: str, value: object) -> None:
        raise AttributeError(f"a TimeSpan does not change: {name}")

    def __eq__(self, other: object) -> bool:
        return isinstance(other, TimeSpan) and self.seconds == other.seconds

    def __hash__(self) -> int:
        return hash(self.seconds)

    def __repr__(self) -> str:
        return f"TimeSpan({self.seconds:g})"

    @classmethod
    def parse(cls, text: str | int | TimeSpan) -> TimeSpan:
        """Read ``"3h50m"``, ``"90m"``, ``"2d"`` or ``"1d 12h"``.

        Raises:
            ValueError: no unit, units out of order, zero, or no time at all.
        """
        if isinstance(text, TimeSpan):
            return text
        match = _PATTERN.fullmatch("".join(str(text).lower().split()))
        if match is None or not any(match.groups()):
            raise ValueError(f"{text!r} is not a time: write days, hours, minutes, seconds as '3h50m', '90m' or '2d'")
        seconds = sum(float(n) * _SECONDS[unit] for n, unit in zip(match.groups(), "dhms", strict=True) if n)
        if seconds <= 0:
            raise ValueError(f"{text!r} is no time at all")
        return cls(seconds)

    def __str__(self) -> str:
        left, parts = self.seconds, []
        for unit, size in _SECONDS.items():
            count = left // size if unit != "s" else left
            if count:
                parts.append(f"{count:g}{unit}")
            left -= count * size
        return "".join(parts)

"""Lengths with their unit: ``2000 steps``, ``1.5B tokens``. The unit is never a micro-iteration."""

from __future__ import annotations

import re

_SCALE = {"": 1, "k": 10**3, "m": 10**6, "b": 10**9, "t": 10**12}
_NUMBER = r"[0-9][0-9_,]*\.?[0-9]*(?:e[+-]?[0-9]+)?"
_PATTERN = re.compile(rf"^\s*({_NUMBER})\s*([kmbt]?)\s*(steps?|tokens?)\s*$", re.IGNORECASE)


class Duration:
    """A length in optimizer steps or in tokens. Immutable.

    Tokens are converted with the fixed number of tokens per optimizer step (global batch x sequence length),
    so that a schedule stays a pure function of the step.

    Not a dataclass on purpose: jsonargparse would then ask for ``{value, unit}`` instead of ``2000 steps``.

    Args:
        value: how many.
        unit: ``steps`` or ``tokens``.
    """

    __slots__ = ("unit", "value")
    value: int
    unit: str

    def __init__(self, value: int, unit: str) -> None:
        object.__setattr__(self, "value", value)
        object.__setattr__(self, "unit", unit)

    def __setattr__(self, name: str, value: object) -> None:
        raise AttributeError(f"a Duration does not change: {name}")

    def __eq__(self, other: object) -> bool:
        return isinstance(other, Duration) and (self.value, self.unit) == (other.value, other.unit)

    def __hash__(self) -> int:
        return hash((self.value, self.unit))

    def __repr__(self) -> str:
        return f"Duration({self.value}, {self.unit!r})"

    @classmethod
    def parse(cls, text: str | int | Duration) -> Duration:
        """Read ``"2000 steps"``, ``"150M tokens"`` or ``"2.5e9 tokens"``.

        Raises:
            ValueError: the text has no unit, a fraction of a step, or is not a length at all.
        """
        if isinstance(text, Duration):
            return text
        match = _PATTERN.match(str(text))
        if match is None:
            raise ValueError(f"{text!r} is not a length: write a number and its unit, as '2000 steps' or '1.5B tokens'")
        number, scale, unit = match.groups()
        value = float(number.replace("_", "").replace(",", "")) * _SCALE[scale.lower()]
        if value != int(value):
            raise ValueError(f"{text!r} is not a whole number of {unit}")
        return cls(int(value), "tokens" if unit.lower().startswith("token") else "steps")

    def to_steps(self, tokens_per_step: int) -> int:
        """The length in optimizer steps; tokens are rounded up to a whole step."""
        return self.value if self.unit == "steps" else -(-self.value // tokens_per_step)

    def __str__(self) -> str:
        return f"{self.value} {self.unit}"

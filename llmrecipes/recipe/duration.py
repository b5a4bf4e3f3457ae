"""Lengths with their unit: ``2000 steps``, ``1.5B tokens``. The unit is never a micro-iteration."""

from __future__ import annotations

import re
from dataclasses import dataclass

_SCALE = {"": 1, "k": 10**3, "m": 10**6, "b": 10**9, "t": 10**12}
_PATTERN = re.compile(r"^\s*([0-9][0-9_,]*\.?[0-9]*(?:e[+-]?[0-9]+)?)\s*([kmbt]?)\s*(steps?|tokens?)\s*$", re.IGNORECASE)


@dataclass(frozen=True)
class Duration:
    """A length in optimizer steps or in tokens.

    Tokens are converted with the fixed number of tokens per optimizer step (global batch x sequence length),
    so that a schedule stays a pure function of the step.
    """

    value: int
    unit: str

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
            raise ValueError(f"{text!r} is not a length: write a number and its unit, such as '2000 steps' or '1.5B tokens'")
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

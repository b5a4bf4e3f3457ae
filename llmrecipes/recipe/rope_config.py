"""The typed description of stretched rotary frequencies. Torch-free."""

from __future__ import annotations

import math
from dataclasses import dataclass
from typing import Literal

RopeScalingKind = Literal["llama3", "linear", "yarn", "dynamic", "longrope"]


@dataclass(frozen=True, kw_only=True)
class RopeScaling:
    """Stretching of the rotary frequencies to longer contexts.

    Args:
        kind: ``llama3`` (Llama 3.1) stretches long wavelengths only, ``linear`` all of them (2306.15595), ``yarn`` long
            ones with a ramp, and scales the attention scores (2309.00071). ``dynamic`` (NTK) and ``longrope``
            (2402.13753) turn by other angles once a text is longer than ``original_max_seq_len``: such texts are
            refused, because the result would depend on what else is in the batch and on the cache.
        factor: by how much.
        low_freq_factor, high_freq_factor: where ``llama3`` begins and ends to stretch.
        original_max_seq_len: longest text before the stretching.
        beta_fast, beta_slow: turns within ``original_max_seq_len`` between which the ramp of ``yarn`` lies.
        truncate: round the ends of that ramp to whole pairs of features.
        attention_factor: by which ``yarn`` and ``longrope`` multiply queries and keys; ``null`` = as their papers say.
        short_factor, long_factor: of ``longrope``, one number for each pair of features; ``long_factor`` belongs to
            longer texts and is only carried along.
    """

    kind: RopeScalingKind = "llama3"
    factor: float = 8.0
    low_freq_factor: float = 1.0
    high_freq_factor: float = 4.0
    original_max_seq_len: int = 8192
    beta_fast: float = 32.0
    beta_slow: float = 1.0
    truncate: bool = True
    attention_factor: float | None = None
    short_factor: list[float] | None = None
    long_factor: list[float] | None = None

    @property
    def amplitude(self) -> float:
        """What the rotated features are multiplied by."""
        if self.kind not in ("yarn", "longrope"):
            return 1.0
        if self.attention_factor is not None:
            return self.attention_factor
        if self.factor <= 1:
            return 1.0
        if self.kind == "yarn":
            return 0.1 * math.log(self.factor) + 1.0
        return math.sqrt(1 + math.log(self.factor) / math.log(self.original_max_seq_len))

    @property
    def longest(self) -> int | None:
        """Longest text for which the angles are as computed here; None = any."""
        return self.original_max_seq_len if self.kind in ("dynamic", "longrope") else None

    def problems(self, rotary_width: int) -> list[str]:
        """What does not fit together, as sentences."""
        found = []
        if self.factor <= 0 or self.original_max_seq_len < 2:
            found.append("rope_scaling needs a factor above 0 and an original_max_seq_len above 1")
        if self.kind == "llama3" and not 0 < self.low_freq_factor < self.high_freq_factor:
            found.append("rope_scaling needs 0 < low_freq_factor < high_freq_factor")
        if self.kind == "yarn" and not 0 < self.beta_slow <= self.beta_fast:
            found.append("rope_scaling needs 0 < beta_slow <= beta_fast")
        if self.kind == "longrope":
            for name in ("short_factor", "long_factor"):
                factors = getattr(self, name) or []
                if len(factors) != rotary_width // 2 or min(factors) <= 0:
                    found.append(f"rope_scaling.{name} needs {rotary_width // 2} numbers above 0")
        return found

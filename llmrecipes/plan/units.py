"""Numbers with units, in and out."""

from __future__ import annotations

import argparse
import re

_SCALES = {"": 1.0, "K": 1e3, "M": 1e6, "B": 1e9, "G": 1e9, "T": 1e12}


def count_of(text: str) -> float:
    """``10B``, ``1.5T``, ``200_000``: a number with a suffix of thousands; for argparse."""
    found = re.fullmatch(r"([\d._]+(?:[eE][+-]?\d+)?)\s*([KMBGTkmbgt]?)", text.strip())
    try:
        value = float(found[1]) * _SCALES[found[2].upper()] if found else 0.0
    except ValueError:
        value = 0.0
    if value <= 0:
        raise argparse.ArgumentTypeError(f"'{text}' is not a number above 0 such as 200B, 1.5T or 7e9")
    return value


def share_of(text: str) -> float:
    """``0.4`` or ``40%``, above 0 and at most 1; for argparse."""
    try:
        value = float(text.rstrip("%")) / (100 if text.endswith("%") else 1)
    except ValueError:
        value = 0.0
    if not 0 < value <= 1:
        raise argparse.ArgumentTypeError(f"'{text}' is not a share such as 0.4 or 40%")
    return value


def positive(text: str) -> float:
    """A number above 0; for argparse."""
    try:
        value = float(text)
    except ValueError:
        value = 0.0
    if not 0 < value < float("inf"):
        raise argparse.ArgumentTypeError(f"'{text}' is not a number above 0")
    return value


def short_count(value: float) -> str:
    """``8.96 B``, ``2.36 M``."""
    for size, suffix in ((1e12, " T"), (1e9, " B"), (1e6, " M"), (1e3, " k")):
        if abs(value) >= size:
            return f"{value / size:.3g}{suffix}" if abs(value) < 100 * size else f"{value / size:,.0f}{suffix}"
    return f"{value:.3g}"


def gibibytes(value: float) -> str:
    """Bytes in GiB, in MiB below a tenth of one, in TiB above a thousand."""
    if abs(value) < 0.1 * 2**30:
        return f"{value / 2**20:.1f} MiB"
    if abs(value) >= 1000 * 2**30:
        return f"{value / 2**40:.2f} TiB"
    return f"{value / 2**30:.1f} GiB"


def duration(seconds: float) -> str:
    """``42 s``, ``3.1 min``, ``5.2 h``, ``12.4 d``."""
    for size, name in ((86400, "d"), (3600, "h"), (60, "min")):
        if seconds >= 2 * size:
            return f"{seconds / size:,.1f} {name}"
    return f"{seconds:.2g} s" if seconds < 10 else f"{seconds:.0f} s"

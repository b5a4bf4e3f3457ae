"""Chance that depends on the document only: the same in every order, sharding, process and run."""

from __future__ import annotations

import hashlib


def digest(text: str | bytes, seed: int = 0, purpose: str = "") -> int:
    """A 64-bit hash of a text for one purpose (rules draw independently of each other)."""
    data = text if isinstance(text, bytes) else text.encode("utf-8", "surrogatepass")
    salted = hashlib.blake2b(data, digest_size=8, key=f"{seed}/{purpose}".encode()[:64])
    return int.from_bytes(salted.digest(), "little")


def unit(text: str | bytes, seed: int = 0, purpose: str = "") -> float:
    """A number in [0, 1) from :func:`digest`."""
    return digest(text, seed, purpose) / 2**64

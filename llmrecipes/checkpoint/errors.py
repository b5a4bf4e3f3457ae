"""The one exception of this package."""

from __future__ import annotations


class CheckpointError(Exception):
    """A checkpoint could not be written or read; says which file and why."""

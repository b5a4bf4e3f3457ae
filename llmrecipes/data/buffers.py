"""Batch memory that is used again once nobody holds it."""

from __future__ import annotations

import sys

import numpy as np


class Buffers:
    """int64 arrays, recycled when the last tensor or view on them is gone.

    A fresh array of megabytes comes from the kernel page by page, and goes back there when freed: that costs several
    times as much as filling it. A batch that is kept simply keeps its array, and the next one gets another.
    """

    def __init__(self) -> None:
        self._arrays: list[np.ndarray] = []

    def take(self, shape: tuple[int, ...]) -> np.ndarray:
        """An array of this shape with arbitrary content."""
        for i in range(len(self._arrays)):
            # The list and the argument of getrefcount hold one reference each; a tensor by from_numpy would be a third.
            if self._arrays[i].shape == shape and sys.getrefcount(self._arrays[i]) == 2:
                return self._arrays[i]
        fresh = np.empty(shape, dtype=np.int64)
        # Only a few are kept: two for each batch in flight (this one, Lightning's prefetched one, the one in backward).
        self._arrays = [*self._arrays[-7:], fresh]
        return fresh

"""Freed memory stays with the process while it trains on a CPU."""

from __future__ import annotations

import ctypes
import os
import sys

# glibc: mallopt(3)
_M_TRIM_THRESHOLD, _M_MMAP_MAX = -1, -4
_VARIABLES = ("MALLOC_MMAP_MAX_", "MALLOC_MMAP_THRESHOLD_", "MALLOC_TRIM_THRESHOLD_", "GLIBC_TUNABLES", "LD_PRELOAD")


def keep_freed_memory() -> bool:
    """Ask the C library to keep what is freed, instead of giving every large tensor back and faulting it in again.

    A training step frees and takes the same sizes again and again; the kernel's clearing of pages is 10 to 30 % of its
    time. Does nothing where the environment says otherwise (another allocator, the C library's own variables) and
    where the C library is not glibc.

    Returns:
        Whether it was asked and agreed.
    """
    if sys.platform != "linux" or any(os.environ.get(name) for name in _VARIABLES):
        return False
    mallopt = getattr(ctypes.CDLL(None), "mallopt", None)
    if mallopt is None:
        return False
    return bool(mallopt(_M_MMAP_MAX, 0)) and bool(mallopt(_M_TRIM_THRESHOLD, 2**31 - 1))

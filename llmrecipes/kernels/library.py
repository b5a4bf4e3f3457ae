"""The compiled kernels of this machine, and the operators that torch knows them by."""

from __future__ import annotations

import ctypes
import os
from collections.abc import Iterator
from contextlib import contextmanager
from functools import cache
from pathlib import Path
from typing import Any

import torch

from llmrecipes.kernels.build import SWITCH, load_library, processor_features

OPERATORS = torch.library.Library("llmrecipes", "DEF")

# In the compiler's words, of which the processor's differ by an underscore in one case.
_FP32 = ["avx512f", "avx512bw", "avx512dq", "avx512vl", "fma"]
_NAMES = {torch.float32: "fp32", torch.bfloat16: "bf16"}

_allowed = os.environ.get(SWITCH) != "0"


@contextmanager
def without_kernels() -> Iterator[None]:
    """Torch's own operators within: what other machines would run."""
    global _allowed
    before, _allowed = _allowed, False
    try:
        yield
    finally:
        _allowed = before


def are_allowed() -> bool:
    """Whether nobody has switched them off: the environment, or `without_kernels`."""
    return _allowed


@torch.compiler.assume_constant_result
def has_kernels(dtype: torch.dtype) -> bool:
    """Whether this machine has the kernels of this package for numbers of ``dtype`` on the CPU."""
    return _allowed and dtype in _types()


def kernel_types() -> list[str]:
    """The types for which this machine has kernels; compiles them where nobody has before."""
    return [name for dtype, name in _NAMES.items() if has_kernels(dtype)]


def kernel(name: str, dtype: torch.dtype) -> Any:
    """The function ``name`` for numbers of ``dtype``, where there are kernels for these."""
    library = _library()
    assert library is not None
    return library[f"{name}_{_NAMES[dtype]}"]


@cache
def _library() -> ctypes.CDLL | None:
    features = processor_features()
    if not features.issuperset(_FP32):
        return None
    halves = ["avx512bf16"] if "avx512_bf16" in features else []
    return load_library(Path(__file__).with_name("cpp"), [*_FP32, *halves])


@cache
def _types() -> frozenset[torch.dtype]:
    library = _library()
    return frozenset(dtype for dtype, name in _NAMES.items() if hasattr(library, f"swiglu_forward_{name}"))

"""Matrix products in fp32 on a CPU, by the library that is quicker there."""

from __future__ import annotations

from functools import cache

import torch
from torch import Tensor

from llmrecipes.kernels.build import processor_features, processor_vendor
from llmrecipes.kernels.library import are_allowed


def multiplies_faster(x: Tensor) -> bool:
    """Whether `multiply` is faster than torch's own product for matrices like ``x``.

    torch multiplies fp32 by MKL, which leaves half of an AMD processor's vectors unused: oneDNN, which comes with torch
    too, takes half the time there (docs/log.md). On Intel's both are as quick.
    """
    return x.device.type == "cpu" and x.dtype == torch.float32 and are_allowed() and _is_amd_with_avx512()


def multiply(a: Tensor, b: Tensor) -> Tensor:
    """``a`` [M, K] times ``b`` [K, N] in fp32, by oneDNN. No gradient."""
    product = torch.ops.mkldnn._linear_pointwise(a, b.t(), None, "none", [], "")
    assert isinstance(product, Tensor)
    return product


@cache
def _is_amd_with_avx512() -> bool:
    # The operator is torch's own, which its compiler uses; it has no public name.
    known = torch.backends.mkldnn.is_available() and hasattr(torch.ops.mkldnn, "_linear_pointwise")
    return known and processor_vendor() == "AuthenticAMD" and "avx512f" in processor_features()

"""torch.compile, block by block, without renaming a parameter."""

from __future__ import annotations

from typing import Any

import torch
from torch import nn


def compile_blocks(model: nn.Module) -> None:
    """Let inductor fuse what lies between the matrix products of every block.

    All blocks are alike and share the compiled code. Compiled is what has a gradient; evaluation and generation, whose
    shapes change, run as they are.
    """
    for block in model.layers:  # type: ignore[union-attr]
        block.forward = _Compiled(block.forward)


class _Compiled:
    """A block's forward pass, compiled where a gradient will be asked for."""

    def __init__(self, forward: Any) -> None:
        self.forward = forward
        self.compiled = torch.compile(forward)

    def __call__(self, *args: Any) -> Any:
        return (self.compiled if torch.is_grad_enabled() else self.forward)(*args)

"""Activation checkpointing (1604.06174), block by block, without renaming a parameter."""

from __future__ import annotations

from functools import partial
from typing import Any, Literal

import torch
from torch import nn
from torch.utils.checkpoint import CheckpointPolicy, checkpoint, create_selective_checkpoint_contexts

Recompute = Literal["none", "selective", "full"]

_aten = torch.ops.aten
# What costs more to compute again than to keep.
_KEPT = {
    _aten.mm.default,
    _aten.addmm.default,
    _aten._grouped_mm.default,
    _aten._scaled_dot_product_flash_attention_for_cpu.default,
    _aten._scaled_dot_product_flash_attention.default,
    _aten._scaled_dot_product_efficient_attention.default,
    _aten._flash_attention_forward.default,
}


def recompute_blocks(model: nn.Module, how: Recompute) -> None:
    """Let every block forget its activations and compute them again in the backward pass.

    ``forward`` is replaced on the instance, not the module wrapped: names of parameters, and so checkpoints, are the
    same with and without.
    """
    if how == "none":
        return
    for block in model.layers:  # type: ignore[union-attr]
        block.forward = _Recomputed(block.forward, how)


class _Recomputed:
    """A block's forward pass under a checkpoint; outside of training, as it is."""

    def __init__(self, forward: Any, how: Recompute) -> None:
        self.forward = forward
        self.options: dict[str, Any] = {"use_reentrant": False}
        if how == "selective":
            self.options["context_fn"] = partial(create_selective_checkpoint_contexts, _policy)

    def __call__(self, *args: Any) -> Any:
        if not torch.is_grad_enabled():
            return self.forward(*args)
        return checkpoint(self.forward, *args, **self.options)


def _policy(context: Any, operator: Any, *args: Any, **kwargs: Any) -> CheckpointPolicy:  # noqa: ARG001
    return CheckpointPolicy.MUST_SAVE if operator in _KEPT else CheckpointPolicy.PREFER_RECOMPUTE

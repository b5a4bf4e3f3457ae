"""Activation checkpointing (1604.06174), block by block, without renaming a parameter."""

from __future__ import annotations

from functools import partial
from typing import Any, Literal

import torch
from torch import nn
from torch.utils._python_dispatch import TorchDispatchMode
from torch.utils.checkpoint import CheckpointPolicy, checkpoint, create_selective_checkpoint_contexts

from llmrecipes.kernels.attention import OPERATOR

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
    OPERATOR,
}


def recompute_blocks(model: nn.Module, how: Recompute, compiled: bool = False) -> None:
    """Let every block forget its activations and compute them again in the backward pass.

    Args:
        model: a decoder with ``layers``.
        how: what is kept.
        compiled: the blocks will be compiled: the compiler knows torch's own contexts only.

    ``forward`` is replaced on the instance, not the module wrapped: names of parameters, and so checkpoints, are the
    same with and without.
    """
    if how == "none":
        return
    for block in model.layers:  # type: ignore[union-attr]
        block.forward = _Recomputed(block.forward, how, compiled)


class _Recomputed:
    """A block's forward pass under a checkpoint; outside of training, as it is."""

    def __init__(self, forward: Any, how: Recompute, compiled: bool) -> None:
        self.forward = forward
        self.options: dict[str, Any] = {"use_reentrant": False}
        if how == "selective":
            contexts = create_selective_checkpoint_contexts if compiled else _contexts
            self.options["context_fn"] = partial(contexts, _policy)

    def __call__(self, *args: Any) -> Any:
        if not torch.is_grad_enabled():
            return self.forward(*args)
        return checkpoint(self.forward, *args, **self.options)


def _contexts(policy: Any) -> tuple[TorchDispatchMode, TorchDispatchMode]:
    """Of the forward pass and of the recomputation."""
    caching, cached = create_selective_checkpoint_contexts(policy)
    return _Computation(caching), _Computation(cached)


class _Computation(TorchDispatchMode):
    """Shows a context of torch's only what computes.

    FSDP marks what it does for the profiler, and a module that is sharded within a block (a router, gathered in fp32)
    is gathered at other moments in the recomputation: torch counts these marks as operations, and refuses.
    """

    def __init__(self, inner: TorchDispatchMode) -> None:
        super().__init__()
        self.inner = inner

    @classmethod
    def ignore_compile_internals(cls) -> bool:
        """As torch's own contexts."""
        return True

    def __torch_dispatch__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        if func.namespace == "profiler":
            return func(*args, **(kwargs or {}))
        return self.inner.__torch_dispatch__(func, types, args, kwargs)


def _policy(context: Any, operator: Any, *args: Any, **kwargs: Any) -> CheckpointPolicy:  # noqa: ARG001
    return CheckpointPolicy.MUST_SAVE if operator in _KEPT else CheckpointPolicy.PREFER_RECOMPUTE

"""The log-probability of each label, without ever holding the logits of all tokens."""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor


class _LabelLogProbs(torch.autograd.Function):
    """A chunk's logits are computed again in the backward pass: how much each label counts is known only then."""

    @staticmethod
    def forward(
        ctx: Any, hidden: Tensor, weight: Tensor, labels: Tensor, chunk_size: int, vocab_size: int, dtype: torch.dtype
    ) -> Tensor:
        low_hidden, low_weight = hidden.to(dtype), weight.to(dtype)
        wide = torch.promote_types(dtype, torch.float32)
        chosen = torch.empty(len(labels), dtype=wide, device=hidden.device)
        normaliser = torch.empty_like(chosen)
        for start in range(0, len(labels), chunk_size):
            part = slice(start, start + chunk_size)
            logits = (low_hidden[part] @ low_weight[:vocab_size].t()).to(wide)
            normaliser[part] = logits.logsumexp(-1)
            chosen[part] = logits.gather(1, labels[part, None])[:, 0]
        ctx.save_for_backward(low_hidden, low_weight, labels, normaliser)
        ctx.chunk_size, ctx.vocab_size, ctx.types = chunk_size, vocab_size, (hidden.dtype, weight.dtype)
        return chosen - normaliser

    @staticmethod
    def backward(ctx: Any, grad: Tensor) -> tuple[Tensor | None, ...]:  # type: ignore[override]
        hidden, weight, labels, normaliser = ctx.saved_tensors
        wide = normaliser.dtype
        need_hidden, need_weight = ctx.needs_input_grad[:2]
        real = weight[: ctx.vocab_size]
        grad_hidden = torch.empty_like(hidden) if need_hidden else None
        grad_weight = torch.zeros(weight.shape, dtype=wide, device=weight.device) if need_weight else None
        for start in range(0, len(labels), ctx.chunk_size):
            part = slice(start, start + ctx.chunk_size)
            scale = grad[part, None].to(wide)
            # d log p(y) / d logits = onehot(y) - softmax
            logits = (hidden[part] @ real.t()).to(wide)
            grad_logits = logits.sub_(normaliser[part, None]).exp_().mul_(-scale)
            grad_logits.scatter_add_(1, labels[part, None], scale)
            low = grad_logits.to(hidden.dtype)
            if grad_hidden is not None:
                torch.mm(low, real, out=grad_hidden[part])
            if grad_weight is not None:
                grad_weight[: ctx.vocab_size] += low.t() @ hidden[part]
        types = ctx.types
        return (
            None if grad_hidden is None else grad_hidden.to(types[0]),
            None if grad_weight is None else grad_weight.to(types[1]),
            *([None] * 4),
        )


def label_log_probs(
    hidden: Tensor, weight: Tensor, labels: Tensor, chunk_size: int = 1024, vocab_size: int | None = None
) -> Tensor:
    """``log softmax(hidden @ weight.T)[label]`` of each row.

    Args:
        hidden: [N, D]. weight: [V, D]. labels: [N], each an id.
        chunk_size: rows whose logits exist at one time.
        vocab_size: rows of ``weight`` that are ids, the others only pad it; None = all.

    Returns:
        [N], fp32 or wider. Under autocast the matrix products run in autocast's type.
    """
    device = hidden.device.type
    dtype = torch.get_autocast_dtype(device) if torch.is_autocast_enabled(device) else hidden.dtype
    vocab_size = len(weight) if vocab_size is None else vocab_size
    with torch.autocast(device, enabled=False):
        return _LabelLogProbs.apply(hidden, weight, labels, max(1, chunk_size), vocab_size, dtype)

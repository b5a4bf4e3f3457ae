"""Cross-entropy of the output layer without ever holding the logits of all tokens."""

from __future__ import annotations

from typing import Any, NamedTuple

import torch
from torch import Tensor

from llmrecipes.kernels.products import multiplies_faster, multiply

IGNORE = -100
BLOCK_ELEMENTS = 2**19  # softmax runs over blocks of rows small enough to stay in the CPU's cache
COLUMNS = 8192  # ids whose gradient is added up at a time: a product of all would be half as large as the gradient


class _Grads(NamedTuple):
    """Of ``hidden`` [N, D], and of ``weight`` [V, D] ([D, V] where ``flipped``); None where it is not wanted."""

    hidden: Tensor
    weight: Tensor | None
    flipped: bool

    def add(self, rows: slice, logits: Tensor, weight: Tensor, part: Tensor, own: bool) -> None:
        """What follows from the gradient of a chunk's ``logits``; ``own``: products by `multiply`."""
        if own:
            self.hidden[rows] = multiply(logits, weight)
        else:
            torch.mm(logits, weight, out=self.hidden[rows])
        if self.weight is None:
            return
        if own:
            for ids, piece in zip(self.weight.split(COLUMNS), logits.split(COLUMNS, 1), strict=True):
                ids.add_(multiply(piece.t(), part))
        elif self.flipped:
            few = part.t().contiguous()
            for columns, piece in zip(self.weight.split(COLUMNS, 1), logits.split(COLUMNS, 1), strict=True):
                columns.add_(few @ piece)
        elif self.weight.dtype == part.dtype:
            self.weight.addmm_(logits.t(), part)
        else:
            self.weight.add_(logits.t() @ part)


def _block_loss(logits: Tensor, labels: Tensor, scratch: Tensor, want_grad: bool) -> Tensor:
    """Loss sum of one block of rows; with ``want_grad`` turns ``logits`` [rows, V] into its gradient in place.

    Columns beyond those of ``scratch`` only pad: they are left out, and their gradient is zero.
    log sum exp = max - log(largest probability), because the largest probability is 1 / sum exp(l - max).
    """
    targets = labels[:, None]
    real, padding = logits[:, : scratch.shape[1]], logits[:, scratch.shape[1] :]
    wide = real.to(scratch.dtype)
    top, chosen = wide.amax(-1), wide.gather(1, targets)[:, 0]
    probs = torch.softmax(wide, -1, out=scratch[: len(wide)])
    loss = (top - chosen - probs.amax(-1).log_()).sum()
    if want_grad:
        probs.scatter_add_(1, targets, torch.full_like(targets, -1, dtype=probs.dtype))
        real.copy_(probs)
        padding.zero_()
    return loss


def _forward(
    hidden: Tensor,
    weight: Tensor,
    labels: Tensor,
    chunk_size: int,
    vocab_size: int,
    want_grad: bool,
    want_weight: bool = False,
    block_rows: int | None = None,
) -> tuple[Tensor, Any]:
    """Loss sum and, if wanted, the gradients of ``hidden`` (its type) and ``weight`` (fp32, fp64 for fp64)."""
    rows, vocab = hidden.shape[0], weight.shape[0]
    wide = torch.promote_types(hidden.dtype, torch.float32)
    loss = torch.zeros((), dtype=wide, device=hidden.device)
    chunk_size = max(1, min(chunk_size, rows))
    # Rows given: as on a GPU, of which `llmrecipes plan` asks with tensors that say they are on a CPU.
    for_cpu = hidden.device.type == "cpu" and block_rows is None
    if block_rows is None:
        block_rows = BLOCK_ELEMENTS // vocab if for_cpu else chunk_size
    block = max(1, min(chunk_size, block_rows))
    own = for_cpu and multiplies_faster(hidden)  # which gives memory of its own
    buffer = hidden.new_empty(0 if own else chunk_size, vocab)
    scratch = hidden.new_empty(block, vocab_size, dtype=wide)
    grads = None
    if want_grad:
        # A CPU multiplies bf16 by a transposed operand at half its rate: better to copy the small one, and keep the
        # sum's transpose. A frozen head needs no gradient: it would be as large as the head, in fp32.
        flipped = for_cpu and wide != hidden.dtype
        shape = (weight.shape[1], vocab) if flipped else weight.shape
        of_weight = torch.zeros(shape, dtype=wide, device=weight.device) if want_weight else None
        grads = _Grads(torch.empty_like(hidden), of_weight, flipped)
    for start in range(0, rows, chunk_size):
        part, logits, piece = hidden[start : start + chunk_size], None, None  # the last chunk's go first
        logits = multiply(part, weight.t()) if own else torch.mm(part, weight.t(), out=buffer[: len(part)])
        for piece, targets in zip(logits.split(block), labels[start : start + chunk_size].split(block), strict=True):
            loss += _block_loss(piece, targets, scratch, want_grad)
        if grads is not None:
            grads.add(slice(start, start + chunk_size), logits, weight, part, own)
    if grads is not None and grads.weight is not None and grads.flipped:
        del buffer, logits, piece  # before the second copy of the gradient
        grads = grads._replace(weight=grads.weight.t().contiguous())
    return loss, grads


class _LinearCrossEntropy(torch.autograd.Function):
    """Gradients are computed in the forward pass, while a chunk's logits are at hand; the backward only scales them."""

    @staticmethod
    def forward(
        ctx: Any,
        hidden: Tensor,
        weight: Tensor,
        labels: Tensor,
        chunk_size: int,
        vocab_size: int,
        dtype: torch.dtype,
        block_rows: int | None,
    ) -> Tensor:
        want_weight = ctx.needs_input_grad[1]
        loss, grads = _forward(
            hidden.to(dtype), weight.to(dtype), labels, chunk_size, vocab_size, True, want_weight, block_rows
        )
        of_weight = None if grads.weight is None else grads.weight.to(weight.dtype)
        ctx.save_for_backward(grads.hidden.to(hidden.dtype), of_weight)
        return loss

    @staticmethod
    def backward(ctx: Any, grad: Tensor) -> tuple[Tensor | None, ...]:  # type: ignore[override]
        grad_hidden, grad_weight = ctx.saved_tensors
        of_hidden = grad_hidden * grad.to(grad_hidden.dtype)
        of_weight = None if grad_weight is None else grad_weight * grad.to(grad_weight.dtype)
        return of_hidden, of_weight, None, None, None, None, None


def linear_cross_entropy(
    hidden: Tensor,
    weight: Tensor,
    labels: Tensor,
    chunk_size: int = 1024,
    vocab_size: int | None = None,
    block_rows: int | None = None,
) -> tuple[Tensor, Tensor]:
    """Sum of the cross-entropy of ``hidden @ weight.T`` against ``labels``, and the number of labels that count.

    Args:
        hidden: [N, D]. weight: [V, D]. labels: [N], -100 = does not count.
        chunk_size: rows whose logits exist at one time.
        vocab_size: rows of ``weight`` that are ids, the others only pad it; None = all.
        block_rows: rows of a chunk whose softmax exists at one time; None = what a CPU's cache holds, elsewhere all.

    Returns:
        loss sum (scalar, fp32 or wider) and count (scalar int64, no gradient). Divide by the count of the whole step.

    Under autocast the matrix products run in autocast's type, softmax and the weight's gradient sum in fp32.
    """
    keep = (labels != IGNORE).nonzero()[:, 0]  # waits for the device once; prompts and padding then cost nothing
    count = torch.full((), len(keep), dtype=torch.int64, device=labels.device)
    if len(keep) < len(labels):
        hidden, labels = hidden.index_select(0, keep), labels.index_select(0, keep)
    vocab_size = len(weight) if vocab_size is None else vocab_size
    device = hidden.device.type
    dtype = torch.get_autocast_dtype(device) if torch.is_autocast_enabled(device) else hidden.dtype
    with torch.autocast(device, enabled=False):
        if torch.is_grad_enabled() and (hidden.requires_grad or weight.requires_grad):
            return _LinearCrossEntropy.apply(hidden, weight, labels, chunk_size, vocab_size, dtype, block_rows), count
        wide = hidden.detach().to(dtype), weight.detach().to(dtype)
        loss, _ = _forward(*wide, labels, chunk_size, vocab_size, want_grad=False)
        return loss, count

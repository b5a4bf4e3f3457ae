"""Sends tokens to their experts and sums what comes back, bitwise repeatable.

Token-expert pairs are sorted by expert, each expert's rows are one block of a grouped matrix product, and a token's k
results are gathered and added in the order in which its experts were chosen: no atomic addition anywhere.
No pair is dropped here; those that the router dropped name the expert E, are sorted behind all others, and no product
is computed for them.
"""

from __future__ import annotations

from typing import Any, NamedTuple

import torch
import torch.nn.functional as F
from torch import Tensor

from llmrecipes.models.activation import activate, activate_again, activation
from llmrecipes.recipe.model_config import Activation


class Plan(NamedTuple):
    """Where each of the S = T * k token-expert pairs goes.

    Attributes:
        token: token of each of the R >= S sorted rows, [R]; T for rows that only pad an expert's block.
        slot: sorted row of each pair (token-major), [S].
        order: pair of each sorted row, [R]; S for padding.
        ends: last row + 1 of each expert's block, [E] int32.
        dropped: pairs that no expert takes, [S] bool; None = there are none. Sorted rows of theirs hold no number.
    """

    token: Tensor
    slot: Tensor
    order: Tensor
    ends: Tensor
    dropped: Tensor | None = None


def make_plan(experts: Tensor, num_experts: int, multiple: int = 1, may_drop: bool = False) -> Plan:
    """Sort the pairs of ``experts`` [T, k] by expert; a stable sort keeps tokens in order.

    ``multiple`` > 1 pads each expert's block to that many rows (and waits for the device to know how many).
    With ``may_drop`` pairs of expert ``num_experts`` are those that no expert takes.
    """
    flat = experts.reshape(-1)
    order = flat.argsort(stable=True)
    slot = torch.empty_like(order)
    counts = torch.bincount(flat, minlength=num_experts + may_drop)[:num_experts]
    rows = torch.arange(order.numel(), device=order.device)
    dropped = flat == num_experts if may_drop else None
    if multiple == 1:
        slot[order] = rows
        return Plan(order // experts.shape[1], slot, order, counts.cumsum(0).to(torch.int32), dropped)
    if may_drop:
        slot.zero_()  # of a dropped pair: any row, it is not looked at
        order = order[: int(counts.sum())]
        rows = rows[: len(order)]
    blocks = (counts + multiple - 1) // multiple * multiple
    ends = blocks.cumsum(0)
    shift = (ends - blocks) - (counts.cumsum(0) - counts)  # how far padding moves each expert's rows
    placed = rows + shift.index_select(0, flat.index_select(0, order))
    slot[order] = placed
    size = max(int(ends[-1]), multiple)
    padded = torch.full((size,), flat.numel(), dtype=order.dtype, device=order.device)
    padded[placed] = order
    return Plan(padded // experts.shape[1], slot, padded, ends.to(torch.int32), dropped)


def _gather(x: Tensor, rows: Tensor, padded: bool) -> Tensor:
    """Rows of ``x``; the index one past the end is a row of zeros."""
    if padded:
        x = F.pad(x, (0, 0, 0, 1) if x.ndim == 2 else (0, 1))
    return x.index_select(0, rows)


def _pick(rows: Tensor, plan: Plan, top_k: int) -> Tensor:
    """Sorted ``rows`` [R, D] brought back to their tokens: [T, k, D], zeros for dropped pairs."""
    picked = rows.index_select(0, plan.slot)
    if plan.dropped is not None:
        picked.masked_fill_(plan.dropped[:, None], 0.0)
    return picked.view(-1, top_k, rows.shape[-1])


def _combine(rows: Tensor, plan: Plan, top_k: int) -> Tensor:
    """Bring sorted ``rows`` [R, D] back to their tokens and add each token's k rows: [T, D]."""
    picked = _pick(rows, plan, top_k)
    if top_k == 2:
        return picked[:, 0] + picked[:, 1]  # several times faster than a sum over so short a dimension
    return picked.sum(1)


def _combine_weighted(rows: Tensor, weights: Tensor, plan: Plan) -> Tensor:
    """The same with ``weights`` [T, k] of each token's rows."""
    picked = _pick(rows, plan, weights.shape[1])
    scale = weights.to(rows.dtype).unsqueeze(-1)
    if weights.shape[1] == 2:
        return (picked[:, 0] * scale[:, 0]).addcmul_(picked[:, 1], scale[:, 1])
    return picked.mul_(scale).sum(1)


def _sum_rows(rows: Tensor, plan: Plan, top_k: int, weights: Tensor | None = None) -> Tensor:
    """`_combine`, or with ``weights`` `_combine_weighted`, in one pass: reads each row once and keeps no [T, k, D].

    A bag of an embedding is the same sum, added up in fp32 and in the order of the bag; for use without autograd. Rows
    of dropped pairs hold no number, which a weight of zero would not hide: those go the long way.
    """
    if plan.dropped is not None:
        return _combine(rows, plan, top_k) if weights is None else _combine_weighted(rows, weights, plan)
    scale = None if weights is None else weights.to(rows.dtype)
    return F.embedding_bag(plan.slot.view(-1, top_k), rows, mode="sum", per_sample_weights=scale)


def _gather_scaled(x: Tensor, rows: Tensor, scale: Tensor, padded: bool) -> Tensor:
    """`_gather`, each row times its ``scale`` [R], in one pass."""
    if padded:
        x = F.pad(x, (0, 0, 0, 1))
    return F.embedding_bag(rows[:, None], x, mode="sum", per_sample_weights=scale.to(x.dtype)[:, None])


class _GroupedExperts(torch.autograd.Function):
    """Both grouped products and the activation between them.

    Saves the input, the first product, the routing weights and the indices; the rest is recomputed. With g the gradient
    of the output and w the routing weight, everything follows from (w g): dW_down = (w g)^T h, dh = W_down^T (w g), and
    dw = <dh, h> / w, so that no unweighted output [S, D] need be kept.
    """

    @staticmethod
    def forward(
        ctx: Any, x: Tensor, weights: Tensor, up: Tensor, down: Tensor, plan: Plan, padded: bool, kind: Activation
    ) -> Tensor:
        gate_up = F.grouped_mm(_gather(x, plan.token, padded), up.transpose(-2, -1), offs=plan.ends)
        out = F.grouped_mm(activate(gate_up, kind), down.transpose(-2, -1), offs=plan.ends)
        ctx.save_for_backward(x, gate_up, weights, up, down, *plan)
        ctx.kind, ctx.padded = kind, padded
        return _sum_rows(out, plan, weights.shape[1], weights)

    @staticmethod
    def backward(ctx: Any, grad: Tensor) -> tuple[Tensor | None, ...]:  # type: ignore[override]
        x, gate_up, weights, up, down, *indices = ctx.saved_tensors
        plan = Plan(*indices)
        top_k = weights.shape[1]
        need_x, need_weights, need_up, need_down = ctx.needs_input_grad[:4]
        # a weight of exactly zero still has a gradient: <dh, h> / w must not be 0 / 0
        sorted_weights = _gather(weights.reshape(-1), plan.order, ctx.padded).clamp_min(1e-20)
        weighted = _gather_scaled(grad, plan.token, sorted_weights, ctx.padded)
        grad_hidden = F.grouped_mm(weighted, down, offs=plan.ends)
        hidden, grad_gate_up, products = activate_again(grad_hidden, gate_up, ctx.kind)
        grad_weights = grad_down = grad_x = grad_up = None
        if need_down:
            grad_down = F.grouped_mm(weighted.t(), hidden, offs=plan.ends)
        if need_weights:
            if products is None:
                products = hidden.mul_(grad_hidden).sum(-1, dtype=weights.dtype)
            sums = products / sorted_weights.to(x.dtype)
            grad_weights = _pick(sums[:, None], plan, top_k).squeeze(-1)
        del weighted, hidden, grad_hidden
        if need_x:
            grad_x = _sum_rows(F.grouped_mm(grad_gate_up, up, offs=plan.ends), plan, top_k)
        if need_up:
            grad_up = F.grouped_mm(grad_gate_up.t(), _gather(x, plan.token, ctx.padded), offs=plan.ends)
        return grad_x, grad_weights, grad_up, grad_down, None, None, None


def loop_experts(x: Tensor, weights: Tensor, up: Tensor, down: Tensor, plan: Plan, kind: Activation) -> Tensor:
    """The same by one matrix product per expert and plain autograd: any type, any width, the reference of the tests."""
    ends = plan.ends.tolist()
    sizes = [stop - start for start, stop in zip([0, *ends], ends, strict=False)]
    blocks = x.index_select(0, plan.token[: ends[-1]]).split(sizes)
    # unbind once: indexing the stack per expert would fill a stack-sized zero gradient per expert
    outs = [
        F.linear(activation(F.linear(block, w_up), kind), w_down)
        for block, w_up, w_down in zip(blocks, up.unbind(0), down.unbind(0), strict=True)
    ]
    left = len(plan.token) - ends[-1]
    rows = torch.cat([*outs, outs[0].new_zeros(left, x.shape[-1])] if left else outs)
    sorted_weights = weights.reshape(-1).index_select(0, plan.order).to(x.dtype)
    return _combine(rows * sorted_weights[:, None], plan, weights.shape[1])


def can_group(x: Tensor, up: Tensor, down: Tensor) -> bool:
    """Whether ``F.grouped_mm`` takes these operands: its types, and rows that are multiples of 16 bytes."""
    if x.shape[0] == 0 or not hasattr(F, "grouped_mm"):
        return False
    allowed = (torch.bfloat16,) if x.is_cuda else (torch.bfloat16, torch.float32)
    multiple = 16 // x.element_size()
    return x.dtype in allowed and all(size % multiple == 0 for size in (*up.shape[1:], *down.shape[1:]))


ROWS_ON_CPU = 32


def block_rows(x: Tensor) -> int:
    """Rows to which an expert's block is padded: 1, except for bf16 on a CPU.

    There oneDNN compiles a kernel for each new number of rows, and ragged blocks are new at every step: 6 x the time
    of the products themselves, measured. With multiples of a few dozen it soon has them all.
    """
    return ROWS_ON_CPU if x.dtype == torch.bfloat16 and x.device.type == "cpu" else 1


@torch.compiler.disable  # the fake kernel of grouped_mm knows bf16 only; the blocks around it still compile
def run_experts(
    x: Tensor, weights: Tensor, experts: Tensor, up: Tensor, down: Tensor, kind: Activation, may_drop: bool = False
) -> Tensor:
    """Sum over a token's k experts of ``weight * down(activation(up(x)))``.

    Args:
        x: tokens, [T, D].
        weights: routing weights, [T, k], fp32. experts: the chosen experts, [T, k].
        up: [E, 2F, D] for SwiGLU (gate rows first), else [E, F, D]. down: [E, D, F].
        kind: the activation.
        may_drop: whether ``experts`` may hold E: pairs that are left out.

    Returns:
        [T, D] in the type of the matrix products (autocast's, where it is on).
    """
    device = x.device.type
    if torch.is_autocast_enabled(device):
        dtype = torch.get_autocast_dtype(device)  # autocast does not know grouped_mm
        x, up, down = x.to(dtype), up.to(dtype), down.to(dtype)
    if not can_group(x, up, down):
        return loop_experts(x, weights, up, down, make_plan(experts, up.shape[0], may_drop=may_drop), kind)
    multiple = block_rows(x)
    plan = make_plan(experts, up.shape[0], multiple, may_drop)
    padded = multiple > 1 and (may_drop or plan.token.numel() > plan.slot.numel())
    return _GroupedExperts.apply(x, weights, up, down, plan, padded, kind)

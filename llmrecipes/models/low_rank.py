"""Many low-rank updates, of which each token gets its own few: the base product once, low rank for routed tokens only.

``sum over chosen e of weight_e * B_e (A_e drop(x))``, in one of two forms that compute the same:

- grouped: pairs sorted by adapter, two grouped products of 2 k r (d_in + d_out) FLOPs per token;
- concatenated: all adapters as one of rank N r, with the weights of those not chosen zero: 2 N r (d_in + d_out) FLOPs,
  but two plain products and nothing moved.
"""

from __future__ import annotations

from typing import Any, Literal, NamedTuple

import torch
import torch.nn.functional as F
from torch import Tensor

from llmrecipes.models.dispatch import block_rows, can_group, make_plan

Form = Literal["grouped", "concatenated"]


class _Updates(torch.autograd.Function):
    """See `updates`; nothing of the size of the result is made beside it."""

    @staticmethod
    def forward(ctx: Any, width: int, columns: list[slice], scale: float, *operands: Tensor) -> Tensor:
        hidden, b = operands[: len(columns)], operands[len(columns) :]
        ctx.scale, ctx.columns = scale, columns
        ctx.save_for_backward(*operands)
        covered = sum(part.stop - part.start for part in columns) == width
        out = (hidden[0].new_empty if covered else hidden[0].new_zeros)(len(hidden[0]), width)
        for part, h, matrix in zip(columns, hidden, b, strict=True):
            torch.mm(h * scale, matrix.t(), out=out[:, part])  # the scale goes to what is r wide
        return out

    @staticmethod
    def backward(ctx: Any, grad: Tensor) -> tuple[Tensor | None, ...]:  # type: ignore[override]
        operands = ctx.saved_tensors  # asked for once: a recomputed block gives them once
        hidden, b = operands[: len(ctx.columns)], operands[len(ctx.columns) :]
        parts = [grad[:, part] for part in ctx.columns]
        to_hidden = [(part @ matrix).mul_(ctx.scale) for part, matrix in zip(parts, b, strict=True)]
        to_b = [part.t() @ (h * ctx.scale) for part, h in zip(parts, hidden, strict=True)]
        return None, None, None, *to_hidden, *to_b


def updates(width: int, columns: list[slice], scale: float, hidden: list[Tensor], b: list[Tensor]) -> Tensor:
    """Low-rank updates of some columns of a map with ``width`` of them, side by side: [T, width], zero elsewhere.

    Args:
        columns: of each update. hidden: ``A_i x``, [T, r]. b: [columns of i, r].
    """
    return _Updates.apply(width, columns, scale, *hidden, *b)


class Pairs(NamedTuple):
    """Token-adapter pairs sorted by adapter; pairs with the null expert have no row.

    Attributes:
        token: token of each of the R rows, [R]; T for rows that only pad an adapter's block.
        slot: row of each pair (token-major), [T * k]; R or more for the null expert.
        order: pair of each row, [R]; T * k for padding.
        ends: last row + 1 of each adapter's block, [N] int32.
        padded: whether there are rows that only pad. partial: whether there are pairs without a row.
    """

    token: Tensor
    slot: Tensor
    order: Tensor
    ends: Tensor
    padded: bool
    partial: bool


def sort_pairs(experts: Tensor, num_experts: int, null_expert: bool, multiple: int = 1) -> Pairs:
    """Sort the pairs of ``experts`` [T, k], of which ``num_experts`` is the null expert, if there is one."""
    plan = make_plan(experts, num_experts + null_expert, multiple)
    if not null_expert and multiple == 1:
        return Pairs(plan.token, plan.slot, plan.order, plan.ends, padded=False, partial=False)
    ends = plan.ends[:num_experts]
    rows = int(ends[-1])  # waits for the device: cheaper than products for tokens that want none
    return Pairs(plan.token[:rows], plan.slot, plan.order[:rows], ends, multiple > 1, null_expert)


def _gather(x: Tensor, pairs: Pairs) -> Tensor:
    """Rows of ``x`` [T, D] for each row of the pairs; zeros for padding."""
    if pairs.padded:
        x = F.pad(x, (0, 0, 0, 1))
    return x.index_select(0, pairs.token)


def _combine(rows: Tensor, pairs: Pairs, top_k: int) -> Tensor:
    """Add each token's rows, in the order in which they were chosen: [T, D]."""
    count = rows.shape[0]
    if count == 0:
        return rows.new_zeros(pairs.slot.numel() // top_k, rows.shape[-1])
    if pairs.partial:
        picked = rows.index_select(0, pairs.slot.clamp(max=count - 1))
        picked.masked_fill_((pairs.slot >= count).unsqueeze(1), 0)
    else:
        picked = rows.index_select(0, pairs.slot)
    picked = picked.view(-1, top_k, rows.shape[-1])
    return picked[:, 0] + picked[:, 1] if top_k == 2 else picked.sum(1)


class _Scatter(torch.autograd.Function):
    """Tokens to sorted rows; backward is `_Collect`: no atomic addition in either."""

    @staticmethod
    def forward(ctx: Any, x: Tensor, pairs: Pairs, top_k: int) -> Tensor:
        ctx.pairs, ctx.top_k = pairs, top_k
        return _gather(x, pairs)

    @staticmethod
    def backward(ctx: Any, grad: Tensor) -> tuple[Tensor | None, ...]:  # type: ignore[override]
        return _combine(grad, ctx.pairs, ctx.top_k), None, None


class _Collect(torch.autograd.Function):
    """Sorted rows back to tokens, summed."""

    @staticmethod
    def forward(ctx: Any, rows: Tensor, pairs: Pairs, top_k: int) -> Tensor:
        ctx.pairs = pairs
        return _combine(rows, pairs, top_k)

    @staticmethod
    def backward(ctx: Any, grad: Tensor) -> tuple[Tensor | None, ...]:  # type: ignore[override]
        return _gather(grad, ctx.pairs), None, None


def scatter_rows(x: Tensor, pairs: Pairs, top_k: int) -> Tensor:
    """``x`` [T, D] as sorted rows [R, D]."""
    return _Scatter.apply(x, pairs, top_k)


def collect_rows(rows: Tensor, pairs: Pairs, top_k: int) -> Tensor:
    """Sums of each token's rows: [R, D] to [T, D]."""
    return _Collect.apply(rows, pairs, top_k)


def row_weights(weights: Tensor, pairs: Pairs) -> Tensor:
    """``weights`` [T, k] of each sorted row, [R, 1]; zero for padding."""
    flat = F.pad(weights.reshape(-1), (0, 1))
    return flat.index_select(0, pairs.order).unsqueeze(1)


def grouped_linear(rows: Tensor, stack: Tensor, ends: Tensor) -> Tensor:
    """Each block of sorted ``rows`` [R, in] times its own matrix of ``stack`` [N, out, in]: [R, out]."""
    if can_group(rows, stack, stack):
        return F.grouped_mm(rows, stack.transpose(-2, -1), offs=ends)
    stops = ends.tolist()
    sizes = [stop - start for start, stop in zip([0, *stops], stops, strict=False)]
    blocks = zip(rows.split(sizes), stack.unbind(0), strict=True)
    return torch.cat([F.linear(block, matrix) for block, matrix in blocks])


def update_rows(rows: Tensor, a: Tensor, b: Tensor, scale: Tensor | float, dropout: float, ends: Tensor) -> Tensor:
    """``scale * B_e A_e drop(row)`` of sorted rows, [R, in] to [R, out].

    Args:
        a: [N, r, in]. b: [N, out, r]. scale: number, or one per row [R, 1].
        dropout: probability, 0 outside of training; each pair has its own mask.
    """
    rows = F.dropout(rows, dropout) if dropout else rows
    hidden = grouped_linear(rows, a, ends)
    return grouped_linear(hidden * (scale if isinstance(scale, float) else scale.to(hidden.dtype)), b, ends)


def choose_form(num_experts: int, top_k: int, rank: int, dropout: float) -> Form:
    """The faster one, by measurement (docs/log.md): few and thin adapters are not worth sorting.

    Dropout draws a mask for each token-adapter pair, which only the grouped form has rows for.
    """
    thin = num_experts * rank <= 256 or (num_experts <= 1.5 * top_k and rank <= 128)
    return "concatenated" if thin and dropout == 0 else "grouped"


def product_type(x: Tensor) -> torch.dtype:
    """Of matrix products with ``x``: autocast's where it is on, which does not know grouped ones by itself."""
    device = x.device.type
    return torch.get_autocast_dtype(device) if torch.is_autocast_enabled(device) else x.dtype


def in_product_type(*tensors: Tensor) -> tuple[Tensor, ...]:
    """Operands of a product, in its type."""
    return tuple(tensor.to(product_type(tensors[0])) for tensor in tensors)


@torch.compiler.disable  # the fake kernel of grouped_mm knows bf16 only
def routed_update(
    x: Tensor,
    weights: Tensor,
    experts: Tensor,
    a: Tensor,
    b: Tensor,
    scale: float,
    dropout: float = 0.0,
    null_expert: bool = False,
    form: Form | None = None,
) -> Tensor:
    """Sum over a token's chosen adapters of ``weight * scale * B_e A_e drop(x)``.

    Args:
        x: [T, in]. weights: [T, k], fp32. experts: [T, k]; N is the null expert, which adds nothing.
        a: [N, r, in]. b: [N, out, r].
        dropout: probability, 0 outside of training.
        form: None = the faster one.

    Returns:
        [T, out] in the type of the matrix products (autocast's, where it is on).
    """
    x, a, b = in_product_type(x, a, b)
    num_experts, rank, _ = a.shape
    if (form or choose_form(num_experts, experts.shape[1], rank, dropout)) == "concatenated":
        assert not dropout, "no rows to draw masks for"
        share = weights.new_zeros(len(x), num_experts + null_expert).scatter(1, experts, weights * scale)
        hidden = F.linear(x, a.flatten(0, 1)).unflatten(1, (num_experts, rank))
        hidden = hidden * share[:, :num_experts, None].to(hidden.dtype)
        return F.linear(hidden.flatten(1), b.transpose(0, 1).flatten(1))
    top_k = experts.shape[1]
    pairs = sort_pairs(experts, num_experts, null_expert, block_rows(x))
    rows = scatter_rows(x, pairs, top_k)
    update = update_rows(rows, a, b, row_weights(weights * scale, pairs), dropout, pairs.ends)
    return collect_rows(update, pairs, top_k)

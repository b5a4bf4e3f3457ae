"""Many low-rank updates, of which each token gets its own few: the base product once, low rank for routed tokens only.

``sum over chosen e of weight_e * B_e (A_e drop(x))``, in one of two forms that compute the same:

- grouped: pairs sorted by adapter, two grouped products of 2 k r (d_in + d_out) FLOPs per token;
- concatenated: all adapters as one of rank N r, with the weights of those not chosen zero: 2 N r (d_in + d_out) FLOPs,
  but two plain products and nothing moved.
"""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any, Literal, NamedTuple

import torch
import torch.nn.functional as F
from torch import Tensor

from llmrecipes.models.dispatch import block_rows, can_group, make_plan

Form = Literal["grouped", "concatenated"]


class _AdaptedLinear(torch.autograd.Function):
    """See `adapted_linear`: one product with ``A x`` as further features and ``scale * B`` as their weights.

    So no second result as large as the map's is written and added, for a copy of the map, which few rows (generation)
    are not worth. Nothing is changed in place: selective recomputation keeps products, and would keep them changed.
    """

    @staticmethod
    def forward(
        ctx: Any,
        columns: list[slice],
        scale: float,
        x: Tensor,
        weight: Tensor,
        bias: Tensor | None,
        a: Tensor | None,
        hidden: Tensor | None,
        *b: Tensor,
    ) -> Tensor:
        low = hidden if a is None else F.linear(x, a)
        assert low is not None
        ctx.columns, ctx.scale = columns, scale
        ctx.save_for_backward(x, weight, a, low, *b)
        # Rows of the updates that belong to no part stay zero, and so do features of one part for the rows of another.
        of_low = weight.new_zeros(len(weight), low.shape[1])
        for number, (part, matrix) in enumerate(zip(columns, b, strict=True)):
            rank = matrix.shape[1]
            torch.mul(matrix, scale, out=of_low[part, number * rank : (number + 1) * rank])
        if len(x) < x.shape[1]:
            return F.linear(x, weight, bias) + F.linear(low, of_low)
        return F.linear(torch.cat([x, low], dim=-1), torch.cat([weight, of_low], dim=-1), bias)

    @staticmethod
    def backward(ctx: Any, grad: Tensor) -> tuple[Tensor | None, ...]:  # type: ignore[override]
        x, weight, a, low, *b = ctx.saved_tensors  # asked for once: a recomputed block gives them once
        wants_x, wants_weight, wants_bias = ctx.needs_input_grad[2:5]
        parts = [grad[:, part] for part in ctx.columns]
        to_low = torch.cat([part @ matrix for part, matrix in zip(parts, b, strict=True)], dim=-1).mul_(ctx.scale)
        # A CPU multiplies bf16 by a transposed operand at half its rate: the thin one is.
        thin = (low * ctx.scale).t().contiguous().chunk(len(b))
        to_b = [(h @ part).t() for h, part in zip(thin, parts, strict=True)]
        to_x = grad @ weight if wants_x else None
        if to_x is not None and a is not None:
            to_x.addmm_(to_low, a)
        to_weight = grad.t() @ x if wants_weight else None
        to_bias = grad.sum(0) if wants_bias else None
        to_a = None if a is None else to_low.t().contiguous() @ x
        return None, None, to_x, to_weight, to_bias, to_a, to_low if a is None else None, *to_b


def adapted_linear(
    x: Tensor,
    weight: Tensor,
    bias: Tensor | None,
    columns: list[slice],
    scale: float,
    b: Sequence[Tensor],
    a: Tensor | None = None,
    hidden: Tensor | None = None,
) -> Tensor:
    """``x W^T + bias``, with ``scale * B_i A_i x`` added to some of its columns: [T, out], in the type of products.

    Args:
        x: [T, in]. weight: [out, in]. bias: [out].
        columns: of each update. b: [columns of i, r] of each.
        a: all ``A_i`` one below the other, [n r, in]. hidden: instead of it all ``A_i x`` side by side, [T, n r].
    """
    assert (a is None) != (hidden is None)
    x, weight, *b = in_product_type(x, weight, *b)
    given = (None if tensor is None else tensor.to(x.dtype) for tensor in (bias, a, hidden))
    with torch.autocast(x.device.type, enabled=False):
        return _AdaptedLinear.apply(columns, scale, x, weight, *given, *b)


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

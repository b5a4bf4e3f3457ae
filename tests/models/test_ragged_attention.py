"""Packed documents in bf16 on a CPU: short ones are computed in fp32, long ones with rows added behind them."""

from __future__ import annotations

import pytest
import torch

from llmrecipes.models import attention
from llmrecipes.models.attention import attend
from llmrecipes.models.context import SequenceContext

LENGTHS = [1, 3, 64, 200, 512, 513, 700, 55]


def inputs(dtype):
    generator = torch.Generator().manual_seed(0)
    shapes = [(1, sum(LENGTHS), heads, 16) for heads in (4, 2, 2)]
    exact = [torch.randn(shape, generator=generator).bfloat16() for shape in shapes]
    return [x.to(dtype).requires_grad_() for x in exact]


def results(dtype):
    """Output and gradients, in fp64."""
    operands = inputs(dtype)
    context = SequenceContext(torch.zeros(1, 1, dtype=torch.long), lengths=LENGTHS)
    mixed = attend(*operands, context)
    assert mixed.dtype == dtype
    mixed.float().square().sum().backward()
    return [x.detach().double() for x in (mixed, *(operand.grad for operand in operands))]


def worst():
    """Largest error of bf16, relative to the largest value, over output and gradients."""
    pairs = list(zip(results(torch.bfloat16), results(torch.float64), strict=True))
    assert len(pairs) == 4
    return max(((found - exact).abs().max() / exact.abs().max()).item() for found, exact in pairs)


def test_it_is_the_exact_attention_up_to_rounding():
    assert worst() < 0.01


def test_rows_added_before_the_document_are_noticed(monkeypatch):
    """Mutant: causal attention would see them."""
    monkeypatch.setattr(
        attention.F, "pad", lambda x, by: torch.cat([x.new_ones(x.shape[0], by[-1], *x.shape[2:]), x], 1)
    )
    assert worst() > 0.1


def test_a_document_does_not_depend_on_its_neighbours():
    operands = inputs(torch.bfloat16)
    context = SequenceContext(torch.zeros(1, 1, dtype=torch.long), lengths=LENGTHS)
    begin, end = sum(LENGTHS[:5]), sum(LENGTHS[:6])
    with torch.no_grad():
        before = attend(*operands, context)
        for x in operands:
            x[:, :begin] = 1.0
            x[:, end:] = 1.0
        after = attend(*operands, context)
    assert after[:, begin:end].equal(before[:, begin:end])
    assert not after[:, :begin].equal(before[:, :begin])


@pytest.mark.parametrize("autocast", [False, True])
def test_autocast_computes_the_same(autocast):
    """Rotated queries and keys come in fp32 there."""
    query, key, value = inputs(torch.bfloat16)
    context = SequenceContext(torch.zeros(1, 1, dtype=torch.long), lengths=LENGTHS)
    with torch.no_grad(), torch.autocast("cpu", enabled=autocast, dtype=torch.bfloat16):
        found = attend(query.float(), key.float(), value, context) if autocast else attend(query, key, value, context)
    assert found.dtype == torch.bfloat16
    with torch.no_grad():
        assert found.equal(attend(query, key, value, context))

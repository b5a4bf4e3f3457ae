"""The chunked loss against the whole one."""

from __future__ import annotations

import pytest
import torch
import torch.nn.functional as F

from llmrecipes.losses import IGNORE, linear_cross_entropy


def operands(rows=37, dim=12, vocab=101, dtype=torch.float64, ignored=0.3):
    g = torch.Generator().manual_seed(0)
    hidden = torch.randn(rows, dim, generator=g, dtype=torch.float64).to(dtype).requires_grad_()
    weight = torch.randn(vocab, dim, generator=g, dtype=torch.float64).to(dtype).requires_grad_()
    labels = torch.randint(0, vocab, (rows,), generator=g)
    labels[torch.rand(rows, generator=g) < ignored] = IGNORE
    return hidden, weight, labels


@pytest.mark.parametrize("chunk_size", [1, 5, 16, 37, 1000])
@pytest.mark.parametrize("ignored", [0.0, 0.3, 1.0])
def test_equals_the_whole_loss(chunk_size, ignored):
    hidden, weight, labels = operands(ignored=ignored)
    want = F.cross_entropy(hidden @ weight.t(), labels, reduction="sum", ignore_index=IGNORE)
    want_grads = torch.autograd.grad(want * 0.37, (hidden, weight))
    loss, count = linear_cross_entropy(hidden, weight, labels, chunk_size)
    grads = torch.autograd.grad(loss * 0.37, (hidden, weight))
    assert int(count) == int((labels != IGNORE).sum())
    torch.testing.assert_close(loss, want, rtol=0, atol=1e-12 * max(1.0, want.item()))
    for got, expected in zip(grads, want_grads, strict=True):
        torch.testing.assert_close(got, expected, rtol=0, atol=1e-12)


def test_many_blocks_of_rows_in_one_chunk(monkeypatch):
    monkeypatch.setattr("llmrecipes.losses.cross_entropy.BLOCK_ELEMENTS", 303)
    hidden, weight, labels = operands(ignored=0.0)
    loss, _ = linear_cross_entropy(hidden, weight, labels, 16)
    torch.testing.assert_close(loss, F.cross_entropy(hidden @ weight.t(), labels, reduction="sum"), rtol=0, atol=1e-11)
    assert torch.autograd.gradcheck(lambda h, w: linear_cross_entropy(h, w, labels[:5], 2)[0], (hidden[:5], weight))


def test_without_gradient_nothing_is_saved():
    hidden, weight, labels = operands()
    with torch.no_grad():
        loss, _ = linear_cross_entropy(hidden, weight, labels)
    assert not loss.requires_grad
    torch.testing.assert_close(loss, linear_cross_entropy(hidden, weight, labels)[0].detach())
    frozen, _ = linear_cross_entropy(hidden.detach(), weight.detach(), labels)
    assert not frozen.requires_grad


def test_used_twice():
    hidden, weight, labels = operands()
    loss, _ = linear_cross_entropy(hidden, weight, labels)
    once = torch.autograd.grad(loss, (hidden, weight), retain_graph=True)
    twice = torch.autograd.grad(3 * loss, (hidden, weight))
    for a, b in zip(once, twice, strict=True):
        torch.testing.assert_close(3 * a, b)
    both = linear_cross_entropy(hidden, weight, labels)[0] + linear_cross_entropy(hidden, weight, labels)[0]
    for a, b in zip(once, torch.autograd.grad(both, (hidden, weight)), strict=True):
        torch.testing.assert_close(2 * a, b)


@pytest.mark.parametrize("frozen", ["hidden", "weight"])
def test_one_side_frozen(frozen):
    hidden, weight, labels = operands()
    want = torch.autograd.grad(linear_cross_entropy(hidden, weight, labels)[0], (hidden, weight))
    if frozen == "hidden":
        (got,) = torch.autograd.grad(linear_cross_entropy(hidden.detach(), weight, labels)[0], (weight,))
        torch.testing.assert_close(got, want[1])
    else:
        (got,) = torch.autograd.grad(linear_cross_entropy(hidden, weight.detach(), labels)[0], (hidden,))
        torch.testing.assert_close(got, want[0])


@pytest.mark.parametrize(("columns", "block_rows"), [(64, None), (8192, None), (8192, 32)], ids=["few", "all", "gpu"])
def test_autocast_multiplies_in_bf16_and_adds_in_fp32(columns, block_rows, monkeypatch):
    monkeypatch.setattr("llmrecipes.losses.cross_entropy.COLUMNS", columns)
    hidden, weight, labels = operands(600, 64, 500, torch.float32, 0.1)
    weight.data /= 8
    exact = F.cross_entropy(hidden.double() @ weight.double().t(), labels, reduction="sum")
    exact_grads = torch.autograd.grad(exact, (hidden, weight))
    with torch.autocast("cpu", dtype=torch.bfloat16):
        loss, count = linear_cross_entropy(hidden, weight, labels, 128, block_rows=block_rows)
    assert loss.dtype == torch.float32
    grads = torch.autograd.grad(loss, (hidden, weight))
    assert abs(loss.item() - exact.item()) / int(count) < 1e-3
    for got, want in zip(grads, exact_grads, strict=True):
        assert got.dtype == torch.float32
        assert got.is_contiguous()
        assert ((got - want).norm() / want.norm()).item() < 1e-2


def test_the_sum_does_not_care_how_the_rows_are_split():
    hidden, weight, labels = operands()
    whole, count = linear_cross_entropy(hidden, weight, labels)
    want = torch.autograd.grad(whole / count, (hidden, weight))
    pieces = [
        linear_cross_entropy(h, weight, y)
        for h, y in zip(hidden.split([3, 20, 14]), labels.split([3, 20, 14]), strict=True)
    ]
    split = sum(loss for loss, _ in pieces) / sum(n for _, n in pieces)
    for got, expected in zip(torch.autograd.grad(split, (hidden, weight), retain_graph=True), want, strict=True):
        torch.testing.assert_close(got, expected, rtol=0, atol=1e-12)
    mutant = sum(loss / n for loss, n in pieces) / 3  # the mean of means
    assert not torch.allclose(torch.autograd.grad(mutant, (weight,))[0], want[1], atol=1e-4)

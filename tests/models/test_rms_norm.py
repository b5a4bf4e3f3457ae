"""The norm's own forward and backward on a CPU is the plain expression, gradients and all."""

import pytest
import torch
import torch.nn.functional as F

from llmrecipes.models import layers
from llmrecipes.models.layers import RMSNorm

SHAPES = [(2, 5, 16), (7, 24), (1, 1, 64), (3, 2, 4, 8)]


def both(shape, dtype):
    """Output and gradients of ours and of the plain expression in fp64, on the same numbers."""
    generator = torch.Generator().manual_seed(sum(shape))
    x, upstream = (torch.randn(shape, generator=generator, dtype=torch.float64) for _ in range(2))
    weight = torch.rand(shape[-1], generator=generator, dtype=torch.float64) + 0.5
    norm = RMSNorm(shape[-1], 1e-5).to(dtype)
    with torch.no_grad():
        norm.weight.copy_(weight)
    ours = x.to(dtype, copy=True).requires_grad_()
    out = norm(ours)
    out.backward(upstream.to(dtype))
    plain, factor = x.requires_grad_(), weight.requires_grad_()
    expected = F.rms_norm(plain, factor.shape, factor, 1e-5)
    expected.backward(upstream)
    return (out, ours.grad, norm.weight.grad), (expected, plain.grad, factor.grad)


def worst(shape, dtype):
    pairs = [(a.detach().double(), b.detach()) for a, b in zip(*both(shape, dtype), strict=True)]
    return max(float((a - b).abs().max() / b.abs().max()) for a, b in pairs)


@pytest.mark.parametrize("shape", SHAPES)
def test_it_is_the_plain_expression(shape):
    assert worst(shape, torch.float64) < 1e-12
    assert worst(shape, torch.float32) < 2e-6


def test_mutant_without_the_gradient_of_the_root_differs(monkeypatch):
    right = layers._RMSNorm

    class Mutant(right):
        @staticmethod
        def backward(ctx, grad):
            x, weight, inverse = ctx.saved_tensors
            _, of_weight, _ = right.backward(ctx, grad)
            return grad * weight * inverse, of_weight, None

    monkeypatch.setattr(layers, "_RMSNorm", Mutant)
    found = [worst(shape, torch.float64) for shape in SHAPES]
    assert min(found) > 1e-3, found


def test_frozen_weights_and_inputs_get_no_gradient():
    norm = RMSNorm(8, 1e-5)
    x = torch.randn(3, 8)
    norm(x).sum().backward()
    assert norm.weight.grad is not None and x.grad is None
    frozen = RMSNorm(8, 1e-5).requires_grad_(False)
    x.requires_grad_()
    frozen(x).sum().backward()
    assert frozen.weight.grad is None and x.grad is not None


def test_an_empty_batch_is_normalised():
    x = torch.randn(0, 8, requires_grad=True)
    RMSNorm(8, 1e-5)(x).sum().backward()
    assert x.grad.shape == (0, 8)


def test_it_saves_its_input_only():
    x = torch.randn(4, 6, 32, requires_grad=True)
    saved = []
    with torch.autograd.graph.saved_tensors_hooks(lambda t: saved.append(t) or t, lambda t: t):
        RMSNorm(32, 1e-5)(x)
    beside = [t for t in saved if t.data_ptr() != x.data_ptr()]
    assert sum(t.numel() for t in beside) == 4 * 6 + 32  # one number per row, and the weight

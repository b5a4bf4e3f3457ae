"""SwiGLU in one pass, against fp64 by definition."""

import pytest
import torch
from test_attention import DTYPES

from llmrecipes.kernels.library import without_kernels
from llmrecipes.kernels.swiglu import fits_swiglu, swiglu, swiglu_again
from llmrecipes.models.activation import activate, activate_again, activation

# Of the largest value; in bf16 the result is rounded once.
ERROR = {torch.float32: 1e-6, torch.bfloat16: 4e-3}
SHAPES = [(5, 3, 32), (1, 2), (7, 34), (64, 2816), (0, 16), (3, 0)]


def exact(gate_up, grad):
    gate, up = gate_up.detach().double().requires_grad_().chunk(2, -1)
    share = 1 / (1 + torch.exp(-gate))
    hidden = gate * share * up
    slope = share * (1 + gate * (1 - share))
    grads = torch.cat([grad.double() * up * slope, grad.double() * gate * share], -1)
    return hidden.detach(), grads.detach(), (hidden * grad.double()).sum(-1).detach()


def near(found, expected, error):
    top = max(expected.abs().max().item(), 1.0) if expected.numel() else 1.0
    torch.testing.assert_close(found.double(), expected, rtol=error, atol=error * top)


def check(dtype, shape):
    gate_up = (4 * torch.randn(shape)).to(dtype)
    grad = torch.randn(*shape[:-1], shape[-1] // 2).to(dtype)
    hidden, grads, products = exact(gate_up, grad)
    leaf = gate_up.clone().requires_grad_()
    out = swiglu(leaf)
    out.backward(grad)
    near(out.detach(), hidden, ERROR[dtype])
    near(leaf.grad, grads, ERROR[dtype])
    again = swiglu_again(grad, gate_up)
    assert torch.equal(again[0], out) and torch.equal(again[1], leaf.grad)
    near(again[2], products, 1e-5)  # whatever the type: not rounded before the sum


@pytest.mark.parametrize("dtype", DTYPES)
def test_it_is_the_definition(dtype):
    torch.manual_seed(0)
    done = [check(dtype, shape) for shape in SHAPES]
    assert len(done) == 6


@pytest.mark.parametrize(
    ("right", "wrong"),
    [
        ("_mm512_fmadd_ps(silu, _mm512_sub_ps(one, share), share)", "share"),
        ("Type::store(to + work.width + i, _mm512_mul_ps(grad, silu), mask);", ""),
        ("sum = _mm512_mask3_fmadd_ps(hidden, grad, sum, mask);", ""),
    ],
    ids=["slope", "up", "products"],
)
def test_mutants_fail(right, wrong, mutant):
    torch.manual_seed(0)
    mutant("swiglu.cpp", right, wrong)
    with pytest.raises(AssertionError):
        check(torch.float32, (64, 2816))


@pytest.mark.parametrize("dtype", DTYPES)
def test_ends_of_the_range(dtype):
    gate = torch.tensor([-1e30, -200.0, -0.0, 0.0, 200.0, 1e30, torch.nan, torch.inf, -torch.inf])
    gate_up = torch.cat([gate, torch.ones_like(gate)]).to(dtype)
    found = swiglu(gate_up)
    assert found[:6].double().tolist() == pytest.approx([0, 0, 0, 0, 200, 1e30], rel=1e-2, abs=1e-30)
    assert found[6].isnan() and found[7] == torch.inf
    assert found[8].isnan()  # -inf * 0, as torch's own gives


@pytest.mark.parametrize("dtype", DTYPES)
def test_the_network_takes_it_and_agrees_with_its_other_way(dtype):
    torch.manual_seed(0)
    gate_up, grad = torch.randn(50, 128).to(dtype), torch.randn(50, 64).to(dtype)

    def both():
        leaf = gate_up.clone().requires_grad_()
        out = activation(leaf, "swiglu")
        out.backward(grad)
        again = activate_again(grad, gate_up, "swiglu")
        return [out.detach(), leaf.grad, activate(gate_up, "swiglu"), *again[:2]], again[2]

    found, products = both()
    with without_kernels():
        expected, none = both()
    assert products is not None and none is None
    for a, b in zip(found, expected, strict=True):
        torch.testing.assert_close(a, b, rtol=2 * ERROR[dtype], atol=2 * ERROR[dtype])


def test_they_are_good_operators():
    gate_up, grad = torch.randn(4, 6, requires_grad=True), torch.randn(4, 3)
    operators = torch.ops.llmrecipes
    for operator, arguments in (
        (operators.swiglu, (gate_up,)),
        (operators.swiglu_backward, (grad, gate_up.detach())),
        (operators.swiglu_again, (grad, gate_up.detach())),
    ):
        assert set(torch.library.opcheck(operator.default, arguments).values()) == {"SUCCESS"}
    assert not fits_swiglu(gate_up.double())
    with pytest.raises(AssertionError, match="3 columns"):
        swiglu(torch.randn(2, 3))
    with pytest.raises(AssertionError, match="gradient"):
        swiglu_again(torch.randn(2, 3), torch.randn(2, 4))

"""fp32 products by oneDNN, on whatever machine this is: the same loss and gradients as torch's."""

import pytest
import torch

from llmrecipes.kernels import products
from llmrecipes.kernels.library import without_kernels
from llmrecipes.kernels.products import multiplies_faster, multiply
from llmrecipes.losses import linear_cross_entropy


@pytest.fixture
def as_on_amd(monkeypatch):
    if not hasattr(torch.ops.mkldnn, "_linear_pointwise"):
        pytest.skip("this build of torch has no oneDNN")
    monkeypatch.setattr(products, "_is_amd_with_avx512", lambda: True)


def test_products_of_matrices_and_their_transposes(as_on_amd):
    torch.manual_seed(0)
    a, b = torch.randn(70, 33), torch.randn(33, 130)
    pairs = [(a, b), (b.t(), a.t()), (a, b.t().contiguous().t()), (a[::2], b[:, 5:77])]
    for left, right in pairs:
        exact = left.double() @ right.double()
        torch.testing.assert_close(multiply(left, right).double(), exact, rtol=0, atol=2e-5)
    assert len(pairs) == 4


def test_who_takes_it(as_on_amd):
    assert multiplies_faster(torch.zeros(1))
    assert not multiplies_faster(torch.zeros(1).bfloat16())
    assert not multiplies_faster(torch.zeros(1).double())
    assert not multiplies_faster(torch.zeros(1, device="meta"))
    with without_kernels():
        assert not multiplies_faster(torch.zeros(1))


def loss_and_gradients(vocab_size):
    torch.manual_seed(0)
    hidden, weight = torch.randn(300, 48, requires_grad=True), torch.randn(9000, 48, requires_grad=True)
    labels = torch.randint(0, vocab_size or 9000, (300,))
    labels[::7] = -100
    loss, count = linear_cross_entropy(hidden, weight, labels, chunk_size=128, vocab_size=vocab_size)
    (loss / count).backward()
    return loss.detach(), hidden.grad, weight.grad


@pytest.mark.parametrize("vocab_size", [None, 8990], ids=["whole", "padded"])
def test_the_head_is_the_same(as_on_amd, vocab_size, monkeypatch):
    calls = []
    real = products.multiply
    monkeypatch.setattr("llmrecipes.losses.cross_entropy.multiply", lambda a, b: calls.append(1) or real(a, b))
    found = loss_and_gradients(vocab_size)
    assert len(calls) == 3 * (1 + 1 + 2)  # chunks of 128, 128 and 2: logits, hidden, two blocks of ids
    with without_kernels():
        expected = loss_and_gradients(vocab_size)
    assert len(calls) == 12
    for a, b in zip(found, expected, strict=True):
        torch.testing.assert_close(a, b, rtol=1e-5, atol=1e-5 * b.abs().max().item())


def test_mutant_a_product_of_the_wrong_operand_is_noticed(as_on_amd, monkeypatch):
    monkeypatch.setattr(
        "llmrecipes.losses.cross_entropy.multiply",
        lambda a, b: products.multiply(a, b).flip(0) if a.shape[0] > 1000 else products.multiply(a, b),
    )
    found = loss_and_gradients(None)
    with without_kernels():
        expected = loss_and_gradients(None)
    assert (found[2] - expected[2]).abs().max() > 1e-3

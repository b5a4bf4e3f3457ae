"""Balance losses and measures against hand-computed cases."""

from __future__ import annotations

import pytest
import torch

from llmrecipes.losses import balance_loss, balance_sum, bias_update, load_entropy, max_violation


def route(logits, top_k):
    probs = logits.softmax(-1)
    counts = torch.bincount(probs.topk(top_k, dim=-1).indices.flatten(), minlength=logits.shape[-1])
    return probs.sum(0), counts


def test_one_at_balance_and_experts_over_k_at_collapse():
    even = torch.full((4,), 25.0, dtype=torch.float64)
    assert balance_loss(even, torch.full((4,), 50), 100, 2).item() == 1.0
    collapsed = torch.tensor([50.0, 50.0, 0.0, 0.0], dtype=torch.float64)
    assert balance_loss(collapsed, torch.tensor([100, 100, 0, 0]), 100, 2).item() == 2.0
    one = torch.tensor([100.0, 0.0, 0.0, 0.0], dtype=torch.float64)
    assert balance_loss(one, torch.tensor([100, 0, 0, 0]), 100, 1).item() == 4.0


def test_by_hand():
    # 2 tokens, 3 experts, k = 1: f = [1/2, 1/2, 0], P = [(.5+.2)/2, (.3+.7)/2, (.2+.1)/2]
    got = balance_loss(torch.tensor([0.7, 1.0, 0.3]), torch.tensor([1, 1, 0]), 2, 1)
    assert got.item() == pytest.approx(3 * (0.5 * 0.35 + 0.5 * 0.5))


def test_mutant_pooled_over_layers_reads_balanced():
    layers = [(torch.tensor([50.0, 50.0, 0, 0]), torch.tensor([100, 100, 0, 0]))]
    layers.append((layers[0][0].flip(0), layers[0][1].flip(0)))
    ours = sum(balance_loss(p, c, 100, 2) for p, c in layers) / 2
    pooled = balance_loss(sum(p for p, _ in layers), sum(c for _, c in layers), 200, 2)
    assert ours.item() == 2.0
    assert pooled.item() == 1.0  # what transformers computes, times k


def test_sums_of_micro_batches_and_ranks_add_to_the_loss_of_the_step():
    logits = torch.randn(90, 8, dtype=torch.float64, generator=torch.Generator().manual_seed(0)).requires_grad_()
    prob_sum, counts = route(logits, 2)
    whole = balance_loss(prob_sum, counts, 90, 2)
    (want,) = torch.autograd.grad(whole, logits)
    terms = [balance_sum(route(part, 2)[0], counts, 90, 2) / 90 for part in logits.split([1, 50, 39])]
    (got,) = torch.autograd.grad(sum(terms), logits)
    torch.testing.assert_close(sum(terms), whole, rtol=0, atol=1e-14)
    torch.testing.assert_close(got, want, rtol=0, atol=1e-14)
    mutant = sum(balance_loss(*route(part, 2), len(part), 2) for part in logits.split([1, 50, 39])) / 3
    assert abs(mutant.item() - whole.item()) > 1e-2


def test_gradient_pushes_away_from_the_full_expert():
    logits = torch.zeros(10, 4)
    logits[:, 0] = 0.1
    logits.requires_grad_()
    prob_sum, counts = route(logits, 1)
    balance_loss(prob_sum, counts, 10, 1).backward()
    assert (logits.grad[:, 0] > 0).all() and (logits.grad[:, 1:] < 0).all()


def test_measures():
    counts = torch.tensor([[10, 10, 10, 10], [40, 0, 0, 0], [20, 20, 0, 0]])
    torch.testing.assert_close(max_violation(counts), torch.tensor([0.0, 3.0, 1.0]))
    torch.testing.assert_close(load_entropy(counts), torch.tensor([1.0, 0.0, 0.5]))
    assert load_entropy(torch.zeros(4)).item() == 0 and load_entropy(torch.ones(1)).item() == 0


def test_bias_update_by_hand():
    got = bias_update(torch.tensor([8, 2, 2, 0]), 0.1)  # mean 3: -1, +1, +1, +1, centred by -0.5
    torch.testing.assert_close(got, torch.tensor([-0.15, 0.05, 0.05, 0.05]))
    assert bias_update(torch.randint(0, 9, (5, 8)), 1e-3).sum(-1).abs().max() < 1e-8
    assert torch.all(bias_update(torch.tensor([3, 3, 3]), 0.1) == 0)

"""Preference losses against hand-written formulas; label log-probabilities against log_softmax."""

from __future__ import annotations

import math

import pytest
import torch

from llmrecipes.losses import Answers, label_log_probs, preference_loss


def numbers(seed, n=6):
    """Log-probabilities of answers, policy and reference, fp64, and lengths."""
    draw = torch.Generator().manual_seed(seed)
    policy = -20 * torch.rand(n, 2, dtype=torch.float64, generator=draw) - 1
    reference = policy + torch.randn(n, 2, dtype=torch.float64, generator=draw)
    lengths = torch.randint(3, 30, (n, 2), generator=draw)
    return policy, reference, lengths


def answers(both):
    return Answers(both[:, 0], both[:, 1])


def by_hand(kind, policy, reference, lengths, beta, smoothing):
    """One pair at a time, with Python's own arithmetic."""
    losses = []
    for (pc, pr), (rc, rr), (mc, mr) in zip(policy.tolist(), reference.tolist(), lengths.tolist(), strict=True):
        margin = (pc - rc) - (pr - rr)
        per_token = (pc - rc) / mc - (pr - rr) / mr
        if kind == "hinge":
            losses.append(max(0.0, 1 - beta * margin))
        elif kind == "ipo":
            losses.append((per_token - 1 / (2 * beta)) ** 2)
        elif kind == "orpo":
            chosen, rejected = math.exp(pc / mc), math.exp(pr / mr)
            ratio = (chosen / (1 - chosen)) / (rejected / (1 - rejected))
            losses.append(-pc / mc + beta * math.log(1 + 1 / ratio))
        else:
            z = beta * (per_token if kind == "sigmoid_norm" else margin)
            losses.append((1 - smoothing) * math.log1p(math.exp(-z)) + smoothing * math.log1p(math.exp(z)))
    return torch.tensor(losses, dtype=torch.float64)


KINDS = ("sigmoid", "sigmoid_norm", "hinge", "ipo", "orpo")


@pytest.mark.parametrize("kind", KINDS)
@pytest.mark.parametrize("smoothing", [0.0, 0.2])
def test_losses_by_hand(kind, smoothing):
    for seed in range(20):
        policy, reference, lengths = numbers(seed)
        given = None if kind == "orpo" else answers(reference)
        losses, rewards = preference_loss(answers(policy), given, answers(lengths), kind, 0.3, smoothing)
        torch.testing.assert_close(
            losses, by_hand(kind, policy, reference, lengths, 0.3, smoothing), rtol=1e-12, atol=0
        )
        if kind != "orpo":
            torch.testing.assert_close(rewards.chosen, 0.3 * (policy - reference)[:, 0], rtol=1e-12, atol=1e-12)


def test_mutants_differ():
    policy, reference, lengths = numbers(0)
    right = preference_loss(answers(policy), answers(reference), answers(lengths), "sigmoid", 0.1)[0]
    swapped = preference_loss(answers(policy.flip(1)), answers(reference.flip(1)), answers(lengths), "sigmoid", 0.1)[0]
    averaged = preference_loss(answers(policy), answers(reference), answers(lengths), "sigmoid_norm", 0.1)[0]
    assert (right - swapped).abs().min() > 1e-3
    assert (right - averaged).abs().min() > 1e-3


def test_equal_policy_and_reference_is_ln_two():
    policy, _, lengths = numbers(1)
    losses, rewards = preference_loss(answers(policy), answers(policy), answers(lengths), "sigmoid", 0.1)
    assert losses.tolist() == [math.log(2)] * 6
    assert rewards.chosen.tolist() == [0.0] * 6


def test_odds_stay_finite_at_the_ends():
    """Probabilities near one and near zero: no infinity, no NaN, in the loss and in its gradient."""
    policy = torch.tensor([[-1e-9, -500.0], [-500.0, -1e-9], [-0.7, -0.69]], dtype=torch.float64, requires_grad=True)
    lengths = answers(torch.ones(3, 2))
    losses, _ = preference_loss(answers(policy), None, lengths, "orpo", 0.1)
    losses.sum().backward()
    assert torch.isfinite(losses).all() and torch.isfinite(policy.grad).all()


@pytest.mark.parametrize("chunk", [1, 3, 100])
def test_label_log_probs_and_their_gradients(chunk):
    draw = torch.Generator().manual_seed(0)
    hidden = torch.randn(17, 8, dtype=torch.float64, generator=draw, requires_grad=True)
    weight = torch.randn(40, 8, dtype=torch.float64, generator=draw, requires_grad=True)
    labels = torch.randint(0, 37, (17,), generator=draw)
    scale = torch.randn(17, dtype=torch.float64, generator=draw)
    got = label_log_probs(hidden, weight, labels, chunk, vocab_size=37)
    grads = torch.autograd.grad((got * scale).sum(), (hidden, weight))
    want = (hidden @ weight[:37].t()).log_softmax(-1).gather(1, labels[:, None])[:, 0]
    wanted = torch.autograd.grad((want * scale).sum(), (hidden, weight))
    torch.testing.assert_close(got, want, rtol=0, atol=1e-13)
    for mine, theirs in zip(grads, wanted, strict=True):
        torch.testing.assert_close(mine, theirs, rtol=0, atol=1e-13)
    assert grads[1][37:].abs().max() == 0
    mutant = label_log_probs(hidden, weight, labels, chunk)  # padded rows take part
    assert (mutant - want).abs().max() > 1e-3


def test_under_autocast_in_half_precision():
    draw = torch.Generator().manual_seed(0)
    hidden, weight = torch.randn(64, 32, generator=draw), torch.randn(100, 32, generator=draw)
    labels = torch.randint(0, 100, (64,), generator=draw)
    with torch.autocast("cpu", torch.bfloat16):
        got = label_log_probs(hidden, weight, labels)
    want = (hidden @ weight.t()).log_softmax(-1).gather(1, labels[:, None])[:, 0]
    assert got.dtype == torch.float32
    assert (got - want).abs().max() < 0.15

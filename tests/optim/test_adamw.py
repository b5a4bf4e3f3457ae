"""AdamW: which parameters decay, and the update against the formulas of the paper."""

from __future__ import annotations

from collections import Counter

import pytest
import torch

from llmrecipes.models import Decoder, ModelConfig, MoEConfig
from llmrecipes.optim import AdamW


def decoder(moe: bool) -> Decoder:
    config = ModelConfig(
        vocab_size=32,
        dim=16,
        num_layers=2,
        num_heads=2,
        ffn_dim=24,
        norm="layer",
        bias=True,
        qkv_bias=True,
        qk_norm=True,
        moe=MoEConfig(num_experts=4, ffn_dim=8) if moe else None,
    )
    return Decoder(config)


@pytest.mark.parametrize("moe", [False, True], ids=["dense", "moe"])
def test_every_parameter_is_in_exactly_one_group(moe):
    model = decoder(moe)
    optimizer = AdamW(lr=1e-3, weight_decay=0.3).build(model.named_parameters())
    decayed, others = optimizer.param_groups
    assert (decayed["weight_decay"], others["weight_decay"]) == (0.3, 0.0)
    seen = Counter(id(p) for group in optimizer.param_groups for p in group["params"])
    named = dict(model.named_parameters())
    assert len(named) > 15
    assert seen == Counter(id(p) for p in named.values())
    assert set(seen.values()) == {1}
    plain = {id(p) for p in others["params"]}
    for name, parameter in named.items():
        one_dimensional = "norm" in name or name.endswith("bias")
        assert (id(parameter) in plain) == one_dimensional == (parameter.ndim < 2), name
    assert plain and decayed["params"]


def test_names_that_match_a_pattern_do_not_decay():
    model = decoder(moe=True)
    recipe = AdamW(lr=1e-3, no_decay=["embed", r"mlp\.gate"])
    spared = {n for n, p in model.named_parameters() if p.ndim >= 2 and not recipe.decays(n, p)}
    assert spared == {"embed.weight", "layers.0.mlp.gate.weight", "layers.1.mlp.gate.weight"}
    groups = recipe.build(model.named_parameters()).param_groups
    named = dict(model.named_parameters())
    assert {id(named[n]) for n in spared} <= {id(p) for p in groups[1]["params"]}


def test_frozen_parameters_are_left_out_and_empty_groups_too():
    model = decoder(moe=False)
    for parameter in model.parameters():
        parameter.requires_grad_(False)
    model.head.weight.requires_grad_(True)
    groups = AdamW(lr=1e-3).build(model.named_parameters()).param_groups
    assert [[id(p) for p in group["params"]] for group in groups] == [[id(model.head.weight)]]


def by_hand(parameter, gradients, lr, betas, eps, weight_decay, decoupled=True):
    """Algorithm 2 of 1711.05101 with bias correction; ``decoupled=False`` is L2 regularisation, the mutant."""
    p, m, v = parameter.clone(), torch.zeros_like(parameter), torch.zeros_like(parameter)
    for t, gradient in enumerate(gradients, start=1):
        g = gradient if decoupled else gradient + weight_decay * p
        m = betas[0] * m + (1 - betas[0]) * g
        v = betas[1] * v + (1 - betas[1]) * g * g
        step = (m / (1 - betas[0] ** t)) / ((v / (1 - betas[1] ** t)).sqrt() + eps)
        p = p - lr * step - (lr * weight_decay * p if decoupled else 0)
    return p


def test_five_updates_equal_the_paper():
    generator = torch.Generator().manual_seed(0)
    start = {"matrix": (4, 3), "norm": (3,)}
    start = {n: torch.randn(shape, generator=generator, dtype=torch.float64) for n, shape in start.items()}
    gradients = {
        n: [torch.randn(p.shape, generator=generator, dtype=torch.float64) for _ in range(5)] for n, p in start.items()
    }
    values = {"lr": 0.02, "betas": (0.9, 0.95), "eps": 1e-8, "weight_decay": 0.3}
    live = {n: torch.nn.Parameter(p.clone()) for n, p in start.items()}
    optimizer = AdamW(**values).build(live.items())
    for i in range(5):
        for name, parameter in live.items():
            parameter.grad = gradients[name][i].clone()
        optimizer.step()
    for name, weight_decay in (("matrix", 0.3), ("norm", 0.0)):
        expected = by_hand(start[name], gradients[name], **values | {"weight_decay": weight_decay})
        assert torch.allclose(live[name], expected, rtol=0, atol=1e-12), name
        assert (live[name] - start[name]).abs().max() > 0.01
    mutant = by_hand(start["matrix"], gradients["matrix"], **values, decoupled=False)
    assert not torch.allclose(live["matrix"], mutant, rtol=0, atol=1e-3)
    mutant = by_hand(start["norm"], gradients["norm"], **values)
    assert not torch.allclose(live["norm"], mutant, rtol=0, atol=1e-3)

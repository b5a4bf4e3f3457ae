"""Routing by hand, the grouped kernel against the loop, and the corners: no rows, one expert, odd widths."""

from __future__ import annotations

from dataclasses import replace

import pytest
import torch

from llmrecipes.models import MoEConfig
from llmrecipes.models.dispatch import (
    _combine,
    _combine_weighted,
    _gather,
    _gather_scaled,
    _sum_rows,
    can_group,
    loop_experts,
    make_plan,
    run_experts,
)
from llmrecipes.models.moe import ModelConfig, MoE, Router

D, F, E = 32, 48, 8


def operands(tokens, top_k, dtype=torch.float32, kind="swiglu", experts=None, seed=0):
    g = torch.Generator().manual_seed(seed)
    up_rows = 2 * F if kind == "swiglu" else F
    x = torch.randn(tokens, D, generator=g).to(dtype).requires_grad_()
    weights = torch.rand(tokens, top_k, generator=g).to(torch.promote_types(dtype, torch.float32)).requires_grad_()
    up = (torch.randn(E, up_rows, D, generator=g) / 6).to(dtype).requires_grad_()
    down = (torch.randn(E, D, F, generator=g) / 7).to(dtype).requires_grad_()
    if experts is None:
        experts = torch.rand(tokens, E, generator=g).topk(top_k, dim=-1).indices
    return x, weights, experts, up, down


def naive(x, weights, experts, up, down, kind):
    out = torch.zeros_like(x)
    for t in range(x.shape[0]):
        for j in range(experts.shape[1]):
            e = experts[t, j]
            features = up[e] @ x[t]
            if kind == "swiglu":
                gate, value = features.chunk(2)
                hidden = torch.nn.functional.silu(gate) * value
            else:
                hidden = torch.nn.functional.gelu(features, approximate="tanh" if kind == "gelu_tanh" else "none")
            out[t] = out[t] + weights[t, j].to(x.dtype) * (down[e] @ hidden)
    return out


def run(function, arguments, kind, upstream):
    x, weights, experts, up, down = arguments
    if function is loop_experts:
        y = loop_experts(x, weights, up, down, make_plan(experts, E), kind)
    else:
        y = function(x, weights, experts, up, down, kind)
    return [y.detach(), *torch.autograd.grad(y, (x, weights, up, down), upstream)]


def relative(a, b):
    return ((a - b).norm() / b.norm().clamp_min(1e-30)).item()


@pytest.mark.parametrize("kind", ["swiglu", "gelu", "gelu_tanh"])
@pytest.mark.parametrize("top_k", [1, 2, 3])
def test_loop_is_the_definition(kind, top_k):
    arguments = operands(11, top_k, torch.float64, kind)
    upstream = torch.randn(11, D, dtype=torch.float64)
    assert not can_group(arguments[0], arguments[3], arguments[4])  # fp64 takes the loop
    for got, want in zip(
        run(run_experts, arguments, kind, upstream), run(naive, arguments, kind, upstream), strict=True
    ):
        torch.testing.assert_close(got, want, rtol=0, atol=1e-12)


@pytest.mark.parametrize("kind", ["swiglu", "gelu", "gelu_tanh"])
@pytest.mark.parametrize("top_k", [1, 2, 6])
def test_grouped_equals_loop(kind, top_k):
    arguments = operands(300, top_k, kind=kind)
    assert can_group(arguments[0], arguments[3], arguments[4])
    upstream = torch.randn(300, D, generator=torch.Generator().manual_seed(1))
    results = [run(f, arguments, kind, upstream) for f in (run_experts, loop_experts)]
    for got, want in zip(*results, strict=True):
        assert relative(got, want) <= 1e-5
        assert got.is_contiguous()


def test_weight_of_zero_has_a_gradient():
    arguments = operands(40, 2)
    arguments[1].data[::3] = 0.0
    results = [run(f, arguments, "swiglu", torch.ones(40, D)) for f in (run_experts, loop_experts)]
    assert results[1][2][::3].abs().min() > 0
    for got, want in zip(*results, strict=True):
        assert relative(got, want) <= 1e-5


def test_grouped_bf16_is_near_the_exact_result():
    exact = run(loop_experts, operands(200, 2, torch.float64), "swiglu", torch.ones(200, D, dtype=torch.float64))
    x, weights, experts, up, down = operands(200, 2)
    with torch.autocast("cpu", dtype=torch.bfloat16):
        y = run_experts(x, weights, experts, up, down, "swiglu")
    assert y.dtype == torch.bfloat16
    grads = torch.autograd.grad(y, (x, weights, up, down), torch.ones_like(y))
    assert all(grad.dtype == torch.float32 for grad in grads)
    for got, want in zip((y, *grads), exact, strict=True):
        assert relative(got.double(), want) < 2e-2


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
@pytest.mark.parametrize("top_k", [1, 2, 3, 8])
def test_one_pass_over_the_rows_is_the_sum_of_the_picked_ones(top_k, dtype):
    g = torch.Generator().manual_seed(top_k)
    experts = torch.rand(37, E, generator=g).topk(top_k, dim=-1).indices
    plan = make_plan(experts, E, 1 if dtype == torch.float32 else 64)
    rows = torch.randn(len(plan.token), D, generator=g)
    weights = torch.rand(37, top_k, generator=g).to(dtype)
    allowed = 1e-6 if dtype == torch.float32 else 4e-3
    exact = [_combine(rows.double(), plan, top_k), _combine_weighted(rows.to(dtype).double(), weights.double(), plan)]
    found = [_sum_rows(rows.to(dtype), plan, top_k), _sum_rows(rows.to(dtype), plan, top_k, weights)]
    for one, two in zip(found, exact, strict=True):
        assert one.dtype == dtype
        assert relative(one.double(), two) < allowed
    if top_k > 1:  # what a mistake looks like: weights of the wrong expert
        assert relative(_sum_rows(rows.to(dtype), plan, top_k, weights.flip(1)).double(), exact[1]) > 0.1
    padded = dtype == torch.bfloat16
    x, scale = torch.randn(37, D, generator=g).to(dtype), torch.rand(len(plan.token), generator=g).to(dtype)
    scaled = _gather(x, plan.token, padded).double() * scale.double()[:, None]
    # one rounding to the type, half of its last digit
    rounding = torch.finfo(dtype).eps / 2 * 1.001
    assert ((_gather_scaled(x, plan.token, scale, padded).double() - scaled).abs() <= rounding * scaled.abs()).all()


def test_repeats_are_bitwise_equal():
    arguments = operands(256, 6)
    upstream = torch.randn(256, D)
    before = torch.get_num_threads()
    torch.set_num_threads(2)
    try:
        first = run(run_experts, arguments, "swiglu", upstream)
        for _ in range(15):
            assert all(
                torch.equal(a, b) for a, b in zip(first, run(run_experts, arguments, "swiglu", upstream), strict=True)
            )
    finally:
        torch.set_num_threads(before)


@pytest.mark.parametrize("dtype", [torch.float32, torch.float64])
def test_all_tokens_to_one_expert_leaves_zero_gradients_elsewhere(dtype):
    arguments = operands(50, 1, dtype, experts=torch.full((50, 1), 3))
    _, _, _, grad_up, grad_down = run(run_experts, arguments, "swiglu", torch.ones(50, D, dtype=dtype))
    for grad in (grad_up, grad_down):
        used = grad.flatten(1).abs().amax(1) > 0
        assert used.tolist() == [e == 3 for e in range(E)]


@pytest.mark.parametrize("dtype", [torch.float32, torch.float64])
def test_no_rows(dtype):
    arguments = operands(0, 2, dtype, experts=torch.zeros(0, 2, dtype=torch.long))
    y, *grads = run(run_experts, arguments, "swiglu", torch.zeros(0, D, dtype=dtype))
    assert y.shape == (0, D)
    assert all(torch.equal(g, torch.zeros_like(g)) for g in grads)


def test_widths_that_no_grouped_kernel_takes():
    moe = MoE(ModelConfig(vocab_size=8, dim=6, num_layers=1, num_heads=1, moe=MoEConfig(num_experts=3, ffn_dim=5)))
    y, routing = moe(torch.randn(2, 7, 6))
    y.sum().backward()
    assert routing.counts.sum() == 28
    assert all(p.grad is not None for p in moe.parameters() if p is not moe.gate.weight)


def test_gradcheck_in_fp64():
    x, weights, experts, up, down = operands(5, 2, torch.float64)
    x, up, down = (t.detach()[..., :4].clone().requires_grad_() for t in (x, up, down))
    up_small = up.detach()[:, :6].clone().requires_grad_()
    down_small = down.detach()[:, :4, :3].clone().requires_grad_()
    assert torch.autograd.gradcheck(
        lambda *t: run_experts(t[0], t[1], experts, t[2], t[3], "swiglu"), (x, weights, up_small, down_small)
    )


def test_routing_by_hand():
    router = Router(2, MoEConfig(num_experts=3, ffn_dim=4, top_k=2))
    router.weight.data = torch.tensor([[1.0, 0.0], [0.0, 1.0], [-1.0, -1.0]])
    weights, experts, routing = router(torch.tensor([[2.0, 1.0]]))
    p = torch.tensor([2.0, 1.0, -3.0]).softmax(0)
    assert experts.tolist() == [[0, 1]]
    torch.testing.assert_close(weights[0], p[:2] / p[:2].sum())
    torch.testing.assert_close(routing.prob_sum, p)
    torch.testing.assert_close(routing.z_sum, torch.tensor([2.0, 1.0, -3.0]).logsumexp(0) ** 2)
    torch.testing.assert_close(routing.entropy_sum, -(p * p.log()).sum())
    assert routing.counts.tolist() == [1, 1, 0] and int(routing.num_tokens) == 1


@pytest.mark.parametrize("renormalize", [True, False])
def test_routed_scaling_factor_multiplies_what_the_experts_add(renormalize):
    config = ModelConfig(
        vocab_size=8, dim=8, num_layers=1, num_heads=1, ffn_dim=12,
        moe=MoEConfig(num_experts=4, ffn_dim=8, renormalize=renormalize, shared_ffn_dim=4),
    )  # fmt: skip
    plain, scaled = MoE(config), MoE(replace(config, moe=replace(config.moe, routed_scaling_factor=0.5)))
    for parameter in plain.parameters():
        parameter.data.mul_(10)  # so that it is seen
    scaled.load_state_dict(plain.state_dict())
    plain, scaled, x = plain.double(), scaled.double(), torch.randn(2, 6, 8, dtype=torch.float64)
    beside = plain.shared_gate(x).sigmoid() * plain.shared(x)
    expected = beside + 0.5 * (plain(x)[0] - beside)
    torch.testing.assert_close(scaled(x)[0], expected, rtol=1e-14, atol=1e-14)
    assert (plain(x)[0] - expected).abs().max() > 1e-4


@pytest.mark.parametrize("score", ["softmax", "sigmoid"])
def test_bias_moves_the_choice_but_not_the_weights(score):
    router = Router(2, MoEConfig(num_experts=3, ffn_dim=4, top_k=1, score=score, renormalize=False))
    router.weight.data = torch.tensor([[1.0, 0.0], [0.0, 1.0], [-1.0, -1.0]])
    x = torch.tensor([[2.0, 1.0]])
    router.bias.copy_(torch.tensor([0.0, 0.0, 5.0]))
    weights, experts, routing = router(x)
    logits = torch.tensor([2.0, 1.0, -3.0])
    scores = logits.softmax(0) if score == "softmax" else logits.sigmoid()
    assert experts.tolist() == [[2]]
    torch.testing.assert_close(weights[0, 0], scores[2])
    torch.testing.assert_close(routing.prob_sum.sum(), torch.tensor(1.0))


def test_padding_does_not_enter_the_statistics():
    moe = MoE(
        ModelConfig(vocab_size=8, dim=8, num_layers=1, num_heads=1, moe=MoEConfig(num_experts=4, ffn_dim=8))
    ).double()
    x = torch.randn(2, 6, 8, dtype=torch.float64)
    mask = torch.tensor([[True] * 6, [True] * 2 + [False] * 4])
    _, masked = moe(x, mask)
    _, alone = moe(x[mask][None])
    for got, want in zip(masked, alone, strict=True):
        torch.testing.assert_close(got, want, rtol=0, atol=1e-12)
    assert int(masked.num_tokens) == 8 and masked.counts.sum() == 16


def test_router_stays_fp32():
    router = Router(D, MoEConfig(num_experts=E, ffn_dim=4))
    router.bias.fill_(1 / 3)
    low = router.bfloat16()
    assert low.bias.dtype == torch.float32 and low.bias[0] == torch.tensor(1 / 3)
    assert low.weight.dtype == torch.bfloat16
    weights, _, routing = low(torch.randn(10, D, dtype=torch.bfloat16))
    assert weights.dtype == routing.prob_sum.dtype == routing.z_sum.dtype == torch.float32
    plain = Router(D, MoEConfig(num_experts=E, ffn_dim=4))
    x = torch.randn(64, D)
    with torch.autocast("cpu", dtype=torch.bfloat16):
        under = plain(x)
    assert all(torch.equal(a, b) for a, b in zip(plain(x)[:2], under[:2], strict=True))


def test_meta_router_becomes_real():
    with torch.device("meta"):
        router = Router(D, MoEConfig(num_experts=E, ffn_dim=4)).bfloat16()
    router.to_empty(device="cpu")
    assert router.bias.dtype == torch.float32 and router.bias.device.type == "cpu"


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float32, torch.float64])
def test_a_router_keeps_its_input_as_it_came(dtype):
    """Its product is in fp32 at least, and no copy of the input in fp32 is kept for the backward pass."""
    torch.manual_seed(0)
    moe = MoEConfig(num_experts=4, top_k=2, ffn_dim=8)
    router = MoE(ModelConfig(vocab_size=8, dim=64, num_layers=1, num_heads=2, moe=moe)).gate
    router = router.double() if dtype == torch.float64 else router
    x = torch.randn(100, 64).to(dtype).requires_grad_()
    kept = []
    with torch.autograd.graph.saved_tensors_hooks(lambda t: kept.append(t) or t, lambda t: t):
        weights, _, routing = router(x)
    assert not [t for t in kept if t.numel() == x.numel() and t.data_ptr() != x.data_ptr()]
    (weights[:, 0].sum() + routing.z_sum).backward()
    wide = x.detach().to(torch.promote_types(dtype, torch.float32)).requires_grad_()
    matrix = router.weight.detach().clone().to(wide.dtype).requires_grad_()
    logits = wide @ matrix.t()
    scores = logits.softmax(-1).topk(2, dim=-1).values
    top = scores[:, 0] / scores.sum(-1) if router.renormalize else scores[:, 0]
    (top.sum() + logits.logsumexp(-1).square().sum()).backward()
    torch.testing.assert_close(x.grad, wide.grad.to(dtype))
    torch.testing.assert_close(router.weight.grad, matrix.grad.to(router.weight.dtype))

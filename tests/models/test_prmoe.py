"""PR-MoE and capacity: DeepSpeed's residual layer written down once more, and drop policies by hand."""

from __future__ import annotations

import math
import random
from dataclasses import replace

import pytest
import torch
import torch.nn.functional as F
from torch.utils.checkpoint import checkpoint

from llmrecipes.models import Decoder, ModelConfig, MoEConfig, generate, generate_batch, init_weights
from llmrecipes.models.capacity import dropped_pairs, expert_capacity
from llmrecipes.models.dispatch import loop_experts, make_plan, run_experts
from llmrecipes.models.moe import MoE

D, TOKENS = 16, 48


def layer(top_k=1, dtype=torch.float64, seed=0, num_experts=4, **moe):
    torch.manual_seed(seed)
    options = {"num_experts": num_experts, "ffn_dim": 24, "top_k": top_k, "residual": True, "renormalize": False} | moe
    config = ModelConfig(
        vocab_size=8, dim=D, num_layers=1, num_heads=2, ffn_dim=24, bias=True, activation="gelu",
        moe=MoEConfig(**options),
    )  # fmt: skip
    made = MoE(config).to(dtype)
    with torch.no_grad():
        for parameter in made.parameters():
            parameter.normal_(0, 0.4)
    return made


def tokens(count=TOKENS, dtype=torch.float64, seed=1):
    return torch.randn(2, count // 2, D, generator=torch.Generator().manual_seed(seed), dtype=dtype)


def deepspeed(made, x, mask, capacity=None, swapped=False, renormalized=False, padding_counts=False):
    """DeepSpeed's residual MoE: gating over one-hot masks with places by cumulative sums, then c_0 MoE + c_1 MLP.

    Written from its formulas, one expert and one token at a time, without anything of ours but the weights. Choices are
    taken first before second, in the order of the tokens. The mutants are options.
    """
    flat, used = x.reshape(-1, D), mask.reshape(-1)
    gates = F.softmax(flat @ made.gate.weight.t(), dim=-1)
    left, choices = gates.clone().detach(), []
    for _ in range(made.gate.top_k):
        best = left.argmax(-1)
        choices.append(F.one_hot(best, gates.shape[1]))
        left[torch.arange(len(left)), best] = -1
    taken = torch.zeros(gates.shape[1], dtype=torch.long)
    kept = []
    for choice in choices:
        counted = choice if padding_counts else choice * used[:, None]
        places = counted.cumsum(0) - 1 + taken
        kept.append(choice * used[:, None] * (places < capacity) if capacity is not None else choice * used[:, None])
        taken = taken + counted.sum(0)
    combine = sum(gates * one for one in kept)
    if renormalized:
        combine = combine / combine.sum(-1, keepdim=True).clamp_min(1e-20)
    routed = torch.zeros_like(flat)
    for e, (up, down) in enumerate(zip(made.experts.gate_up_proj, made.experts.down_proj, strict=True)):
        routed = routed + combine[:, e : e + 1] * (F.gelu(flat @ up.t()) @ down.t())
    mlp = made.residual
    dense = F.gelu(flat @ mlp.up.weight.t() + mlp.up.bias) @ mlp.down.weight.t() + mlp.down.bias
    coefficient = F.softmax(flat @ made.coefficient.weight.t() + made.coefficient.bias, dim=-1)
    first, second = (1, 0) if swapped else (0, 1)
    return (routed * coefficient[:, first : first + 1] + dense * coefficient[:, second : second + 1]).view_as(x)


def difference(made, x, mask, capacity, **mutant):
    """Largest difference of the real tokens' outputs, and of any gradient that follows from them."""
    upstream = torch.randn(x.shape, generator=torch.Generator().manual_seed(2), dtype=x.dtype) * mask[..., None]
    results = []
    for compute in (lambda t: made(t, mask)[0], lambda t: deepspeed(made, t, mask, capacity, **mutant)):
        inputs = x.clone().requires_grad_()
        out = compute(inputs)
        parameters = list(made.parameters())
        results.append([out.detach() * mask[..., None], *torch.autograd.grad(out, (inputs, *parameters), upstream)])
    assert len(results[0]) == 2 + 9
    return max(float((a - b).abs().max()) for a, b in zip(*results, strict=True))


@pytest.mark.parametrize("renormalize", [False, True])
@pytest.mark.parametrize("factor", [None, 0.5, 1.0, 1.5])
@pytest.mark.parametrize("top_k", [1, 2, 3])
def test_residual_layer_is_deepspeeds(top_k, factor, renormalize):
    if top_k == 1 and renormalize:
        return  # the one weight is 1: refused by the recipe check
    limited = {} if factor is None else {"capacity_factor": factor, "min_capacity": 2, "drop_policy": "position"}
    made, x = layer(top_k, renormalize=renormalize, **limited), tokens()
    mask = torch.ones(2, TOKENS // 2, dtype=torch.bool)
    mask[1, 5:] = False
    real = int(mask.sum())
    capacity = None if factor is None else max(2, -(-int(2 * factor) * top_k * real // (2 * 4)))
    assert difference(made, x, mask, capacity, renormalized=renormalize) < 1e-12
    dropped = int(made(x, mask)[1].dropped)
    assert dropped > 0 if factor in (0.5, 1.0) else factor is not None or dropped == 0
    assert difference(made, x, mask, capacity, renormalized=renormalize, swapped=True) > 1e-3
    assert difference(made, x, mask, capacity, renormalized=not renormalize) > 1e-3
    if factor == 0.5:
        mutant = {"renormalized": renormalize, "padding_counts": True}
        ahead = mask.flip(1)  # padding in front of the row takes the places of what follows
        assert difference(made, x, ahead, capacity, renormalized=renormalize) < 1e-12
        assert difference(made, x, ahead, capacity, **mutant) > 1e-3


def test_capacity_is_deepspeeds_and_exact():
    def limit(count, num_experts, top_k, factor, minimum=4):
        return int(expert_capacity(torch.tensor(count), num_experts, top_k, factor, minimum))

    assert limit(2048, 64, 1, 1.0) == 32
    assert limit(2048, 64, 2, 1.0) == 64  # the factor is doubled for top-2
    assert limit(2049, 64, 1, 1.0) == 33
    assert limit(100, 64, 1, 1.0) == 4 and limit(100, 64, 1, 1.0, 0) == 2 and limit(0, 64, 1, 1.0) == 4
    assert limit(500, 10, 1, 1.1) == 55 and math.ceil(1.1 * 50) == 56


def by_hand(experts, scores, capacity, policy, mask):
    """Pairs one after another, each taking a place while there is one."""
    pairs = [(t, j) for j in range(experts.shape[1]) for t in range(len(experts))]
    if policy == "probs":
        pairs.sort(key=lambda pair: -float(scores[pair]))
    room = dict.fromkeys(range(int(experts.max()) + 1), capacity)
    dropped = torch.zeros(experts.shape, dtype=torch.bool)
    for t, j in pairs:
        e = int(experts[t, j])
        dropped[t, j] = not mask[t] or room[e] == 0
        room[e] -= not dropped[t, j]
    return dropped


@pytest.mark.parametrize("policy", ["position", "probs", "random"])
def test_policies_by_hand(policy):
    seen = 0
    for seed in range(20):
        draw, g = random.Random(seed), torch.Generator().manual_seed(seed)
        count, top_k, num_experts = draw.choice([1, 7, 40]), draw.choice([1, 2]), draw.choice([2, 5])
        gates = torch.rand(count, num_experts, generator=g)
        scores, experts = gates.topk(top_k, dim=-1)
        mask = torch.rand(count, generator=g) < draw.choice([0.6, 1.1])
        capacity = draw.choice([0, 1, 3, 100])
        got = dropped_pairs(experts, scores, torch.tensor(capacity), policy, mask, torch.Generator().manual_seed(seed))
        if policy == "random":  # who is dropped is drawn; how many of each expert is not
            want = by_hand(experts, scores, capacity, "position", mask)
            for e in range(num_experts):
                assert int((got & (experts == e)).sum()) == int((want & (experts == e)).sum())
            assert got[~mask].all()
        else:
            assert torch.equal(got, by_hand(experts, scores, capacity, policy, mask))
        seen += int((got & mask[:, None]).sum())
    assert seen > 100


def test_random_order_is_fair():
    """Every token is dropped equally often, wherever it stands."""
    experts, scores = torch.zeros(10, 1, dtype=torch.long), torch.ones(10, 1)
    g = torch.Generator().manual_seed(0)
    drops = sum(dropped_pairs(experts, scores, torch.tensor(5), "random", None, g).long() for _ in range(2000))
    assert drops.sum() == 10_000 and drops.min() > 900 and drops.max() < 1100


@pytest.mark.parametrize("policy", ["position", "probs"])
def test_padding_takes_no_place(policy):
    made, x = layer(2, capacity_factor=0.6, min_capacity=0, drop_policy=policy), tokens()
    mask = torch.rand(2, TOKENS // 2, generator=torch.Generator().manual_seed(3)) < 0.6
    masked, with_padding = made(x, mask)
    alone, without = made(x[mask][None])
    torch.testing.assert_close(masked[mask], alone[0], rtol=0, atol=1e-12)
    assert int(with_padding.dropped) == int(without.dropped) > 0
    for got, want in zip(with_padding, without, strict=True):
        torch.testing.assert_close(got, want, rtol=0, atol=1e-12)
    assert (made(x)[0][mask] - alone[0]).abs().max() > 1e-3  # the mutant: all are taken for real


@pytest.mark.parametrize("kept", [0, 1, 60, 299, 600])
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
@pytest.mark.parametrize("top_k", [1, 2])
def test_dropped_pairs_are_as_pairs_of_weight_zero(top_k, dtype, kept):
    """The grouped kernels leave rows of nobody unwritten; they must not be read."""
    g = torch.Generator().manual_seed(0)
    x = torch.randn(300, 32, generator=g).requires_grad_()
    up = (torch.randn(8, 96, 32, generator=g) / 6).requires_grad_()
    down = (torch.randn(8, 32, 48, generator=g) / 7).requires_grad_()
    experts = torch.rand(300, 8, generator=g).topk(top_k, dim=-1).indices
    drop = torch.ones(300 * top_k, dtype=torch.bool)
    drop[torch.randperm(300 * top_k, generator=g)[:kept]] = False
    drop = drop.view(300, top_k)
    weights = torch.rand(300, top_k, generator=g).masked_fill(drop, 0.0).requires_grad_()
    upstream = torch.randn(300, 32, generator=g)
    leaves = (x, weights, up, down)

    def run(chosen, **options):
        with torch.autocast("cpu", dtype=torch.bfloat16, enabled=dtype == torch.bfloat16):
            y = run_experts(x, weights, chosen, up, down, "swiglu", **options)
        grads = list(torch.autograd.grad(y, leaves, upstream.to(y.dtype)))
        grads[1] = grads[1].masked_fill(drop, 0.0)  # a weight of zero has a gradient, a pair that is not there none
        return [y, *grads]

    sparse, plan = run(experts.masked_fill(drop, 8), may_drop=True), make_plan(experts.masked_fill(drop, 8), 8, 1, True)
    loop = loop_experts(x, weights, up, down, plan, "swiglu")
    bound = 1e-5 if dtype == torch.float32 else 2e-2
    assert (sparse[0].float() - loop).norm() <= bound * loop.norm().clamp_min(1e-12)
    for got, want in zip(sparse, run(experts), strict=True):
        assert got.isfinite().all()
        assert (got.float() - want.float()).norm() <= bound * want.float().norm().clamp_min(1e-12)


def test_recomputation_drops_the_same_pairs():
    made, x = layer(2, capacity_factor=0.5, min_capacity=0), tokens()
    results = []
    for compute in (made, lambda t: checkpoint(made, t, use_reentrant=False)):
        torch.manual_seed(5)
        inputs = x.clone().requires_grad_()
        out, routing = compute(inputs)
        out.square().sum().backward()
        results.append((out, inputs.grad, routing.dropped))
    for one, other in zip(*results, strict=True):
        assert torch.equal(one, other)
    torch.manual_seed(6)
    assert not torch.equal(made(x)[0], results[0][0])


def test_outside_of_training():
    """Nothing is dropped unless a capacity is named; then repeatably, and the generator is left alone."""
    made, x = layer(2, capacity_factor=0.5, min_capacity=0), tokens()
    free = layer(2)
    assert int(made(x)[1].dropped) > 0
    made.eval()
    assert torch.equal(made(x)[0], free(x)[0]) and int(made(x)[1].dropped) == 0
    limited = layer(2, capacity_factor=0.5, eval_capacity_factor=0.75, min_capacity=0)
    assert int(limited(x)[1].dropped) > int(limited.eval()(x)[1].dropped) > 0
    before = torch.get_rng_state()
    assert torch.equal(limited(x)[0], limited(x)[0])
    assert torch.equal(torch.get_rng_state(), before)
    assert torch.equal(limited(x, None, True)[0], free(x)[0])


PYRAMID = MoEConfig(
    experts_per_layer=[2, 6], ffn_dim=20, top_k=1, renormalize=False, residual=True,
    capacity_factor=0.5, eval_capacity_factor=0.5, min_capacity=0,
)  # fmt: skip
SIZES = {"vocab_size": 61, "dim": 24, "num_layers": 4, "num_heads": 6, "ffn_dim": 40, "moe_every": 2, "init_std": 0.2}


def test_generation_drops_nothing():
    """A text is the same with and without a cache, alone and in a batch: which tokens are computed together differs."""
    model = Decoder(ModelConfig(**SIZES, moe=PYRAMID)).double().eval()
    init_weights(model, 0)
    prompts = [[1, 2, 3, 4, 5, 6, 7, 8, 9, 10, 11, 12], [20, 21, 22]]
    tokens = torch.tensor(prompts[:1])
    assert sum(int(r.dropped) for r in model(tokens).routing) > 0
    free = Decoder(ModelConfig(**SIZES, moe=replace(PYRAMID, capacity_factor=None, eval_capacity_factor=None,
                                                    min_capacity=None))).double().eval()  # fmt: skip
    free.load_state_dict(model.state_dict())
    assert torch.equal(model(tokens, dropless=True).hidden, free(tokens).hidden)
    assert not torch.allclose(model(tokens).hidden, free(tokens).hidden)
    want = [generate(free, prompt, 12, temperature=0.0) for prompt in prompts]
    for use_cache in (True, False):
        assert [generate(model, prompt, 12, temperature=0.0, use_cache=use_cache) for prompt in prompts] == want
        assert [c.ids for c in generate_batch(model, prompts, 12, use_cache=use_cache)] == want


def test_layers_of_a_pyramid_have_their_own_numbers():
    config = ModelConfig(**SIZES, moe=PYRAMID)
    assert config.layer_experts == [2, 6]
    model = Decoder(config)
    assert [len(b.mlp.gate.weight) for b in model.layers if isinstance(b.mlp, MoE)] == [2, 6]
    assert [len(b.mlp.experts.down_proj) for b in model.layers if isinstance(b.mlp, MoE)] == [2, 6]
    assert [r.counts.shape[0] for r in model(torch.zeros(1, 5, dtype=torch.long)).routing] == [2, 6]
    assert config.moe_of(0) is config.moe_of(2) is None and config.moe_of(3).num_experts == 6
    same = ModelConfig(**SIZES, moe=replace(PYRAMID, experts_per_layer=[6, 6]))
    plain = ModelConfig(**SIZES, moe=replace(PYRAMID, experts_per_layer=None, num_experts=6))
    assert same.num_params == plain.num_params and same.layer_experts == plain.layer_experts


WRONG = [
    ({"experts_per_layer": [2, 6, 6]}, "experts_per_layer names 3 layers, the model has 2 with experts"),
    ({"num_experts": 4}, "num_experts has no effect beside moe.experts_per_layer"),
    ({"experts_per_layer": None}, "num_experts is missing"),
    ({"experts_per_layer": []}, "top_k 1 is not between 1 and 0"),
    ({"top_k": 3}, "top_k 3 is not between 1 and 2, the fewest of"),
    ({"capacity_factor": 0.0}, "capacity_factor 0.0 is not a number above 0"),
    ({"eval_capacity_factor": float("inf")}, "eval_capacity_factor inf is not"),
    (
        {"capacity_factor": None},
        "eval_capacity_factor has no effect without moe.capacity_factor; .*min_capacity has no",
    ),
    ({"min_capacity": -1}, "min_capacity -1 is negative"),
    ({"shared_ffn_dim": 8}, "shared_ffn_dim and moe.residual are two answers"),
]


@pytest.mark.parametrize(("change", "problem"), WRONG, ids=lambda v: str(v)[:30])
def test_what_does_not_fit_is_refused(change, problem):
    with pytest.raises(ValueError, match=rf"moe\.{problem}"):
        ModelConfig(**SIZES, moe=replace(PYRAMID, **change))


def test_residual_needs_the_width_of_its_network():
    with pytest.raises(ValueError, match=r"ffn_dim is missing: moe\.residual"):
        ModelConfig(**(SIZES | {"ffn_dim": None, "moe_every": 1}), moe=replace(PYRAMID, experts_per_layer=[2] * 4))

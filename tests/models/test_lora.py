"""Adapters: nothing at first, exact in every form, counted as published, frozen weights without gradients."""

from __future__ import annotations

import itertools

import pytest
import torch
import torch.nn.functional as F

from llmrecipes.errors import UserError
from llmrecipes.losses import linear_cross_entropy
from llmrecipes.models import Decoder, LoraConfig, LoraExperts, ModelConfig, init_weights
from llmrecipes.models.low_rank import adapted_linear, choose_form, routed_update, sort_pairs
from llmrecipes.modules.trainable import GROUPS, frozen_active, matching, set_trainable

SIZES = {"vocab_size": 64, "dim": 32, "num_layers": 2, "num_heads": 4, "num_kv_heads": 2, "ffn_dim": 48}
LLAMA2_7B = {"vocab_size": 32000, "dim": 4096, "num_layers": 32, "num_heads": 32, "ffn_dim": 11008}
EVERYWHERE = ".*"
KINDS = {
    "one": {"rank": 4, "alpha": 8, "targets": EVERYWHERE},
    "per_linear": {"rank": 4, "alpha": 8, "targets": EVERYWHERE, "experts": LoraExperts(num_experts=3)},
    "no_null": {"rank": 4, "alpha": 8, "experts": LoraExperts(num_experts=3, null_expert=False)},
    "per_mlp": {"rank": 4, "alpha": 8, "experts": LoraExperts(num_experts=3, router="per_mlp")},
    "per_mlp_down": {
        "rank": 4, "alpha": 8, "targets": r".*down_proj",
        "experts": LoraExperts(num_experts=3, router="per_mlp", null_expert=False),
    },
}  # fmt: skip


def build(lora, seed=3, dtype=torch.float64, b_std=0.0, **sizes):
    config = ModelConfig(**(SIZES | sizes), lora=None if lora is None else LoraConfig(**lora))
    decoder = Decoder(config)
    init_weights(decoder, seed)
    decoder = decoder.to(dtype).eval()
    generator = torch.Generator().manual_seed(5)
    with torch.no_grad():
        for name, p in decoder.named_parameters():
            if name.endswith(".b") and b_std:
                p.copy_(torch.randn(p.shape, generator=generator) * b_std)
            if name.endswith("router.weight"):
                p.copy_(torch.randn(p.shape, generator=generator))
    return decoder


def tokens(length=24):
    return torch.randint(0, 64, (2, length), generator=torch.Generator().manual_seed(0))


@pytest.mark.parametrize("sizes", [{}, {"activation": "gelu", "bias": True, "qkv_bias": True}], ids=str)
@pytest.mark.parametrize("kind", KINDS)
def test_zero_b_is_exactly_the_base(kind, sizes):
    """Bit for bit where the base's products are the same; a router per network moves them behind the sum of experts."""
    adapted, base = build(KINDS[kind], **sizes), build(None, **sizes)
    shared = {n: t for n, t in adapted.state_dict().items() if ".lora." not in n and ".router." not in n}
    base.load_state_dict(shared)
    found, expected = adapted(tokens()), base(tokens()).hidden
    if kind.startswith("per_mlp"):
        assert (found.hidden - expected).abs().max() < 1e-14
    else:
        assert torch.equal(found.hidden, expected)
    assert len(found.routing) == {"one": 0, "per_linear": 4 + 3, "no_null": 3}.get(kind, 1) * 2 - (
        2 * (sizes != {}) if kind in ("per_linear", "no_null") else 0
    )
    other = build(KINDS[kind], b_std=0.3, **sizes)
    assert (other(tokens()).hidden - expected).abs().max() > 1e-2


@pytest.mark.parametrize("kind", KINDS)
def test_counts_are_those_of_the_modules(kind):
    decoder = build(KINDS[kind])
    assert sum(p.numel() for p in decoder.parameters()) == decoder.config.num_params
    experts = decoder.config.lora.experts
    one = sum(p.numel() for n, p in decoder.named_parameters() if ".lora." in n and "router" not in n)
    share = 1 if experts is None else 2 / 3
    assert decoder.config.num_params - decoder.config.active_params == round(one * (1 - share))


def test_published_counts_on_llama2_7b():
    """Rank 640 on gate, up and down; trained in the router stage and with experts frozen, for 3 and for 4 choices."""
    lora = {"rank": 640, "alpha": 32, "dropout": 0.1}
    found = {}
    with torch.device("meta"):
        one = Decoder(ModelConfig(**LLAMA2_7B, lora=LoraConfig(**lora)))
        set_trainable(one, ["lora"], [])
        assert trainable(one) == 927_989_760
        for null in (False, True):
            experts = LoraExperts(num_experts=3, null_expert=null)
            model = Decoder(ModelConfig(**LLAMA2_7B, lora=LoraConfig(**lora, experts=experts)))
            set_trainable(model, ["gate", "lm_head"], [])
            router = trainable(model)
            set_trainable(model, ["all"], ["experts"])
            found[null] = router, trainable(model), model.config.num_params
    assert found == {
        False: (132_915_200, 2_411_737_088, 9_524_228_096),
        True: (133_529_600, 2_412_351_488, 9_524_842_496),
    }


def trainable(model):
    return sum(p.numel() for p in model.parameters() if p.requires_grad)


def drawn(n, k, r, null, dtype=torch.float64, d_in=24, d_out=40, tokens=60, seed=0):
    generator = torch.Generator().manual_seed(seed)
    x, a, b, logits = (
        torch.randn(*shape, generator=generator, dtype=torch.float64).to(dtype).requires_grad_()
        for shape in ((tokens, d_in), (n, r, d_in), (n, d_out, r), (tokens, n + null))
    )
    return x, a, b, logits


def by_definition(x, a, b, logits, k, scale):
    """``sum over e of m_e * scale * B_e A_e x`` with m_e the softmax over the chosen logits, else zero."""
    values, chosen = logits.topk(k, -1)
    weights = values.softmax(-1)
    out = x.new_zeros(len(x), b.shape[1])
    for e in range(len(a)):
        share = (weights * (chosen == e)).sum(-1, keepdim=True)
        out = out + F.linear(F.linear(x, a[e]), b[e]) * scale * share
    return out


@pytest.mark.parametrize(("n", "k", "r", "null"), [(3, 2, 8, True), (3, 2, 8, False), (8, 3, 4, True), (1, 1, 4, True)])
def test_forms_and_gradients_equal_the_definition(n, k, r, null):
    grad = torch.randn(60, 40, generator=torch.Generator().manual_seed(9), dtype=torch.float64)
    inputs = drawn(n, k, r, null)
    x, a, b, logits = inputs
    expected = by_definition(*inputs, k, 0.7)
    wanted = torch.autograd.grad((expected * grad).sum(), inputs)
    seen = 0
    for form, dtype in itertools.product(("grouped", "concatenated"), (torch.float64, torch.float32)):
        values, experts = logits.topk(k, -1)
        cast = [t.to(dtype) for t in inputs]
        weights = values.softmax(-1).to(dtype)
        found = routed_update(cast[0], weights, experts, cast[1], cast[2], 0.7, 0.0, null, form)
        bound = 1e-12 if dtype == torch.float64 else 1e-4
        assert (found - expected).abs().max() < bound
        for gradient, want in zip(torch.autograd.grad((found * grad.to(dtype)).sum(), inputs), wanted, strict=True):
            assert (gradient - want).abs().max() < bound
        seen += 1
    assert seen == 4
    # mutant: the null expert taken for the last adapter
    if null and n > 1:
        wrong = routed_update(x, values.softmax(-1), experts.clamp(max=n - 1), a, b, 0.7, 0.0, False, "grouped")
        assert (wrong - expected).abs().max() > 1e-2


@pytest.mark.parametrize("rows", [5, 8], ids=["few", "many"])  # beside 7 features
@pytest.mark.parametrize("given", ["a", "hidden"])
@pytest.mark.parametrize("columns", [[slice(0, 6), slice(6, 9)], [slice(2, 5)]], ids=["all", "some"])
def test_an_adapted_map_and_its_gradients_equal_the_definition(columns, given, rows):
    draw = torch.Generator().manual_seed(0)

    def drawn_for(*size):
        return torch.randn(size, dtype=torch.float64, generator=draw, requires_grad=True)

    x, weight, bias, a = drawn_for(rows, 7), drawn_for(9, 7), drawn_for(9), drawn_for(4 * len(columns), 7)
    b = [drawn_for(part.stop - part.start, 4) for part in columns]

    def of(x, weight, bias, a, *b):
        low = {"a": a} if given == "a" else {"hidden": x @ a.t()}
        return adapted_linear(x, weight, bias, columns, 0.7, list(b), **low)

    expected = x @ weight.t() + bias
    for part, matrix, into in zip(columns, b, a.split(4), strict=True):
        update = torch.zeros(rows, 9, dtype=torch.float64)
        update[:, part] = 0.7 * x.detach() @ into.detach().t() @ matrix.detach().t()
        expected = expected + update
    found = of(x, weight, bias, a, *b)
    torch.testing.assert_close(found, expected, rtol=1e-13, atol=1e-13)
    assert (of(x, weight, bias, a, *(matrix.flip(0) for matrix in b)) - expected).abs().max() > 0.1  # mutant
    assert torch.autograd.gradcheck(of, (x, weight, bias, a, *b))
    assert torch.autograd.gradcheck(lambda a, *b: of(x.detach(), weight.detach(), bias.detach(), a, *b), (a, *b))


def test_in_bf16_an_adapted_map_is_nearer_to_fp64_than_the_separate_products():
    """One rounding of the sum where there were two; what is small beside the frozen map is not lost."""
    draw = torch.Generator().manual_seed(0)
    x, weight, a = (torch.randn(size, generator=draw).bfloat16() for size in ((256, 64), (96, 64), (8, 64)))
    b, columns = (1e-2 * torch.randn(96, 8, generator=draw)).bfloat16(), [slice(0, 96)]
    exact = x.double() @ weight.double().t() + 0.5 * x.double() @ a.double().t() @ b.double().t()
    apart = F.linear(x, weight) + F.linear(F.linear(x, a) * 0.5, b)
    found = adapted_linear(x, weight, None, columns, 0.5, [b], a)

    def error(out):
        return (out.double() - exact).norm() / exact.norm()

    assert error(found) < error(apart) < 5e-3
    base = F.linear(x, weight)
    assert error(base) > 5 * error(found)  # mutant: no update at all


def test_all_tokens_to_the_null_expert_and_none_at_all():
    x, a, b, _ = drawn(3, 1, 4, True)
    nobody = torch.full((60, 1), 3)
    for form in ("grouped", "concatenated"):
        out = routed_update(x, torch.ones(60, 1, dtype=x.dtype), nobody, a, b, 1.0, 0.0, True, form)
        assert out.shape == (60, 40) and not out.any()
        gradients = torch.autograd.grad(out.sum(), (x, a, b))
        assert not any(g.any() for g in gradients)
        empty = routed_update(x[:0], x.new_ones(0, 1), nobody[:0], a, b, 1.0, 0.0, True, form)
        assert empty.shape == (0, 40)


def test_bf16_blocks_are_padded_and_padding_adds_nothing():
    x, a, b, logits = (t.detach().bfloat16() for t in drawn(3, 2, 16, True, d_in=32, d_out=48))
    values, experts = logits.topk(2, -1)
    pairs = sort_pairs(experts, 3, True, 64)
    assert pairs.padded and int(pairs.ends[-1]) % 64 == 0 and len(pairs.token) == int(pairs.ends[-1])
    weights = values.float().softmax(-1)
    found = routed_update(x, weights, experts, a, b, 0.7, 0.0, True, "grouped").float()
    expected = by_definition(*(t.double() for t in (x, a, b, logits)), 2, 0.7)
    assert (found - expected).abs().max() / expected.abs().max() < 2e-2
    assert torch.equal(found, routed_update(x, weights, experts, a, b, 0.7, 0.0, True, "grouped").float())


def test_the_form_follows_the_rule():
    cases = {(3, 2, 64): "concatenated", (3, 2, 640): "grouped", (16, 2, 16): "concatenated", (8, 2, 64): "grouped"}
    for (n, k, r), form in cases.items():
        assert choose_form(n, k, r, 0.0) == form, (n, k, r)
    assert choose_form(3, 2, 8, 0.1) == "grouped"


def test_dropout_draws_for_each_pair_and_only_in_training():
    decoder = build({"rank": 4, "alpha": 8, "dropout": 0.5, "experts": LoraExperts(num_experts=3)}, b_std=0.3)
    assert torch.equal(decoder(tokens()).hidden, decoder(tokens()).hidden)
    decoder.train()
    assert not torch.equal(decoder(tokens()).hidden, decoder(tokens()).hidden)
    ones = torch.ones(2000, 8, dtype=torch.float64)
    one_hot = torch.eye(8, dtype=torch.float64)[None]
    everyone = torch.zeros(2000, 1, dtype=torch.int64)
    out = routed_update(ones, ones[:, :1], everyone, one_hot, one_hot, 1.0, 0.25)
    assert set(out.unique().tolist()) == {0.0, 1 / 0.75}
    assert abs(float((out == 0).double().mean()) - 0.25) < 0.02


def folded(decoder, expert):
    """The dense decoder that one expert makes: W + scale B A; None = the null expert."""
    dense = build(None, dtype=torch.float64)
    state = {n: t.clone() for n, t in decoder.state_dict().items() if ".lora." not in n and ".router." not in n}
    lora = decoder.config.lora
    for name, a in decoder.state_dict().items():
        if not name.endswith(".a") or expert is None:
            continue
        b = decoder.state_dict()[name[:-1] + "b"]
        update = lora.scale * (b @ a if a.ndim == 2 else b[expert] @ a[expert])
        block, part = name.split(".mlp.")[0], name.split(".")[-2]
        ffn = decoder.config.ffn_dim
        target = state[f"{block}.mlp.{'down' if part == 'down' else 'gate_up'}.weight"]
        begin = ffn if part == "up" else 0
        target[begin : begin + len(update)] += update
    dense.load_state_dict(state)
    return dense


@pytest.mark.parametrize("router", ["per_linear", "per_mlp"])
def test_a_one_hot_router_is_that_expert(router):
    lora = {"rank": 4, "alpha": 8, "experts": LoraExperts(num_experts=3, top_k=1, router=router)}
    decoder = build(lora, b_std=0.3)
    others = []
    for expert in range(4):
        for name, buffer in decoder.named_buffers():
            if name.endswith("router.bias"):
                buffer.copy_(torch.eye(4)[expert] * 100)
        expected = folded(decoder, None if expert == 3 else expert)(tokens()).hidden
        assert (decoder(tokens()).hidden - expected).abs().max() < 1e-12
        others.append(expected)
    assert min((p - q).abs().max() for p, q in itertools.combinations(others, 2)) > 1e-2


@pytest.mark.parametrize("router", ["per_linear", "per_mlp"])
def test_equal_experts_are_the_dense_model_whatever_the_router_does(router):
    lora = {"rank": 4, "alpha": 8, "experts": LoraExperts(num_experts=3, null_expert=False, router=router)}
    decoder = build(lora, b_std=0.3)
    with torch.no_grad():
        for name, p in decoder.named_parameters():
            if ".lora." in name and "router" not in name:
                p.copy_(p[:1].expand_as(p))
    expected = folded(decoder, 0)(tokens()).hidden
    assert (decoder(tokens()).hidden - expected).abs().max() < 1e-12
    single = decoder.float()
    assert (single(tokens()).hidden - expected).abs().max() < 1e-5


def test_a_router_per_network_is_the_mixture_of_folded_networks():
    """Base products once, exactly: weights of the experts' sum go before the down projection, which is linear."""
    lora = {"rank": 4, "alpha": 8, "experts": LoraExperts(num_experts=3, router="per_mlp")}
    decoder = build(lora, b_std=0.3)
    experts = [folded(decoder, e).layers[0].mlp for e in (0, 1, 2, None)]
    routed = decoder.layers[0].mlp
    x = torch.randn(2, 20, 32, dtype=torch.float64, generator=torch.Generator().manual_seed(2))
    weights, chosen, _ = routed.router(x.flatten(0, 1))
    outs = torch.stack([mlp(x).flatten(0, 1) for mlp in experts], 1)
    expected = (outs.gather(1, chosen[..., None].expand(-1, -1, 32)) * weights[..., None]).sum(1)
    assert (routed(x).flatten(0, 1) - expected).abs().max() < 1e-12
    # mutant: weights after the down projection of the base, before that of the adapters
    assert (routed(x).flatten(0, 1) - outs.mean(1)).abs().max() > 1e-2


@pytest.mark.parametrize("kind", KINDS)
def test_frozen_weights_have_no_gradient_at_all(kind):
    decoder = build(KINDS[kind], b_std=0.3)
    groups = ["lora"] if kind == "one" else ["gate"]
    set_trainable(decoder, groups, [])
    hidden = decoder(tokens()).hidden.flatten(0, 1)
    loss, _ = linear_cross_entropy(hidden, decoder.head_weight, tokens().flatten())
    loss.backward()
    for name, p in decoder.named_parameters():
        assert (p.grad is not None) == p.requires_grad, name
        assert p.requires_grad == (".lora." in name and "router" not in name if kind == "one" else "router" in name)


def test_frozen_weights_cost_two_thirds():
    """Forward and the gradient of what they are multiplied by, but none of their own: 4 FLOPs per weight, not 6."""
    decoder = build(KINDS["per_linear"])
    config = decoder.config
    set_trainable(decoder, ["all"], [])
    assert frozen_active(decoder, config) == 0
    set_trainable(decoder, ["embeddings"], [])
    assert frozen_active(decoder, config) == config.active_params - config.vocab_rows * config.dim
    set_trainable(decoder, ["all"], ["lora"])
    stacks = sum(p.numel() for name, p in decoder.named_parameters() if not p.requires_grad)
    assert frozen_active(decoder, config) == stacks * 2 // 3


def test_groups_are_exact():
    names = [name for name, _ in build(KINDS["per_linear"]).named_parameters()]
    assert len(names) == 1 + 2 * (2 + 4 + 7 * 3) + 2
    gates = matching("gate", names)
    assert len(gates) == 14 and all(name.endswith("router.weight") for name in gates)
    assert not matching("experts", names) & gates
    assert "layers.0.mlp.gate_up.weight" in matching("experts", names)
    assert not any(".attention." in name for name in matching("experts", names))
    # the mutant of mergoo's recipe: a search for "gate" trains the gate projections too
    assert any("gate_up.weight" in name for name in matching("gate(?!$)", names))
    tied = [name for name, _ in build(None, tie_embeddings=True).named_parameters()]
    assert matching("lm_head", tied) == {"embed.weight"}
    covered = set().union(*(matching(g, names) for g in GROUPS if g != "all"))
    assert covered == set(names)
    for item, problem in (("gat3", "is no parameter of this model; groups: all, gate"), ("(", "no regular expression")):
        with pytest.raises(UserError, match=problem):
            matching(item, names)
    with pytest.raises(UserError, match="nothing is left"):
        set_trainable(build(None), ["norms"], ["norms"])


@pytest.mark.parametrize(
    ("lora", "problem"),
    [
        ({"rank": 0, "alpha": 1}, "lora.rank 0"),
        ({"rank": 2, "alpha": 1, "targets": "("}, "no regular expression"),
        ({"rank": 2, "alpha": 1, "targets": "gate_proj"}, "matches no linear map"),
        ({"rank": 2, "alpha": 1, "dropout": 1.0}, "dropout 1.0"),
        ({"rank": 2, "alpha": 1, "experts": LoraExperts(num_experts=2, top_k=4)}, "top_k 4 is not between 1 and 3"),
        (
            {"rank": 2, "alpha": 1, "targets": ".*", "experts": LoraExperts(num_experts=2, router="per_mlp")},
            "per_mlp beside adapters on self_attn",
        ),
    ],
)
def test_mistakes_are_named(lora, problem):
    with pytest.raises(ValueError, match=problem):
        ModelConfig(**SIZES, lora=LoraConfig(**lora))

"""Sizes, packing, caches, initial weights and types of the decoder."""

from __future__ import annotations

import math
import random
from dataclasses import replace

import pytest
import torch
import torch.nn.functional as F
from torch.nn.attention import SDPBackend, sdpa_kernel
from torch.utils.checkpoint import checkpoint
from torch.utils.flop_counter import FlopCounterMode

from llmrecipes.losses import linear_cross_entropy
from llmrecipes.models import Decoder, KVCache, ModelConfig, MoEConfig, RopeScaling, generate, init_weights
from llmrecipes.models.context import make_context
from llmrecipes.models.rotary import inverse_frequencies

TINY = {"vocab_size": 61, "dim": 24, "num_layers": 2, "num_heads": 6, "num_kv_heads": 2, "ffn_dim": 40}
MOE = MoEConfig(num_experts=4, ffn_dim=20)


def make(seed=0, dtype=torch.float32, **options):
    model = Decoder(ModelConfig(**(TINY | {"init_std": 0.2, "max_seq_len": 64} | options))).to(dtype)
    init_weights(model, seed)
    return model.eval()


def ids(rows, length, vocab=61, seed=0):
    return torch.randint(0, vocab, (rows, length), generator=torch.Generator().manual_seed(seed))


def meta_count(config):
    with torch.device("meta"):
        return sum(p.numel() for p in Decoder(config).parameters())


RELEASED = {
    "llama2-7B": (
        {"vocab_size": 32000, "dim": 4096, "num_layers": 32, "num_heads": 32, "ffn_dim": 11008},
        6_738_415_616,
        6_738_415_616,
    ),
    "Mixtral-8x7B": (
        {"vocab_size": 32000, "dim": 4096, "num_layers": 32, "num_heads": 32, "num_kv_heads": 8,
         "moe": MoEConfig(num_experts=8, ffn_dim=14336)},
        46_702_792_704,
        12_879_925_248,
    ),
    "dMoE": (
        {"vocab_size": 56320, "dim": 2048, "num_layers": 40, "num_heads": 32,
         "moe": MoEConfig(num_experts=8, ffn_dim=4096)},
        8_955_660_288,
        2_915_862_528,
    ),
}  # fmt: skip


@pytest.mark.parametrize("name", RELEASED)
def test_parameters_of_released_models(name):
    sizes, total, active = RELEASED[name]
    config = ModelConfig(**sizes)
    assert meta_count(config) == config.num_params == total
    assert config.active_params == active


def random_config(index):
    draw = random.Random(index)
    kv_heads = draw.choice([1, 2, 3])
    heads = kv_heads * draw.choice([1, 2, 4])
    moe = MoEConfig(num_experts=draw.choice([2, 5, 8]), ffn_dim=draw.choice([16, 20]), top_k=draw.choice([1, 2]))
    config = ModelConfig(
        vocab_size=draw.choice([50, 77]),
        dim=heads * draw.choice([4, 8]),
        num_layers=draw.choice([1, 2, 4]),
        num_heads=heads,
        num_kv_heads=draw.choice([None, kv_heads]),
        head_dim=draw.choice([None, 6]),
        ffn_dim=draw.choice([16, 30]),
        norm=draw.choice(["rms", "layer"]),
        activation=draw.choice(["swiglu", "gelu", "gelu_tanh"]),
        positions=draw.choice(["rope", "alibi", "learned", "none"]),
        max_seq_len=32,
        rope_scaling=draw.choice([None, RopeScaling(original_max_seq_len=8)]),
        qkv_bias=draw.random() < 0.5,
        bias=draw.random() < 0.5,
        qk_norm=draw.random() < 0.5,
        tie_embeddings=draw.random() < 0.5,
        embedding_norm=draw.random() < 0.5,
        moe=draw.choice([None, moe]),
        moe_every=draw.choice([1, 2]),
        init_std=0.2,
    )
    if config.moe is None:
        return config
    beside = draw.choice([{}, {"residual": True}, {"shared_ffn_dim": 12}])
    pyramid = {}
    if draw.random() < 0.5:
        pyramid = {"num_experts": None, "experts_per_layer": [draw.choice([2, 5, 8]) for _ in config.layer_experts]}
    return replace(config, moe=replace(config.moe, **beside, **(pyramid if config.layer_experts else {})))


def test_any_configuration_counts_trains_and_packs():
    seen = set()
    for index in range(40):
        config = random_config(index)
        assert meta_count(config) == config.num_params, config
        model = Decoder(config).double()
        init_weights(model, index)
        tokens = ids(2, 12, config.vocab_size, index)
        lengths = [[3, 8, 1], [12]]
        packed = model(tokens, document_lengths=lengths)
        alone = [
            model(doc[None]).hidden[0] for row, sizes in zip(tokens, lengths, strict=True) for doc in row.split(sizes)
        ]
        torch.testing.assert_close(packed.hidden.flatten(0, 1), torch.cat(alone), rtol=0, atol=1e-12)
        loss, count = linear_cross_entropy(packed.hidden.flatten(0, 1), model.head_weight, tokens.flatten())
        (loss / count + sum(r.prob_sum.square().sum() for r in packed.routing)).backward()
        assert all(p.grad is not None and p.grad.isfinite().all() for p in model.parameters()), config
        seen.add(str(config))
    assert len(seen) == 40


@pytest.mark.parametrize("positions", ["rope", "alibi", "learned", "none"])
@pytest.mark.parametrize("moe", [None, MOE], ids=["dense", "moe"])
def test_packed_equals_alone_in_fp32(positions, moe):
    model = make(positions=positions, moe=moe)
    tokens = ids(2, 40)
    lengths = [[7, 1, 20, 12], [33, 7]]
    packed = model.logits(model(tokens, document_lengths=lengths).hidden).flatten(0, 1)
    alone = [
        model.logits(model(d[None]).hidden)[0] for row, n in zip(tokens, lengths, strict=True) for d in row.split(n)
    ]
    torch.testing.assert_close(packed, torch.cat(alone), rtol=0, atol=1e-5)
    mutant = model.logits(model(tokens).hidden).flatten(0, 1)  # without the borders
    assert (mutant - torch.cat(alone)).abs().max() > 1e-2


@pytest.mark.parametrize("moe", [None, MOE], ids=["dense", "moe"])
def test_one_document_does_not_touch_the_next(moe):
    model = make(dtype=torch.float64, moe=moe)
    outcomes = []
    for seed in (1, 2):
        tokens = ids(1, 30, seed=3)
        tokens[:, :14] = ids(1, 14, seed=seed)
        model.zero_grad()
        hidden = model(tokens, document_lengths=[[14, 16]]).hidden
        linear_cross_entropy(hidden[0, 14:], model.head_weight, tokens[0, 14:])[0].backward()
        outcomes.append([p.grad.clone() for p in model.parameters()])
    assert len(outcomes[0]) > 10
    for first, second in zip(*outcomes, strict=True):
        torch.testing.assert_close(first, second, rtol=0, atol=1e-12)


def test_tokens_never_see_later_ones():
    for positions in ("rope", "alibi", "learned", "none"):
        model = make(dtype=torch.float64, positions=positions, moe=MOE)
        tokens = ids(1, 20)
        changed = tokens.clone()
        changed[0, 11:] = ids(1, 9, seed=5)
        before, after = model(tokens).hidden, model(changed).hidden
        torch.testing.assert_close(before[:, :11], after[:, :11], rtol=0, atol=1e-12)
        assert not torch.allclose(before[:, 11:], after[:, 11:])


@pytest.mark.parametrize("positions", ["rope", "alibi", "learned", "none"])
@pytest.mark.parametrize("moe", [None, MOE], ids=["dense", "moe"])
def test_cache_equals_no_cache(positions, moe):
    model = make(dtype=torch.float64, positions=positions, moe=moe)
    tokens = ids(2, 23)
    with torch.no_grad():
        whole = model(tokens).hidden
        cache = KVCache(model.config, 2, 23, torch.float64)
        parts = [model(part, cache=cache).hidden for part in tokens.split([9, 1, 1, 8, 4], dim=1)]
    torch.testing.assert_close(torch.cat(parts, 1), whole, rtol=0, atol=1e-12)


def test_generation_is_the_same_with_and_without_cache():
    model = make(moe=MOE).train()
    for temperature, top_k in ((0.0, None), (1.0, None), (0.7, 5)):
        runs = [
            generate(model, [1, 2, 3], 20, temperature=temperature, top_k=top_k, use_cache=cached,
                     generator=torch.Generator().manual_seed(7))
            for cached in (True, False)
        ]  # fmt: skip
        assert runs[0] == runs[1] and len(runs[0]) == 20
    assert model.training
    eos = runs[0][4]
    stopped = generate(
        model, [1, 2, 3], 20, temperature=0.7, top_k=5, generator=torch.Generator().manual_seed(7), eos_id=eos
    )
    assert stopped == runs[0][: runs[0].index(eos) + 1]


def test_rotary_angles_survive_bfloat16():
    config = ModelConfig(**(TINY | {"dim": 96}))
    model = Decoder(config)
    assert not [name for name, _ in model.named_buffers()]
    model = model.bfloat16()
    context = make_context(config, torch.zeros(1, 4096, dtype=torch.long), torch.float32)
    assert context.cos.dtype == torch.float32
    frequencies = 10000.0 ** (-torch.arange(0, config.head_width, 2, dtype=torch.float64) / config.head_width)
    exact = (4095 * frequencies).cos()
    assert (context.cos[0, -1] - exact).abs().max() < 1e-3
    mutant = (4095 * frequencies.bfloat16().double()).cos()  # frequencies that went through bf16
    assert (mutant - exact).abs().max() > 1e-2
    # bf16 logits stay near those of the same rounded weights in fp32
    tokens = ids(1, 60)
    wide = Decoder(config).eval()
    wide.load_state_dict({k: v.float() for k, v in model.state_dict().items()})
    torch.testing.assert_close(model.eval()(tokens).hidden.float(), wide(tokens).hidden, rtol=0, atol=0.1)


def test_llama3_scaling_stretches_slow_frequencies_only():
    device = torch.device("cpu")
    plain = inverse_frequencies(128, 5e5, None, torch.float64, device)
    scaled = inverse_frequencies(128, 5e5, RopeScaling(), torch.float64, device)
    ratio = plain / scaled
    wavelength = 2 * math.pi / plain
    assert torch.all(ratio[wavelength < 8192 / 4] == 1)
    torch.testing.assert_close(ratio[wavelength > 8192], torch.full_like(ratio[wavelength > 8192], 8.0))
    assert torch.all(ratio.diff() >= -1e-12)


def test_first_loss_is_ln_vocab():
    for moe in (None, MoEConfig(num_experts=8, ffn_dim=64)):
        config = ModelConfig(vocab_size=4096, dim=128, num_layers=4, num_heads=4, ffn_dim=256, moe=moe)
        model = Decoder(config)
        init_weights(model, 0)
        tokens = ids(2, 128, 4096)
        with torch.no_grad():
            loss, count = linear_cross_entropy(
                model(tokens).hidden.flatten(0, 1), model.head_weight, tokens.roll(-1).flatten()
            )
        assert abs(loss.item() / count.item() / math.log(4096) - 1) < 0.02


def test_initial_weights_depend_on_seed_and_name_only():
    first, second, third = make(seed=1, moe=MOE), make(seed=1, moe=MOE, num_layers=3), make(seed=2, moe=MOE)
    names = dict(second.named_parameters())
    matrices = 0
    for name, parameter in first.named_parameters():
        if name.endswith(("attention.out.weight", "experts.down_proj")):
            ratio = parameter / names[name]  # the same draw, another depth
            torch.testing.assert_close(ratio, torch.full_like(ratio, math.sqrt(3 / 2)))
        else:
            assert torch.equal(parameter, names[name])
        if parameter.ndim >= 2:
            matrices += 1
            assert not torch.equal(parameter, dict(third.named_parameters())[name])
            expected = 0.2 / (2 if name.endswith(("attention.out.weight", "experts.down_proj")) else 1)
            if name in ("embed.weight", "head.weight", "position_embed.weight"):
                expected = 0.02  # at most: the first loss is to be ln(vocab_size)
            assert abs(parameter.std().item() / expected - 1) < 0.25
        else:
            assert torch.all(parameter == 1)
    assert matrices == 2 + 2 * 5
    wide = make(seed=1, moe=MOE, dtype=torch.float64)
    assert all(torch.equal(p.double(), q) for p, q in zip(first.parameters(), wide.parameters(), strict=True))


def test_state_dict_names():
    names = set(make(moe=MOE, moe_every=2, qk_norm=True, qkv_bias=True, embedding_norm=True).state_dict())
    assert {
        "embed.weight", "embed_norm.weight", "norm.weight", "head.weight",
        "layers.0.attention_norm.weight", "layers.0.attention.qkv.weight", "layers.0.attention.qkv.bias",
        "layers.0.attention.out.weight", "layers.0.attention.q_norm.weight", "layers.0.attention.k_norm.weight",
        "layers.0.mlp_norm.weight", "layers.0.mlp.gate_up.weight", "layers.0.mlp.down.weight",
        "layers.1.mlp.gate.weight", "layers.1.mlp.gate.bias", "layers.1.mlp.experts.gate_up_proj",
        "layers.1.mlp.experts.down_proj",
    } <= names  # fmt: skip
    assert "head.weight" not in make(tie_embeddings=True).state_dict()


def test_statistics_count_once_under_activation_checkpointing():
    model = make(moe=MOE).train()
    tokens = ids(2, 16)
    plain = model(tokens)
    plain.hidden.square().sum().backward()
    grads = [p.grad.clone() for p in model.parameters() if p.grad is not None]
    for block in model.layers:
        inner = block.forward
        block.forward = lambda *args, inner=inner: checkpoint(inner, *args, use_reentrant=False)
    model.zero_grad()
    again = model(tokens)
    again.hidden.square().sum().backward()
    assert len(again.routing) == 2
    for a, b in zip(plain.routing, again.routing, strict=True):
        assert torch.equal(a.counts, b.counts) and a.counts.sum() == 2 * 16 * 2
    for a, b in zip(grads, [p.grad for p in model.parameters() if p.grad is not None], strict=True):
        assert torch.equal(a, b)


def test_dropout_acts_in_training_only():
    model = make(dropout=0.2, moe=MOE)
    tokens = ids(1, 16)
    assert torch.equal(model(tokens).hidden, model(tokens).hidden)
    model.train()
    torch.manual_seed(0)
    first = model(tokens, document_lengths=[[5, 11]]).hidden
    assert not torch.equal(first, model(tokens, document_lengths=[[5, 11]]).hidden)
    torch.manual_seed(0)
    assert torch.equal(first, model(tokens, document_lengths=[[5, 11]]).hidden)


def test_embedding_norm_is_a_norm_of_the_embedding():
    model = make(embedding_norm=True, norm="layer", num_layers=1)
    torch.nn.init.normal_(model.embed_norm.weight)
    torch.nn.init.normal_(model.embed_norm.bias)
    tokens = ids(1, 5)
    twin = make(norm="layer", num_layers=1)
    twin.load_state_dict({k: v for k, v in model.state_dict().items() if not k.startswith("embed_norm")})
    table = F.layer_norm(model.embed.weight, (24,), model.embed_norm.weight, model.embed_norm.bias, 1e-5)
    twin.embed.weight.data.copy_(table)
    torch.testing.assert_close(model(tokens).hidden, twin(tokens).hidden)


FLOPS = {
    "dense": None,
    "prmoe": MoEConfig(experts_per_layer=[3, 8], ffn_dim=192, top_k=1, renormalize=False, residual=True),
    "shared": MoEConfig(num_experts=6, ffn_dim=64, top_k=3, shared_ffn_dim=160),
}


@pytest.mark.parametrize("kind", FLOPS)
def test_flops_agree_with_the_counter(kind):
    config = ModelConfig(
        vocab_size=512, dim=128, num_layers=3, num_heads=4, num_kv_heads=2, ffn_dim=256,
        moe=FLOPS[kind], dense_layers=[0] if FLOPS[kind] else None,
    )  # fmt: skip
    model = Decoder(config).double()  # the grouped product is not counted either; in fp64 there is none
    tokens = ids(2, 64, 512)
    with FlopCounterMode(display=False) as counter, sdpa_kernel(SDPBackend.MATH):  # the fused kernel is not counted
        model.logits(model(tokens).hidden).sum().backward()
    attention = 6 * config.num_layers * 64 * config.dim
    # without a fused kernel all pairs are computed, of which the causal half is the model's work
    expected = config.flops_per_token(64) + attention
    assert abs(counter.get_total_flops() / tokens.numel() / expected - 1) < 0.02

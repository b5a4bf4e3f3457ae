"""What single families bring: packing, caches, initial weights, weight decay, counts, gradients."""

from __future__ import annotations

import math

import pytest
import torch
from torch.nn.attention import SDPBackend, sdpa_kernel
from torch.utils.flop_counter import FlopCounterMode

from llmrecipes.kernels.library import without_kernels
from llmrecipes.losses import linear_cross_entropy
from llmrecipes.models import Decoder, KVCache, ModelConfig, MoEConfig, RopeScaling, generate, init_weights
from llmrecipes.models.activation import activate, activate_again
from llmrecipes.models.rotary import inverse_frequencies
from llmrecipes.optim import AdamW

TINY = {"vocab_size": 61, "dim": 24, "num_layers": 3, "num_heads": 6, "num_kv_heads": 2, "ffn_dim": 40, "head_dim": 8}
YARN = RopeScaling(kind="yarn", factor=4.0, original_max_seq_len=64)
LONG = RopeScaling(
    kind="longrope", factor=4.0, original_max_seq_len=64, short_factor=[1.0, 1.5, 2.0, 3.0], long_factor=[2.0] * 4
)
MECHANISMS = {
    "parallel_residual": {"parallel_residual": True, "norm": "layer", "activation": "gelu", "bias": True},
    "rotary_fraction": {"rotary_fraction": 0.5},
    "post": {"norm_position": "post", "qk_norm": True, "qk_norm_scope": "all"},
    "both": {"norm_position": "both", "norm_plus_one": True},
    "geglu": {"activation": "geglu"},
    "geglu_experts": {"activation": "geglu", "moe": MoEConfig(num_experts=4, ffn_dim=20), "ffn_dim": None},
    "nope_layers": {"nope_layers": [1]},
    "window_rope_theta": {"window_rope_theta": 500.0, "sliding_window": 5, "window_layers": [0, 2]},
    "scales": {"embedding_scale": 3.0, "residual_scale": 0.4, "attention_scale": 0.2, "logit_divisor": 4.0},
    "yarn": {"rope_scaling": YARN},
    "dynamic": {"rope_scaling": RopeScaling(kind="dynamic", original_max_seq_len=64)},
    "longrope": {"rope_scaling": LONG},
}
# Options that must be felt: without it the result is another. (Dynamic changes nothing within its length.)
USUAL = {"activation": "swiglu", "norm": "rms", "bias": False, "qk_norm": False, "norm_position": "pre", "moe": None}


def make(name, seed=0, dtype=torch.float64):
    model = Decoder(ModelConfig(**(TINY | {"init_std": 0.2} | MECHANISMS[name]))).to(dtype)
    init_weights(model, seed)
    with torch.no_grad():  # away from one and zero, where a norm in the wrong place would not show
        for parameter in model.parameters():
            if parameter.ndim == 1:
                parameter.add_(torch.randn(parameter.shape, generator=torch.Generator().manual_seed(1)) * 0.3)
    return model.eval()


def ids(rows, length, seed=0):
    return torch.randint(0, 61, (rows, length), generator=torch.Generator().manual_seed(seed))


@pytest.mark.parametrize("name", MECHANISMS)
def test_packed_documents_equal_each_alone_and_counts_are_right(name):
    model, tokens, lengths = make(name), ids(2, 30), [[7, 1, 20, 2], [12, 18]]
    assert model.config.num_params == sum(p.numel() for p in model.parameters())
    packed = model(tokens, document_lengths=lengths).hidden.flatten(0, 1)
    alone = [model(d[None]).hidden[0] for row, sizes in zip(tokens, lengths, strict=True) for d in row.split(sizes)]
    torch.testing.assert_close(packed, torch.cat(alone), rtol=0, atol=1e-12)
    assert (model(tokens).hidden.flatten(0, 1) - torch.cat(alone)).abs().max() > 1e-2  # the mutant: without borders
    loss, _ = linear_cross_entropy(packed, model.head_weight, tokens.flatten())
    loss.backward()
    assert all(p.grad is not None and p.grad.isfinite().all() for p in model.parameters())
    assert sum(bool(p.grad.any()) for p in model.parameters()) >= len(list(model.parameters())) - 3


@pytest.mark.parametrize("name", MECHANISMS)
def test_a_cache_changes_nothing(name):
    model, tokens = make(name), ids(2, 23)
    with torch.no_grad():
        whole = model(tokens).hidden
        cache = KVCache(model.config, 2, 23, torch.float64)
        parts = [model(part, cache=cache).hidden for part in tokens.split([9, 1, 1, 8, 4], dim=1)]
    torch.testing.assert_close(torch.cat(parts, 1), whole, rtol=0, atol=1e-12)
    runs = [generate(model, [1, 2, 3], 12, temperature=0.0, use_cache=cached) for cached in (True, False)]
    assert runs[0] == runs[1] and len(runs[0]) == 12


def test_each_mechanism_is_felt():
    for name, options in MECHANISMS.items():
        model = make(name)
        plain = Decoder(ModelConfig(**(TINY | {k: v for k, v in options.items() if k in USUAL}))).double().eval()
        if name in ("parallel_residual", "rotary_fraction", "nope_layers", "window_rope_theta", "scales", "yarn",
                    "longrope", "dynamic"):  # fmt: skip
            plain.load_state_dict(model.state_dict())
            tokens = ids(1, 30)
            felt = (plain(tokens).hidden - model(tokens).hidden).abs().max() > 1e-3
            assert felt == (name != "dynamic"), name


@pytest.mark.parametrize("name", ["dynamic", "longrope"])
def test_texts_beyond_which_the_angles_change_are_refused(name):
    model = make(name)
    assert model.config.longest_text == 64
    model(ids(1, 64))
    model(ids(1, 90), document_lengths=[[60, 30]])
    with pytest.raises(AssertionError, match="a document of 65 tokens, but positions are known for 64 only"):
        model(ids(1, 65))
    assert len(generate(model, [1] * 60, 20)) == 4  # as many as there are positions


def test_initial_weights_and_decay():
    model = Decoder(ModelConfig(**TINY, norm_position="both", norm_plus_one=True, qk_norm=True))
    init_weights(model, 0)
    norms = {n: p for n, p in model.named_parameters() if p.ndim == 1}
    assert len(norms) == 3 * 6 + 1 and all(not p.any() for p in norms.values())  # 1 + 0
    optimizer = AdamW(lr=1e-3)
    assert not any(optimizer.decays(n, p) for n, p in norms.items())
    assert all(optimizer.decays(n, p) for n, p in model.named_parameters() if p.ndim == 2)
    x = torch.randn(3, 24)
    torch.testing.assert_close(model.norm(x), torch.nn.functional.rms_norm(x, (24,), eps=1e-5))
    assert model.norm(x.bfloat16()).dtype == torch.bfloat16
    # The first loss is ln(vocab) with every scale, because embedding and head start small.
    for name in MECHANISMS:
        model = Decoder(ModelConfig(**(TINY | MECHANISMS[name])))
        init_weights(model, 0)
        loss, count = linear_cross_entropy(
            model(ids(4, 40)).hidden.flatten(0, 1), model.head_weight, ids(4, 40, 1).flatten()
        )
        assert abs(loss / count - math.log(61)) < 0.05, name


def test_geglu_and_its_gradient_by_definition():
    gate_up = torch.randn(5, 14, dtype=torch.float64, requires_grad=True)
    gate, up = gate_up.chunk(2, -1)
    expected = 0.5 * gate * (1 + torch.tanh(math.sqrt(2 / math.pi) * (gate + 0.044715 * gate**3))) * up
    torch.testing.assert_close(activate(gate_up, "geglu"), expected, rtol=0, atol=1e-14)
    upstream = torch.randn(5, 7, dtype=torch.float64)
    (grad,) = torch.autograd.grad(expected, gate_up, upstream)
    hidden, again, _ = activate_again(upstream, gate_up.detach(), "geglu")
    torch.testing.assert_close(hidden, expected, rtol=0, atol=1e-14)
    torch.testing.assert_close(again, grad, rtol=0, atol=1e-14)
    assert (activate(gate_up, "swiglu") - expected).abs().max() > 1e-2


def test_yarn_keeps_fast_pairs_and_stretches_slow_ones():
    """2309.00071: more than beta_fast turns within the original length are kept, fewer than beta_slow divided."""
    scaling = RopeScaling(kind="yarn", factor=8.0, original_max_seq_len=4096)
    plain, yarn = (inverse_frequencies(64, 1e4, s, torch.float64, torch.device("cpu")) for s in (None, scaling))
    turns = 4096 * plain / (2 * math.pi)
    fast, slow = turns > 60, turns < 0.5  # well beyond the ends, which are rounded to whole pairs
    assert fast.sum() > 3 and slow.sum() > 3
    torch.testing.assert_close(yarn[fast], plain[fast])
    torch.testing.assert_close(yarn[slow], plain[slow] / 8)
    assert ((yarn <= plain) & (yarn >= plain / 8)).all() and (yarn.diff() < 0).all()
    assert scaling.amplitude == pytest.approx(1 + 0.1 * math.log(8))


@pytest.mark.parametrize("name", ["parallel_residual", "both", "geglu", "scales", "rotary_fraction"])
def test_flops_agree_with_the_counter(name):
    sizes = {"vocab_size": 512, "dim": 128, "num_layers": 3, "num_heads": 4, "num_kv_heads": 2, "ffn_dim": 256}
    config = ModelConfig(**(sizes | MECHANISMS[name]))
    model, tokens = Decoder(config), torch.zeros(2, 64, dtype=torch.long)
    # fused kernels are not counted
    with FlopCounterMode(display=False) as counter, sdpa_kernel(SDPBackend.MATH), without_kernels():
        model.logits(model(tokens).hidden).sum().backward()
    attention = 6 * config.num_layers * 64 * config.dim
    # without a fused kernel all pairs are computed, of which the causal half is the model's work
    expected = config.flops_per_token(64) + attention
    assert abs(counter.get_total_flops() / tokens.numel() / expected - 1) < 0.02


MISTAKES = [
    ({"rotary_fraction": 0.1}, "rotary positions need an even head width, not 8 of which rotary_fraction rotates 0"),
    ({"rotary_fraction": 2.0}, "rotates 16"),
    ({"nope_layers": [7]}, "nope_layers 7 is not one of the layers 0 to 2"),
    ({"nope_layers": [1], "positions": "alibi"}, "nope_layers has no effect without positions: rope"),
    ({"window_rope_theta": 1e4}, "window_rope_theta has no effect without sliding_window"),
    ({"parallel_residual": True, "norm_position": "post"}, "parallel_residual goes with norm_position: pre, not post"),
    ({"norm": "layer", "norm_plus_one": True}, "norm_plus_one goes with norm: rms"),
    ({"logit_divisor": 0.0}, "logit_divisor 0.0 is not a number above 0"),
    ({"rope_scaling": RopeScaling(kind="longrope")}, "rope_scaling.short_factor needs 4 numbers above 0"),
    ({"rope_scaling": RopeScaling(kind="yarn", beta_fast=0.5)}, "rope_scaling needs 0 < beta_slow <= beta_fast"),
    ({"rope_scaling": RopeScaling(low_freq_factor=4.0)}, "rope_scaling needs 0 < low_freq_factor < high_freq_factor"),
]


@pytest.mark.parametrize(("options", "problem"), MISTAKES, ids=lambda value: str(value)[:40])
def test_options_that_do_not_fit_are_refused(options, problem):
    with pytest.raises(ValueError, match=problem.replace(".", r"\.")):
        ModelConfig(**(TINY | options))

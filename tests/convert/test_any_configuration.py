"""Any point of ModelConfig: transformers computes the same under the family that is named, or there is none."""

from __future__ import annotations

import random
from dataclasses import replace

import pytest
import torch
from hf_models import tokens_for

from llmrecipes.convert import config_from_hf, config_to_hf, hf_family, to_hf_state_dict
from llmrecipes.errors import UserError
from llmrecipes.models import Decoder, ModelConfig, MoEConfig, RopeScaling, init_weights

transformers = pytest.importorskip("transformers")
pytestmark = pytest.mark.oracle

CONFIGURATIONS = 1200
SCALINGS = (
    RopeScaling(original_max_seq_len=64), RopeScaling(kind="linear", factor=2.0),
    RopeScaling(kind="yarn", factor=4.0, original_max_seq_len=32),
    RopeScaling(kind="dynamic", original_max_seq_len=128),
)  # fmt: skip
# What makes a family, so that most draws are near one; the rest is drawn freely.
EXPERTS = {"moe": MoEConfig(num_experts=3, ffn_dim=24), "ffn_dim": None}
GPT2 = {"norm": "layer", "activation": "gelu_tanh", "bias": True, "qkv_bias": True}
CORES = (
    {},
    {"sliding_window": 7},
    {"qkv_bias": True},
    {"qk_norm": True},
    EXPERTS,
    EXPERTS | {"qk_norm": True},
    EXPERTS | {"qk_norm": True, "qk_norm_scope": "all"},
    {"nope_layers": [1]},
    {"rotary_fraction": 0.5},
    {"norm_position": "post", "qk_norm": True, "qk_norm_scope": "all"},
    {"norm": "layer"},
    GPT2 | {"activation": "gelu"},
    GPT2 | {"positions": "learned"},
    GPT2 | {"positions": "alibi", "embedding_norm": True},
    {"norm_plus_one": True, "activation": "geglu"},
    {"norm_plus_one": True, "activation": "geglu", "norm_position": "both", "qk_norm": True},
)


def drawn(index):
    draw = random.Random(index)
    kv_heads = draw.choice([1, 2])
    heads = kv_heads * draw.choice([1, 2])
    dim = heads * 16
    core = dict(draw.choice(CORES))
    sizes = {
        "vocab_size": 61,
        "dim": dim,
        "num_layers": 2,
        "num_heads": heads,
        "num_kv_heads": kv_heads,
        "ffn_dim": 4 * dim,
    }
    if core.get("norm_plus_one"):
        core["embedding_scale"] = dim**0.5
    free = {
        "num_kv_heads": [None], "head_dim": [8, 24], "norm": ["layer", "rms"], "qkv_bias": [True, False],
        "bias": [True, False], "out_bias": [True, False], "qk_norm": [True, False], "qk_norm_scope": ["head", "all"],
        "tie_embeddings": [True], "activation": ["swiglu", "geglu", "gelu", "gelu_tanh"], "parallel_residual": [True],
        "positions": ["rope", "alibi", "learned", "none"], "rotary_fraction": [0.5], "rope_scaling": list(SCALINGS),
        "rope_theta": [1e5], "sliding_window": [7], "window_layers": [[0], [1]], "nope_layers": [[0], [0, 1]],
        "window_rope_theta": [500.0], "norm_position": ["pre", "post", "both"], "norm_plus_one": [True, False],
        "embedding_scale": [2.0], "residual_scale": [0.5], "attention_scale": [0.3], "logit_divisor": [2.0],
        "embedding_norm": [True], "ffn_dim": [40], "norm_eps": [1e-3],
        "moe": [MoEConfig(num_experts=3, ffn_dim=24, top_k=2, renormalize=r, routed_scaling_factor=s)
                for r, s in ((True, 1.0), (False, 1.0), (True, 0.5))],
        "moe_every": [2], "dense_layers": [[0]],
    }  # fmt: skip
    for name in draw.sample(sorted(free), draw.choice([0, 1, 1, 2, 3])):
        core[name] = draw.choice(free[name])
    if "window_layers" in core or "window_rope_theta" in core:
        core.setdefault("sliding_window", 7)
    return ModelConfig(**(sizes | {"max_seq_len": 128, "init_std": 0.1} | core))


def written_out(config):
    """With nothing left to follow from other options, and without what no file says."""
    layers = range(config.num_layers)
    windows = [i for i in layers if config.window_of(i)]
    rotary = config.positions == "rope"
    return replace(
        config,
        num_kv_heads=config.kv_heads,
        head_dim=config.head_width,
        ffn_dim=None if config.num_moe_layers == config.num_layers else config.ffn_dim,
        out_bias=config.has_out_bias,
        rope_theta=config.rope_theta if rotary else 1e4,
        rope_scaling=config.rope_scaling if rotary else None,
        sliding_window=config.sliding_window if windows else None,
        window_layers=windows or None,
        window_rope_theta=(config.window_rope_theta or config.rope_theta) if windows and rotary else None,
        qk_norm_scope=config.qk_norm_scope if config.qk_norm else "head",
        attention_scale=config.attention_scale or config.head_width**-0.5,
        moe=config.moe and replace(config.moe, routed_scaling_factor=1.0),  # in the weights by then
        moe_every=1,
        dense_layers=[i for i in layers if not config.is_moe_layer(i)] if config.moe else None,
    )


def test_transformers_computes_the_same_or_the_export_is_refused():
    exported, refused, impossible = {}, 0, 0
    for index in range(CONFIGURATIONS):
        try:
            config = drawn(index)
        except ValueError:
            impossible += 1
            continue
        try:
            family = hf_family(config)
        except UserError as error:
            refused += 1
            assert all("no Hugging Face architecture for " in p for p in error.problems)
            continue
        if exported.get(family, 0) >= 8:
            continue
        exported[family] = exported.get(family, 0) + 1
        decoder = Decoder(config).eval()
        init_weights(decoder, index)
        with torch.no_grad():
            for parameter in decoder.parameters():
                if parameter.ndim == 1:
                    parameter.add_(torch.randn(parameter.shape, generator=torch.Generator().manual_seed(index)) * 0.2)
        hf = config_to_hf(config)
        assert written_out(config_from_hf(hf)) == written_out(config), (index, family)
        special = dict.fromkeys(("pad_token_id", "bos_token_id", "eos_token_id"))
        twin = transformers.AutoModelForCausalLM.from_config(transformers.AutoConfig.for_model(**hf, **special)).eval()
        theirs = to_hf_state_dict(config, decoder.state_dict(), per_expert=False)
        missing, unexpected = twin.load_state_dict(theirs, strict=False)
        assert not unexpected and set(missing) <= {"lm_head.weight"}, (index, family, missing, unexpected)
        tokens = tokens_for(config, 40)
        with torch.no_grad():
            difference = (decoder.logits(decoder(tokens).hidden) - twin(tokens).logits).abs().max()
        assert difference < 1e-5, (index, family, difference, config)
    assert len(exported) == 18 and min(exported.values()) >= 3, exported
    assert sum(exported.values()) > 120 and refused > 300 and impossible < 200, (exported, refused, impossible)

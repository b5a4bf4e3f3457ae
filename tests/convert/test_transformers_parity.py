"""Every family against transformers: configuration, weights and logits, on random small shapes."""

from __future__ import annotations

from dataclasses import replace

import pytest
import torch
from torch.nn import functional as F

from llmrecipes.convert import config_from_hf, config_to_hf, from_hf_state_dict, hf_family, to_hf_state_dict
from llmrecipes.errors import UserError
from llmrecipes.models import Decoder, ModelConfig, MoEConfig, init_weights
from llmrecipes.models.attention import Attention
from llmrecipes.models.decoder import Block
from llmrecipes.models.layers import RMSNorm
from llmrecipes.models.mlp import MLP
from llmrecipes.models.moe import MoE, Router

transformers = pytest.importorskip("transformers")
from hf_models import FAMILIES, LENGTH, PER_FAMILY, WINDOWED, peer, random_config, tokens_for  # noqa: E402

pytestmark = pytest.mark.oracle


def ours_from(model):
    config = config_from_hf(model.config.to_dict())
    decoder = Decoder(config).eval()
    decoder.load_state_dict(from_hf_state_dict(config, model.state_dict()))
    return decoder


def difference(decoder, model, length=LENGTH):
    tokens = tokens_for(decoder, length)
    with torch.no_grad():
        return (decoder.logits(decoder(tokens).hidden) - model(tokens).logits).abs().max().item()


@pytest.mark.parametrize("family", FAMILIES)
def test_logits_equal_transformers(family):
    seen, windows = set(), 0
    for index in range(PER_FAMILY):
        model = peer(family, index)
        decoder = ours_from(model)
        assert decoder.config.num_params == sum(p.numel() for p in model.parameters())
        assert difference(decoder, model) < 1e-5, model.config
        seen.add(str(decoder.config))
        windows += decoder.config.sliding_window is not None
    assert len(seen) == PER_FAMILY
    assert (windows > 0) == (family in WINDOWED)


@pytest.mark.parametrize("family", FAMILIES)
def test_weights_round_trip_bit_for_bit(family):
    for index in range(PER_FAMILY):
        model = peer(family, index)
        config = config_from_hf(model.config.to_dict())
        theirs = {k: v for k, v in model.state_dict().items() if not (config.tie_embeddings and k == "lm_head.weight")}
        ours = from_hf_state_dict(config, theirs)
        back = to_hf_state_dict(config, ours, per_expert=False)
        assert back.keys() == theirs.keys()
        assert all(torch.equal(back[name], theirs[name]) for name in theirs)
        again = from_hf_state_dict(config, to_hf_state_dict(config, ours, per_expert=True))
        assert again.keys() == ours.keys()
        assert all(torch.equal(again[name], ours[name]) for name in ours)


@pytest.mark.parametrize("family", FAMILIES)
def test_transformers_reads_what_we_write(family, tmp_path):
    from safetensors.torch import save_file

    written = set()
    for index in range(PER_FAMILY):
        source = config_from_hf(random_config(family, index).to_dict())
        assert config_from_hf(config_to_hf(source)) == source
        written.add(config_to_hf(source)["model_type"])
    assert written == {family} or (family, written) == ("mistral", {"llama", "mistral"})  # without a window
    decoder = Decoder(source)
    init_weights(decoder, 3)
    FAMILIES[family](**config_to_hf(source), pad_token_id=None).save_pretrained(tmp_path)
    save_file(to_hf_state_dict(source, decoder.state_dict()), tmp_path / "model.safetensors", {"format": "pt"})
    model, report = transformers.AutoModelForCausalLM.from_pretrained(tmp_path, output_loading_info=True)
    assert not report["missing_keys"] and not report["unexpected_keys"]
    assert config_from_hf(model.config.to_dict()) == source
    assert difference(decoder.eval(), model.eval()) < 1e-5
    model.save_pretrained(tmp_path / "again")
    from safetensors.torch import load_file

    ours = from_hf_state_dict(source, load_file(tmp_path / "again" / "model.safetensors"))
    assert all(torch.equal(tensor, decoder.state_dict()[name]) for name, tensor in ours.items())


def of(decoder, kind):
    found = [module for module in decoder.modules() if isinstance(module, kind)]
    assert found
    return found


def interleave_rotary(decoder):
    """The layout of Meta's own files, before Hugging Face's permutation."""
    width = decoder.config.head_width
    order = torch.arange(width).view(2, -1).t().reshape(-1)
    for attention in of(decoder, Attention):
        q_and_k = (decoder.config.num_heads + decoder.config.kv_heads) * width
        heads = attention.qkv.weight[:q_and_k].view(-1, width, decoder.config.dim)
        attention.qkv.weight[:q_and_k] = heads[:, order].flatten(0, 1).clone()


def window_one_wider(decoder):
    object.__setattr__(decoder.config, "sliding_window", decoder.config.sliding_window + 1)
    for attention in of(decoder, Attention):
        if attention.window is not None:
            attention.window += 1


def windows_everywhere(decoder):
    for attention in of(decoder, Attention):
        attention.window = decoder.config.sliding_window


def no_query_norm(decoder):
    for attention in of(decoder, Attention):
        attention.q_norm.weight.fill_(1.0)


def other_gelu(decoder):
    for mlp in of(decoder, MLP):
        mlp.kind = "gelu" if mlp.kind == "gelu_tanh" else "gelu_tanh"


def heads_not_together(decoder):
    """As if BLOOM's rows were all queries, then all keys, then all values."""
    heads, width = decoder.config.num_heads, decoder.config.head_width
    for attention in of(decoder, Attention):
        rows = attention.qkv.weight.view(3, heads, width, -1).transpose(0, 1).flatten(0, 2).clone()
        attention.qkv.weight.copy_(rows)


def other_renormalisation(decoder):
    for router in of(decoder, Router):
        router.renormalize = not router.renormalize


def norms_before(decoder):
    for block in of(decoder, Block):
        block.post_only = False


def no_norm_after(decoder):
    for block in of(decoder, Block):
        block.attention_post_norm = block.mlp_post_norm = None


def norm_without_one(decoder):
    for norm in of(decoder, RMSNorm):
        norm.plus_one = False


def one_after_the_other(decoder):
    for block in of(decoder, Block):
        block.parallel = False


def rotate_the_last_features(decoder):
    """As if the part without positions came first."""
    width, rotated = decoder.config.head_width, decoder.config.rotary_width
    order = torch.arange(width).roll(-rotated)
    assert rotated < width
    for attention in of(decoder, Attention):
        q_and_k = (decoder.config.num_heads + decoder.config.kv_heads) * width
        for tensor in (attention.qkv.weight, *([] if attention.qkv.bias is None else [attention.qkv.bias])):
            tensor[:q_and_k] = tensor[:q_and_k].unflatten(0, (-1, width))[:, order].flatten(0, 1).clone()


def rotary_everywhere(decoder):
    for attention in of(decoder, Attention):
        attention.rotary = True


def one_theta(decoder):
    for attention in of(decoder, Attention):
        attention.window_theta = False


def without(name, usual):
    def mutate(decoder):
        object.__setattr__(decoder.config, name, usual)
        for block in of(decoder, Block):
            block.scale, block.attention.scale = decoder.config.residual_scale, decoder.config.attention_scale

    mutate.__name__ = f"without_{name}"
    return mutate


def scaling(**changes):
    """Another stretching of the angles than the file says."""

    def mutate(decoder):
        object.__setattr__(decoder.config, "rope_scaling", replace(decoder.config.rope_scaling, **changes))

    mutate.__name__ = "scaling_" + "_".join(changes)
    return mutate


def long_factors(decoder):
    scaling(short_factor=decoder.config.rope_scaling.long_factor)(decoder)


def exact_gate(decoder):
    for mlp in of(decoder, MLP):
        mlp.kind = "swiglu"


def shared_without_its_gate(decoder):
    """As if every token used the shared expert whole (DeepSeek's has no gate)."""
    for moe in of(decoder, MoE):
        moe.shared_gate = torch.nn.Linear(decoder.config.dim, 1)
        moe.shared_gate.weight.zero_()
        moe.shared_gate.bias.fill_(100.0)


def shared_halves_swapped(decoder):
    for moe in of(decoder, MoE):
        moe.shared.gate_up.weight.copy_(torch.cat(moe.shared.gate_up.weight.chunk(2)[::-1]))


QWEN2_MIXED = next(i for i in range(PER_FAMILY) if len(set(random_config("qwen2", i).layer_types)) == 2)
MUTANTS = [
    ("llama", 0, interleave_rotary),
    ("mistral", 1, window_one_wider),
    ("qwen2", QWEN2_MIXED, windows_everywhere),
    ("qwen3", 1, no_query_norm),
    ("gpt2", 0, other_gelu),
    ("bloom", 0, heads_not_together),
    ("mixtral", 1, other_renormalisation),
    ("mixtral", 1, window_one_wider),
    ("olmoe", 1, other_renormalisation),
    ("olmoe", 0, no_query_norm),
    ("qwen2_moe", 1, other_renormalisation),
    ("qwen2_moe", 0, shared_without_its_gate),
    ("qwen2_moe", 0, shared_halves_swapped),
    ("qwen3_moe", 0, other_renormalisation),
    ("gpt_neox", 0, one_after_the_other),
    ("gpt_neox", 0, rotate_the_last_features),
    ("gpt_neox", 0, heads_not_together),
    ("gpt_neox", 0, other_gelu),
    ("stablelm", 0, rotate_the_last_features),
    ("stablelm", 0, without("rotary_fraction", 1.0)),
    ("starcoder2", 1, window_one_wider),
    ("phi3", 0, rotate_the_last_features),
    ("phi3", 1, long_factors),
    ("phi3", 1, scaling(attention_factor=1.0)),
    ("gemma", 0, norm_without_one),
    ("gemma", 0, without("embedding_scale", 1.0)),
    ("gemma", 0, exact_gate),
    ("gemma3_text", 3, no_norm_after),
    ("gemma3_text", 3, one_theta),
    ("gemma3_text", 3, without("attention_scale", None)),
    ("olmo2", 0, norms_before),
    ("smollm3", 0, rotary_everywhere),
    ("granite", 0, without("embedding_scale", 1.0)),
    ("granite", 0, without("residual_scale", 1.0)),
    ("granite", 0, without("attention_scale", None)),
    ("granite", 0, without("logit_divisor", 1.0)),
    ("llama", 2, scaling(kind="linear")),
    ("llama", 2, scaling(attention_factor=1.0)),
    ("llama", 2, scaling(beta_slow=8.0)),
    ("llama", 6, scaling(beta_fast=32.0)),
    ("llama", 6, scaling(truncate=False)),
    ("llama", 4, scaling(kind="linear")),
]


@pytest.mark.parametrize(("family", "index", "mutate"), MUTANTS, ids=[f"{f}-{m.__name__}" for f, _, m in MUTANTS])
def test_mutants_fail(family, index, mutate):
    assert {f for f, _, _ in MUTANTS} == FAMILIES.keys()
    model = peer(family, index)
    decoder = ours_from(model)
    assert difference(decoder, model) < 1e-5
    with torch.no_grad():
        mutate(decoder)
    assert difference(decoder, model) > 2e-5


def qwen1_files(decoder):
    """The decoder's weights as files of Qwen-1 name them, written down by hand."""
    ours, ffn = decoder.state_dict(), decoder.config.ffn_dim
    files = {
        "transformer.wte.weight": ours["embed.weight"],
        "transformer.ln_f.weight": ours["norm.weight"],
        "lm_head.weight": ours["head.weight"],
    }
    for i in range(decoder.config.num_layers):
        us, them = f"layers.{i}", f"transformer.h.{i}"
        files |= {
            f"{them}.ln_1.weight": ours[f"{us}.attention_norm.weight"],
            f"{them}.ln_2.weight": ours[f"{us}.mlp_norm.weight"],
            f"{them}.attn.c_attn.weight": ours[f"{us}.attention.qkv.weight"],
            f"{them}.attn.c_attn.bias": ours[f"{us}.attention.qkv.bias"],
            f"{them}.attn.c_proj.weight": ours[f"{us}.attention.out.weight"],
            f"{them}.mlp.w2.weight": ours[f"{us}.mlp.gate_up.weight"][:ffn],
            f"{them}.mlp.w1.weight": ours[f"{us}.mlp.gate_up.weight"][ffn:],
            f"{them}.mlp.c_proj.weight": ours[f"{us}.mlp.down.weight"],
        }
    return files


def qwen1_reference(files, tokens, heads, eps=1e-6, theta=1e4):
    """Qwen-1 as its published code computes it: x + attn(ln_1 x), then x + c_proj(w1 h * silu(w2 h))."""

    def norm(x, weight):
        return weight * (x * torch.rsqrt(x.pow(2).mean(-1, keepdim=True) + eps))

    x = files["transformer.wte.weight"][tokens]
    rows, length, dim = x.shape
    width = dim // heads
    angles = torch.arange(length).float()[:, None] / theta ** (torch.arange(0, width, 2).float() / width)
    angles = torch.cat((angles, angles), -1)

    def turn(x):
        first, second = x.chunk(2, -1)
        return x * angles.cos() + torch.cat((-second, first), -1) * angles.sin()

    blocked = torch.ones(length, length, dtype=torch.bool).triu(1)
    for i in range(sum(name.endswith("ln_1.weight") for name in files)):
        w = {k.removeprefix(f"transformer.h.{i}."): v for k, v in files.items() if k.startswith(f"transformer.h.{i}.")}
        mixed = norm(x, w["ln_1.weight"]) @ w["attn.c_attn.weight"].t() + w["attn.c_attn.bias"]
        q, k, v = (part.view(rows, length, heads, width).transpose(1, 2) for part in mixed.split(dim, -1))
        scores = (turn(q) @ turn(k).transpose(-1, -2) / width**0.5).masked_fill(blocked, -torch.inf)
        seen = (scores.softmax(-1) @ v).transpose(1, 2).reshape(rows, length, dim)
        x = x + seen @ w["attn.c_proj.weight"].t()
        h = norm(x, w["ln_2.weight"])
        gated = (h @ w["mlp.w1.weight"].t()) * F.silu(h @ w["mlp.w2.weight"].t())
        x = x + gated @ w["mlp.c_proj.weight"].t()
    return norm(x, files["transformer.ln_f.weight"]) @ files["lm_head.weight"].t()


QWEN1 = {
    "model_type": "qwen", "architectures": ["QWenLMHeadModel"],
    "auto_map": {"AutoConfig": "configuration_qwen.QWenConfig"}, "tokenizer_type": "QWenTokenizer",
    "vocab_size": 97, "hidden_size": 48, "num_hidden_layers": 2, "num_attention_heads": 4, "intermediate_size": 160,
    "kv_channels": 12, "layer_norm_epsilon": 1e-6, "rotary_emb_base": 10000, "rotary_pct": 1.0, "seq_length": 64,
    "max_position_embeddings": 8192, "no_bias": True, "use_dynamic_ntk": True, "use_logn_attn": True,
    "use_flash_attn": "auto", "attn_dropout_prob": 0.0, "emb_dropout_prob": 0.0, "tie_word_embeddings": False,
    "scale_attn_weights": True, "initializer_range": 0.05, "bf16": True, "onnx_safe": None,
}  # fmt: skip


def test_qwen1_equals_its_published_formula_and_the_qwen2_of_transformers():
    config = config_from_hf(QWEN1)
    assert (config.ffn_dim, config.max_seq_len, hf_family(config)) == (80, 64, "qwen2")
    decoder = Decoder(config).eval()
    init_weights(decoder, 5)
    with torch.no_grad():
        for name, parameter in decoder.named_parameters():
            if parameter.ndim == 1:
                parameter.normal_("norm" in name, 0.2)
    files = qwen1_files(decoder)
    again = from_hf_state_dict(config, files, "qwen")
    assert all(torch.equal(again[name], tensor) for name, tensor in decoder.state_dict().items())
    tokens = tokens_for(config)
    with torch.no_grad():
        ours = decoder.logits(decoder(tokens).hidden)
        assert (qwen1_reference(files, tokens, 4) - ours).abs().max() < 1e-5
        for i in range(2):  # the mutant: w1 taken for the gate
            one, two = f"transformer.h.{i}.mlp.w1.weight", f"transformer.h.{i}.mlp.w2.weight"
            files[one], files[two] = files[two], files[one]
        assert (qwen1_reference(files, tokens, 4) - ours).abs().max() > 1e-3
    twin = transformers.Qwen2ForCausalLM(transformers.Qwen2Config(**config_to_hf(config))).eval()
    twin.load_state_dict(to_hf_state_dict(config, decoder.state_dict()))
    assert difference(decoder, twin) < 1e-5


def test_rotary_frequencies_stay_in_fp32_where_all_else_is_bf16():
    """`.bfloat16()` rounds the frequencies of transformers' modules; ours are computed where they are used."""
    model = peer("llama", 0)
    decoder = ours_from(model)
    rounded = {n: t.bfloat16().float() for n, t in decoder.state_dict().items()}
    exact = Decoder(decoder.config).eval()
    exact.load_state_dict(rounded)
    tokens = tokens_for(decoder, 120)
    with torch.no_grad():
        half = decoder.bfloat16()(tokens).hidden.float()
        assert (half - exact(tokens).hidden).abs().max() < 0.1


LLAMA2_7B = {
    "model_type": "llama", "vocab_size": 32000, "hidden_size": 4096, "intermediate_size": 11008,
    "num_hidden_layers": 32, "num_attention_heads": 32, "num_key_value_heads": 32, "rms_norm_eps": 1e-5,
    "max_position_embeddings": 4096, "hidden_act": "silu", "rope_scaling": None,
}  # fmt: skip
QWEN_7B = QWEN1 | {
    "vocab_size": 151936, "hidden_size": 4096, "num_hidden_layers": 32, "num_attention_heads": 32,
    "intermediate_size": 22016, "kv_channels": 128, "seq_length": 2048,
}  # fmt: skip
MIXTRAL_8X7B = LLAMA2_7B | {
    "model_type": "mixtral", "intermediate_size": 14336, "num_key_value_heads": 8, "num_local_experts": 8,
    "num_experts_per_tok": 2, "sliding_window": None,
}  # fmt: skip
SYSTEM0 = MIXTRAL_8X7B | {
    "vocab_size": 56320, "hidden_size": 2048, "intermediate_size": 4096, "num_hidden_layers": 40,
    "num_key_value_heads": 32, "rope_theta": 5e5,
}  # fmt: skip
BLOOM_176B = {"model_type": "bloom", "vocab_size": 250880, "hidden_size": 14336, "n_layer": 70, "n_head": 112}
TANUKI_8B = LLAMA2_7B | {"vocab_size": 65024, "intermediate_size": 14336, "num_key_value_heads": 8}
RTX3090 = LLAMA2_7B | {
    "vocab_size": 65024, "hidden_size": 256, "intermediate_size": 1024, "num_hidden_layers": 8,
    "num_attention_heads": 4, "num_key_value_heads": 4,
}  # fmt: skip
QWEN15_MOE = {
    "model_type": "qwen2_moe", "vocab_size": 151936, "hidden_size": 2048, "intermediate_size": 5632,
    "num_hidden_layers": 24, "num_attention_heads": 16, "num_key_value_heads": 16, "moe_intermediate_size": 1408,
    "shared_expert_intermediate_size": 5632, "num_experts": 60, "num_experts_per_tok": 4, "norm_topk_prob": False,
}  # fmt: skip
COUNTS = {
    "llama2-7B": (LLAMA2_7B, 6_738_415_616),
    "Tanuki-8B": (TANUKI_8B, 7_512_264_704),
    "Mixtral-8x7B": (MIXTRAL_8X7B, 46_702_792_704),
    "S0 dMoE": (SYSTEM0, 8_955_660_288),
    "BLOOM": (BLOOM_176B, 176_247_271_424),
    "Qwen-7B": (QWEN_7B, 7_721_324_544),
    "RTX3090 test": (RTX3090, 41_685_248),
    "Qwen1.5-MoE-A2.7B": (QWEN15_MOE, 14_315_784_192),
}


@pytest.mark.parametrize("name", COUNTS)
def test_parameters_of_known_models(name):
    """By arithmetic, and by counting a decoder without memory."""
    hf, expected = COUNTS[name]
    config = config_from_hf(hf)
    assert config.num_params == expected
    with torch.device("meta"):
        assert sum(p.numel() for p in Decoder(config).parameters()) == expected


def test_active_parameters_and_defaults():
    assert config_from_hf(SYSTEM0).active_params == 2_915_862_528
    assert config_from_hf(MIXTRAL_8X7B).rope_theta == 1e6
    scaling = {
        "factor": 8.0, "low_freq_factor": 1.0, "high_freq_factor": 4.0, "original_max_position_embeddings": 8192,
        "rope_type": "llama3",
    }  # fmt: skip
    config = config_from_hf(LLAMA2_7B | {"rope_theta": 500000.0, "rope_scaling": scaling})
    assert config.rope_theta == 500000.0 and config.rope_scaling is not None and config.rope_scaling.factor == 8.0


REFUSED = [
    ("llama", {"hidden_act": "gelu"}, "hidden_act 'gelu'"),
    ("llama", {"rope_parameters": {"rope_type": "mrope", "rope_theta": 1e4}}, "rope_type 'mrope'"),
    ("llama", {"rope_scaling": {"type": "dynamic"}, "rope_parameters": None}, "rope_scaling lacks factor"),
    ("llama", {"rope_scaling": {"type": "yarn", "factor": 2.0, "extra": 3}}, "rope_scaling.extra 3: not understood"),
    ("phi3", {"rope_scaling": {"type": "longrope", "short_factor": [1.0], "long_factor": [1.0]}}, "rope_scaling.short"),
    ("llama", {"partial_rotary_factor": 0.5}, "partial_rotary_factor 0.5"),
    ("gpt_neox", {"rope_parameters": {"partial_rotary_factor": 0.01}}, "rotary positions need an even head width"),
    ("stablelm", {"use_parallel_residual": True}, "use_parallel_residual True"),
    ("stablelm", {"qk_layernorm": True}, "qk_layernorm True"),
    ("gemma3_text", {"final_logit_softcapping": 30.0}, "final_logit_softcapping 30.0"),
    ("gemma", {"hidden_act": "silu"}, "hidden_act 'silu'"),
    ("smollm3", {"no_rope_layers": []}, "no_rope_layers has 0 numbers for"),
    ("llama", {"layer_types": ["sliding_attention"]}, "layer_types"),
    ("llama", {"hidden_act": "relu"}, "hidden_act 'relu'"),
    ("granite", {"logits_scaling": 0}, "logits_scaling 0"),
    ("llama", {"sliding_window": 16}, "sliding_window 16: not understood"),
    ("llama", {"attention_dropout": 0.1}, "attention_dropout 0.1"),
    ("llama", {"logit_scale": 0.5}, "logit_scale 0.5: not understood"),
    ("llama", {"quantization_config": {"bits": 4}}, "quantization_config"),
    ("llama", {"num_hidden_layers": 0}, "num_hidden_layers 0"),
    ("mixtral", {"router_jitter_noise": 0.1}, "router_jitter_noise 0.1"),
    ("mixtral", {"num_experts_per_tok": 99}, "num_experts_per_tok 99"),
    ("olmoe", {"clip_qkv": 8.0}, "clip_qkv 8.0"),
    ("gpt2", {"activation_function": "relu"}, "activation_function 'relu'"),
    ("gpt2", {"scale_attn_by_inverse_layer_idx": True}, "scale_attn_by_inverse_layer_idx"),
    ("gpt2", {"attn_pdrop": 0.3}, "resid_pdrop, embd_pdrop, attn_pdrop differ"),
    ("bloom", {"apply_residual_connection_post_layernorm": True}, "apply_residual_connection_post_layernorm"),
    ("qwen3", {"layer_types": ["chunked_attention"], "use_sliding_window": True}, "layer_types"),
    ("qwen3_moe", {"shared_expert_intermediate_size": 64}, "shared_expert_intermediate_size 64: not understood"),
]


@pytest.mark.parametrize(("family", "change", "problem"), REFUSED, ids=lambda value: str(value)[:40])
def test_what_is_not_supported_is_refused_by_name(family, change, problem):
    hf = random_config(family, 0).to_dict()
    config_from_hf(hf)
    with pytest.raises(UserError) as caught:
        config_from_hf(hf | change)
    assert any(p.startswith(f"config.json: {problem}") for p in caught.value.problems), caught.value.problems


def test_other_families_and_misfitting_files_are_refused():
    for family, why in (("t5", ", because it is an encoder and a decoder, not a decoder alone"), ("x", "")):
        with pytest.raises(UserError, match=f"model_type '{family}' is not supported{why}: use one of llama, "):
            config_from_hf({"model_type": family})
    config = config_from_hf(random_config("mixtral", 0).to_dict())
    state = Decoder(config).state_dict()
    state["layers.0.mlp.gate.bias"][0] = 1.0
    with pytest.raises(UserError, match="balancing bias"):
        to_hf_state_dict(config, state)
    theirs = to_hf_state_dict(config, {k: v for k, v in state.items() if not k.endswith("gate.bias")})
    theirs["surprise"] = theirs.pop("model.norm.weight")
    with pytest.raises(UserError) as caught:
        from_hf_state_dict(config, theirs)
    assert [p.split()[2:4] for p in caught.value.problems] == [["lacks", "model.norm.weight"], ["holds", "surprise,"]]


@pytest.mark.parametrize(
    ("change", "problem"),
    [
        ({"residual": True}, "no Hugging Face architecture for moe.residual: true (nearest: mixtral)"),
        ({"num_experts": None, "experts_per_layer": [4, 8]}, "moe.experts_per_layer: layers with different numbers"),
        (
            {"capacity_factor": 1.0, "eval_capacity_factor": 1.0},
            "moe.eval_capacity_factor: 1.0, with which experts drop",
        ),
    ],
    ids=["residual", "pyramid", "capacity"],
)
def test_experts_that_nobody_else_computes_are_refused(change, problem):
    moe = MoEConfig(num_experts=8, ffn_dim=16)
    config = ModelConfig(vocab_size=9, dim=8, num_layers=2, num_heads=2, ffn_dim=12, moe=moe)
    assert hf_family(config) == "mixtral"
    with pytest.raises(UserError) as caught:
        config_to_hf(replace(config, moe=replace(moe, **change)), 16)
    assert len(caught.value.problems) == 1 and problem in caught.value.problems[0]
    # Where nothing is dropped outside of training, and all layers are alike, it is Mixtral.
    for alike in ({"capacity_factor": 1.0}, {"num_experts": None, "experts_per_layer": [8, 8]}):
        assert config_to_hf(replace(config, moe=replace(moe, **alike)), 16) == config_to_hf(config, 16)


@pytest.mark.parametrize("per_expert", [True, False])
def test_scaling_of_the_experts_goes_into_their_weights(per_expert):
    """No architecture has a place for it. 0.5 is exact there and back."""
    moe = MoEConfig(num_experts=8, ffn_dim=16, routed_scaling_factor=0.5)
    config = ModelConfig(vocab_size=9, dim=8, num_layers=2, num_heads=2, ffn_dim=12, moe=moe, init_std=0.3)
    decoder = Decoder(config).eval()
    init_weights(decoder, 0)
    state = {name: tensor for name, tensor in decoder.state_dict().items() if not name.endswith("gate.bias")}
    theirs = to_hf_state_dict(config, state, per_expert=per_expert)
    back = from_hf_state_dict(config, theirs)
    assert all(torch.equal(back[name], state[name]) for name in state)
    read = config_from_hf(config_to_hf(config, 16))
    assert read.moe.routed_scaling_factor == 1.0
    twin, tokens = Decoder(read).eval(), tokens_for(config, 12)
    twin.load_state_dict(from_hf_state_dict(read, theirs))
    with torch.no_grad():
        logits, wanted = (model.logits(model(tokens).hidden) for model in (twin, decoder))
        twin.load_state_dict(decoder.state_dict())
        mutant = twin.logits(twin(tokens).hidden)
    assert (logits - wanted).abs().max() < 1e-5 < (mutant - wanted).abs().max()


@pytest.mark.parametrize("family", ["gpt2", "bloom"])
def test_names_of_the_first_releases(family):
    """Without the prefix, with the causal mask saved beside the weights: as GPT-2 and BLOOM lie on the hub."""
    model = peer(family, 1)  # with a tied head
    config = config_from_hf(model.config.to_dict())
    files = {n.removeprefix("transformer."): t for n, t in model.state_dict().items() if n != "lm_head.weight"}
    if family == "gpt2":
        files["h.0.attn.bias"] = torch.ones(1, 1, 64, 64).tril()
        files["h.0.attn.masked_bias"] = torch.tensor(-1e4)
    old, new = from_hf_state_dict(config, files), from_hf_state_dict(config, model.state_dict())
    assert old.keys() == new.keys()
    assert all(torch.equal(old[name], new[name]) for name in new)

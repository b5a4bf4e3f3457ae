"""Llama, Qwen2 and Mixtral against transformers: configuration, weights and logits, on random small shapes."""

from __future__ import annotations

import random

import pytest
import torch

from llmrecipes.convert import config_from_hf, config_to_hf, from_hf_state_dict, to_hf_state_dict
from llmrecipes.errors import UserError
from llmrecipes.models import Decoder, init_weights
from llmrecipes.models.moe import Router

transformers = pytest.importorskip("transformers")
pytestmark = pytest.mark.oracle

FAMILIES = {
    "llama": (transformers.LlamaConfig, transformers.LlamaForCausalLM),
    "qwen2": (transformers.Qwen2Config, transformers.Qwen2ForCausalLM),
    "mixtral": (transformers.MixtralConfig, transformers.MixtralForCausalLM),
}
PER_FAMILY = 8


def random_hf_config(family, index):
    draw = random.Random(f"{family}-{index}")
    kv_heads = draw.choice([1, 2, 4])
    heads = kv_heads * draw.choice([1, 2, 3])
    width = draw.choice([8, 16, 32])
    options = {
        "vocab_size": draw.choice([97, 128, 301]),
        "hidden_size": heads * width,
        "intermediate_size": draw.choice([48, 80, 132]),
        "num_hidden_layers": draw.choice([1, 2, 3]),
        "num_attention_heads": heads,
        "num_key_value_heads": kv_heads,
        "max_position_embeddings": 128,
        "rms_norm_eps": draw.choice([1e-5, 1e-6]),
        "tie_word_embeddings": index % 3 == 1,
        "initializer_range": 0.05,
        "attn_implementation": ["eager", "sdpa"][index % 2],
        "rope_parameters": {"rope_type": "default", "rope_theta": draw.choice([1e4, 1e6])},
    }
    if family == "llama" and index % 4 == 2:
        options["head_dim"] = 24
    if family == "llama" and index % 2 == 1:
        options["rope_parameters"] |= {
            "rope_type": "llama3",
            "factor": 8.0,
            "low_freq_factor": 1.0,
            "high_freq_factor": 4.0,
            "original_max_position_embeddings": 64,
        }
    if family == "llama" and index == 5:
        options |= {"attention_bias": True, "mlp_bias": True}
    if family == "mixtral":
        options |= {
            "num_local_experts": draw.choice([3, 4, 8]),
            "num_experts_per_tok": 1 + index % 3,
            "sliding_window": None,
        }
    return FAMILIES[family][0](**options)


def peer(family, index):
    torch.manual_seed(index)
    model = FAMILIES[family][1](random_hf_config(family, index)).eval()
    for name, parameter in model.named_parameters():
        if parameter.ndim == 1:  # norms and biases start at one and zero, which would hide a wrong mapping
            torch.nn.init.normal_(parameter, 1.0 if "norm" in name else 0.0, 0.1)
    return model


def ours_from(model):
    config = config_from_hf(model.config.to_dict())
    decoder = Decoder(config).eval()
    decoder.load_state_dict(from_hf_state_dict(config, model.state_dict()))
    return decoder


def difference(decoder, model, length=48):
    tokens = torch.randint(0, decoder.config.vocab_size, (2, length), generator=torch.Generator().manual_seed(0))
    with torch.no_grad():
        return (decoder.logits(decoder(tokens).hidden) - model(tokens).logits).abs().max().item()


@pytest.mark.parametrize("family", FAMILIES)
def test_logits_equal_transformers(family):
    seen = set()
    for index in range(PER_FAMILY):
        model = peer(family, index)
        decoder = ours_from(model)
        assert decoder.config.num_params == sum(p.numel() for p in model.parameters())
        assert difference(decoder, model) < 1e-5, model.config
        seen.add(str(decoder.config))
    assert len(seen) == PER_FAMILY


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

    source = config_from_hf(random_hf_config(family, 1).to_dict())
    decoder = Decoder(source)
    init_weights(decoder, 3)
    FAMILIES[family][0](**config_to_hf(source)).save_pretrained(tmp_path)
    save_file(to_hf_state_dict(source, decoder.state_dict()), tmp_path / "model.safetensors", {"format": "pt"})
    model, report = FAMILIES[family][1].from_pretrained(tmp_path, output_loading_info=True)
    assert not report["missing_keys"] and not report["unexpected_keys"]
    assert config_from_hf(model.config.to_dict()) == source
    assert difference(decoder.eval(), model.eval()) < 1e-5
    model.save_pretrained(tmp_path / "again")
    from safetensors.torch import load_file

    files = load_file(tmp_path / "again" / "model.safetensors")
    ours = from_hf_state_dict(source, files)
    assert all(torch.equal(tensor, decoder.state_dict()[name]) for name, tensor in ours.items())


def test_mutant_interleaved_rotary_fails():
    model = peer("llama", 0)
    decoder = ours_from(model)
    width = decoder.config.head_width
    interleave = torch.arange(width).view(2, -1).t().reshape(-1)
    state = decoder.state_dict()
    for name, tensor in state.items():
        if name.endswith("qkv.weight"):
            q_and_k = (decoder.config.num_heads + decoder.config.kv_heads) * width
            heads = tensor[:q_and_k].view(-1, width, tensor.shape[1])
            state[name] = torch.cat((heads[:, interleave].flatten(0, 1), tensor[q_and_k:]))
    decoder.load_state_dict(state)
    assert difference(decoder, model) > 1e-3


def test_mutant_without_renormalisation_fails():
    model = peer("mixtral", 1)
    decoder = ours_from(model)
    assert difference(decoder, model) < 1e-5
    for module in decoder.modules():
        if isinstance(module, Router):
            module.renormalize = False
    assert difference(decoder, model) > 1e-3


def test_configurations_of_released_models():
    llama2 = {
        "model_type": "llama", "vocab_size": 32000, "hidden_size": 4096, "intermediate_size": 11008,
        "num_hidden_layers": 32, "num_attention_heads": 32, "num_key_value_heads": 32, "rms_norm_eps": 1e-5,
        "max_position_embeddings": 4096, "hidden_act": "silu", "rope_scaling": None,
    }  # fmt: skip
    assert config_from_hf(llama2).num_params == 6_738_415_616
    llama31 = llama2 | {
        "rope_theta": 500000.0,
        "rope_scaling": {
            "factor": 8.0, "low_freq_factor": 1.0, "high_freq_factor": 4.0,
            "original_max_position_embeddings": 8192, "rope_type": "llama3",
        },
    }  # fmt: skip
    config = config_from_hf(llama31)
    assert config.rope_theta == 500000.0 and config.rope_scaling is not None and config.rope_scaling.factor == 8.0
    mixtral = llama2 | {
        "model_type": "mixtral", "intermediate_size": 14336, "num_key_value_heads": 8, "num_local_experts": 8,
        "num_experts_per_tok": 2, "sliding_window": None,
    }  # fmt: skip
    assert config_from_hf(mixtral).num_params == 46_702_792_704
    assert config_from_hf(mixtral).rope_theta == 1e6


def test_what_is_not_supported_is_refused_by_name():
    hf = random_hf_config("llama", 0).to_dict()
    hf |= {"hidden_act": "gelu", "rope_parameters": {"rope_type": "yarn", "rope_theta": 1e4}}
    with pytest.raises(UserError) as caught:
        config_from_hf(hf)
    assert len(caught.value.problems) == 2
    with pytest.raises(UserError, match="model_type 't5'"):
        config_from_hf({"model_type": "t5"})
    config = config_from_hf(random_hf_config("mixtral", 0).to_dict())
    state = Decoder(config).state_dict()
    state["layers.0.mlp.gate.bias"][0] = 1.0
    with pytest.raises(UserError, match="balancing bias"):
        to_hf_state_dict(config, state)
    theirs = to_hf_state_dict(config, {k: v for k, v in state.items() if not k.endswith("gate.bias")})
    theirs["surprise"] = theirs.pop("model.norm.weight")
    with pytest.raises(UserError) as caught:
        from_hf_state_dict(config, theirs)
    assert [p.split()[2:4] for p in caught.value.problems] == [["lacks", "model.norm.weight"], ["holds", "surprise,"]]

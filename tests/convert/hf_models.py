"""Random small models of every family of transformers."""

from __future__ import annotations

import random

import torch
import transformers

FAMILIES = {
    "llama": transformers.LlamaConfig,
    "mistral": transformers.MistralConfig,
    "qwen2": transformers.Qwen2Config,
    "qwen3": transformers.Qwen3Config,
    "gpt2": transformers.GPT2Config,
    "bloom": transformers.BloomConfig,
    "mixtral": transformers.MixtralConfig,
    "olmoe": transformers.OlmoeConfig,
    "qwen2_moe": transformers.Qwen2MoeConfig,
    "qwen3_moe": transformers.Qwen3MoeConfig,
}
PER_FAMILY = 8
LENGTH = 48
LLAMA3 = {
    "rope_type": "llama3",
    "factor": 8.0,
    "low_freq_factor": 1.0,
    "high_freq_factor": 4.0,
    "original_max_position_embeddings": 64,
}


def random_config(family: str, index: int) -> transformers.PretrainedConfig:
    """The ``index``-th configuration of a family: every option is taken by some, whatever the others are."""
    draw = random.Random(f"{family}-{index}")
    common = {
        "vocab_size": draw.choice([97, 128, 301]),
        "initializer_range": 0.05,
        "tie_word_embeddings": index % 3 == 1,
        "attn_implementation": "eager" if family == "bloom" else ["eager", "sdpa"][index % 2],
        "bos_token_id": 1,
        "eos_token_id": 2,
    }
    kv_heads = draw.choice([1, 2, 4])
    heads, width = kv_heads * draw.choice([1, 2, 3]), draw.choice([8, 16, 32])
    layers, inner = draw.choice([1, 2, 3]), draw.choice([48, 80, 132])
    if family == "gpt2":
        act = draw.choice(["gelu_new", "gelu", "gelu_pytorch_tanh"])
        sizes = {"n_embd": heads * width, "n_head": heads, "n_layer": layers, "n_inner": [None, inner][index % 2]}
        return FAMILIES[family](**common, **sizes, n_positions=64, activation_function=act)
    if family == "bloom":
        return FAMILIES[family](**common, hidden_size=heads * width, n_head=heads, n_layer=layers)
    options = common | {
        "hidden_size": heads * width,
        "intermediate_size": inner,
        "num_hidden_layers": layers,
        "num_attention_heads": heads,
        "num_key_value_heads": kv_heads,
        "max_position_embeddings": 128,
        "rms_norm_eps": draw.choice([1e-5, 1e-6]),
    }
    return FAMILIES[family](**(options | _rope(draw, index) | _special(family, index, draw, options)))


def _rope(draw: random.Random, index: int) -> dict:
    scaling = {"rope_type": "default"}
    if index % 4 == 1:
        scaling = LLAMA3
    if index % 4 == 3:
        scaling = {"rope_type": "linear", "factor": 2.0}
    return {"rope_parameters": {**scaling, "rope_theta": draw.choice([1e4, 1e6])}}


def _special(family: str, index: int, draw: random.Random, options: dict) -> dict:
    special = {}
    layers = options["num_hidden_layers"]
    window = draw.choice([5, 11, 30])
    if family in ("llama", "mistral", "qwen3", "qwen2_moe", "qwen3_moe", "mixtral") and index % 4 == 2:
        special["head_dim"] = 24
    elif family == "qwen3":
        special["head_dim"] = options["hidden_size"] // options["num_attention_heads"]
    if family == "llama":
        special |= {"attention_bias": index % 4 >= 2, "mlp_bias": index % 3 == 2}
    if family in ("qwen3", "qwen3_moe", "olmoe"):
        special["attention_bias"] = index % 4 == 3
    if family in ("mistral", "mixtral"):
        special["sliding_window"] = [None, window][index % 2]
    if family in ("qwen2", "qwen3", "qwen2_moe"):
        special |= {"use_sliding_window": index % 2 == 0, "sliding_window": window, "max_window_layers": index % 3}
    if family == "qwen3_moe":
        special |= {"use_sliding_window": index % 2 == 0, "sliding_window": window, "moe_intermediate_size": 24}
        special |= {"decoder_sparse_step": 1 + index % 2, "mlp_only_layers": [layers - 1] if index % 3 == 2 else []}
    if family == "qwen2_moe":
        special |= {"shared_expert_intermediate_size": draw.choice([16, 40]), "moe_intermediate_size": 24}
        special |= {"decoder_sparse_step": 1 + index // 2 % 2, "mlp_only_layers": [0] if index % 4 == 3 else []}
        special |= {"qkv_bias": index % 3 != 2}
    if family in ("mixtral", "olmoe", "qwen2_moe", "qwen3_moe"):
        name = "num_local_experts" if family == "mixtral" else "num_experts"
        special |= {name: draw.choice([3, 4, 8]), "num_experts_per_tok": 1 + index % 3}
    if family in ("olmoe", "qwen2_moe", "qwen3_moe"):
        special["norm_topk_prob"] = index % 2 == 0
    return special


def peer(family: str, index: int) -> torch.nn.Module:
    """The model, with norms and biases away from one and zero, where a wrong mapping would not show."""
    torch.manual_seed(index)
    model = transformers.AutoModelForCausalLM.from_config(random_config(family, index)).eval()
    with torch.no_grad():
        for name, parameter in model.named_parameters():
            if parameter.ndim == 1:
                is_norm = any(word in name for word in ("norm", "ln_"))
                parameter.normal_(1.0 if is_norm and name.endswith("weight") else 0.0, 0.2)
    return model


def tokens_for(model_or_config, length: int = LENGTH) -> torch.Tensor:
    """Two rows of random ids."""
    vocab = getattr(model_or_config, "config", model_or_config).vocab_size
    return torch.randint(0, vocab, (2, length), generator=torch.Generator().manual_seed(0))

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
    "gpt_neox": transformers.GPTNeoXConfig,
    "stablelm": transformers.StableLmConfig,
    "starcoder2": transformers.Starcoder2Config,
    "phi3": transformers.Phi3Config,
    "gemma": transformers.GemmaConfig,
    "gemma3_text": transformers.Gemma3TextConfig,
    "olmo2": transformers.Olmo2Config,
    "smollm3": transformers.SmolLM3Config,
    "granite": transformers.GraniteConfig,
}
WINDOWED = (
    "mistral",
    "mixtral",
    "qwen2",
    "qwen2_moe",
    "qwen3",
    "qwen3_moe",
    "starcoder2",
    "phi3",
    "gemma3_text",
    "smollm3",
)
PER_FAMILY = 8
LENGTH = 48
LLAMA3 = {
    "rope_type": "llama3",
    "factor": 8.0,
    "low_freq_factor": 1.0,
    "high_freq_factor": 4.0,
    "original_max_position_embeddings": 64,
}
YARN = {"rope_type": "yarn", "factor": 4.0, "original_max_position_embeddings": 32}
DYNAMIC = {"rope_type": "dynamic", "factor": 2.0}


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
    options |= _rope(family, draw, index)
    options |= _later(family, index, draw, options)
    if family in ("gpt_neox", "stablelm", "starcoder2"):
        options.pop("rms_norm_eps")
    if family == "gpt_neox":
        options.pop("num_key_value_heads")
    return FAMILIES[family](**(options | _special(family, index, draw, options)))


def _rope(family: str, draw: random.Random, index: int) -> dict:
    scaling = [{"rope_type": "default"}, LLAMA3, YARN, {"rope_type": "linear", "factor": 2.0}][index % 4]
    if index == 4 and family != "mixtral":  # where transformers itself fails without a head_dim
        scaling = DYNAMIC
    if index == 6:
        scaling = YARN | {
            "original_max_position_embeddings": 1024,
            "beta_fast": 8,
            "beta_slow": 2,
            "attention_factor": 1.3,
        }
    return {"rope_parameters": {**scaling, "rope_theta": draw.choice([1e4, 1e6])}}


def _longrope(rotated: int, draw: random.Random) -> dict:
    short, long = ([round(draw.uniform(1.0, 3.0), 3) for _ in range(rotated // 2)] for _ in range(2))
    return {"rope_type": "longrope", "short_factor": short, "long_factor": long}


def _later(family: str, index: int, draw: random.Random, options: dict) -> dict:
    """What the families have that are not Llama with a switch or two."""
    heads, layers = options["num_attention_heads"], options["num_hidden_layers"]
    window, every_other = draw.choice([5, 11, 30]), ["sliding_attention", "full_attention"] * layers
    act, gelu = ["silu", "gelu_pytorch_tanh"][index % 2], ["gelu", "gelu_pytorch_tanh"][index % 2]
    rope = options["rope_parameters"]
    if family == "gpt_neox":
        share = [0.25, 0.5, 1.0][index % 3]
        return {"hidden_act": gelu, "use_parallel_residual": index % 4 != 3, "attention_bias": index % 4 != 2,
                "rope_parameters": rope | {"partial_rotary_factor": share}, "layer_norm_eps": 1e-6,
                "tie_word_embeddings": index in (1, 4) and index % 4 != 3}  # fmt: skip
    if family == "stablelm":
        share = [0.25, 0.5, 1.0][index % 3]
        rope = {"rope_parameters": rope | {"partial_rotary_factor": share}}
        return rope | {"use_qkv_bias": index % 2 == 0, "layer_norm_eps": 1e-6}
    if family == "starcoder2":
        kv_heads = options["num_key_value_heads"]
        more = {"num_attention_heads": 2 * kv_heads, "hidden_size": 2 * kv_heads * 16}  # else GPT-NeoX computes it too
        return more | {"hidden_act": gelu, "use_bias": index % 4 != 2, "sliding_window": [None, window][index % 2]}
    if family == "phi3":
        width, share = options["hidden_size"] // heads, [0.5, 0.75, 1.0][index % 3]
        kind = _longrope(int(width * share), draw) if index % 2 or share == 1 else {"rope_type": "default"}
        return {"sliding_window": [None, window][index % 2], "original_max_position_embeddings": 64,
                "rope_parameters": {**kind, "rope_theta": rope["rope_theta"], "partial_rotary_factor": share},
                "pad_token_id": 0}  # fmt: skip
    if family == "gemma":
        return {"head_dim": draw.choice([16, 24]), "attention_bias": index % 4 == 3, "hidden_act": "gelu_pytorch_tanh"}
    if family == "gemma3_text":
        local = {"rope_type": "default", "rope_theta": draw.choice([1e4, 5e2])}
        return {"head_dim": draw.choice([16, 24]), "query_pre_attn_scalar": draw.choice([16, 40]),
                "layer_types": every_other[index % 2 :][:layers], "sliding_window": window,
                "rope_parameters": {"full_attention": rope, "sliding_attention": local}}  # fmt: skip
    if family == "olmo2":
        return {"attention_bias": index % 4 == 3}
    if family == "smollm3":
        nope = [int(i != index % layers) for i in range(layers)]
        return {"no_rope_layers": nope, "mlp_bias": index % 3 == 2, "attention_bias": index % 4 == 3, "pad_token_id": 0,
                "use_sliding_window": index % 2 == 1, "sliding_window": [None, window][index % 2]}  # fmt: skip
    if family == "granite":
        scales = {name: round(draw.uniform(0.2, 4.0), 3) for name in ("embedding", "residual", "attention")}
        return {f"{name}_multiplier": value for name, value in scales.items()} | {
            "logits_scaling": draw.choice([0.5, 3.0, 8.0]), "hidden_act": act, "mlp_bias": index % 3 == 2,
        }  # fmt: skip
    return {}


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
                is_norm = any(word in name for word in ("norm", "ln_")) and not family.startswith("gemma")
                parameter.normal_(1.0 if is_norm and name.endswith("weight") else 0.0, 0.2)
    return model


def tokens_for(model_or_config, length: int = LENGTH) -> torch.Tensor:
    """Two rows of random ids."""
    vocab = getattr(model_or_config, "config", model_or_config).vocab_size
    return torch.randint(0, vocab, (2, length), generator=torch.Generator().manual_seed(0))

"""``config.json`` of Llama, Qwen2 and Mixtral to ``ModelConfig`` and back."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

from llmrecipes.errors import UserError
from llmrecipes.recipe.model_config import ModelConfig, MoEConfig, RopeScaling

ARCHITECTURES = {"llama": "LlamaForCausalLM", "qwen2": "Qwen2ForCausalLM", "mixtral": "MixtralForCausalLM"}
# What transformers assumes where config.json is silent.
_DEFAULT_THETA = {"llama": 1e4, "qwen2": 1e4, "mixtral": 1e6}
_DEFAULT_EPS = {"llama": 1e-6, "qwen2": 1e-6, "mixtral": 1e-5}
_DEFAULT_KV_HEADS = {"llama": None, "qwen2": 32, "mixtral": 8}


def _rope(hf: Mapping[str, Any], family: str, found: list[str]) -> tuple[float, RopeScaling | None]:
    """Base and scaling, from ``rope_parameters`` (transformers 5) or ``rope_theta`` and ``rope_scaling`` (before)."""
    rope = hf.get("rope_parameters") or hf.get("rope_scaling") or {}
    theta = float(rope.get("rope_theta") or hf.get("rope_theta") or _DEFAULT_THETA[family])
    kind = rope.get("rope_type", rope.get("type", "default"))
    if float(rope.get("partial_rotary_factor", hf.get("partial_rotary_factor") or 1.0)) != 1.0:
        found.append("partial_rotary_factor: only full rotary positions (1.0) are supported")
    if kind == "default":
        return theta, None
    if kind != "llama3":
        found.append(f"rope_type {kind!r}: only 'default' and 'llama3' are supported")
        return theta, None
    return theta, RopeScaling(
        factor=float(rope["factor"]),
        low_freq_factor=float(rope["low_freq_factor"]),
        high_freq_factor=float(rope["high_freq_factor"]),
        original_max_seq_len=int(rope["original_max_position_embeddings"]),
    )


def _windowed(hf: Mapping[str, Any]) -> bool:
    window = hf.get("sliding_window")
    if hf.get("model_type") == "qwen2" and not hf.get("use_sliding_window", False):
        return False
    return window is not None and window < hf.get("max_position_embeddings", 0)


def config_from_hf(hf: Mapping[str, Any]) -> ModelConfig:
    """The decoder that a parsed ``config.json`` (or ``PretrainedConfig.to_dict()``) describes.

    Raises:
        UserError: the architecture or one of its options is not supported; every reason is listed.
    """
    family = str(hf.get("model_type"))
    if family not in ARCHITECTURES:
        raise UserError(f"model_type {family!r} is not supported: use one of {', '.join(ARCHITECTURES)}")
    found: list[str] = []
    theta, scaling = _rope(hf, family, found)
    if hf.get("hidden_act", "silu") not in ("silu", "swish"):
        found.append(f"hidden_act {hf['hidden_act']!r}: only 'silu' (SwiGLU) is supported")
    if _windowed(hf):
        found.append(f"sliding_window {hf['sliding_window']}: attention windows are not supported")
    attention_bias, mlp_bias = bool(hf.get("attention_bias", False)), bool(hf.get("mlp_bias", False))
    if attention_bias != mlp_bias:
        found.append("attention_bias and mlp_bias differ: both or neither are supported")
    if found:
        raise UserError(*(f"config.json: {problem}" for problem in found))
    ffn_dim = int(hf["intermediate_size"])
    moe = None
    if family == "mixtral":
        experts = hf.get("num_local_experts") or hf.get("num_experts") or 8
        coef = float(hf.get("router_aux_loss_coef", 0.001))
        moe = MoEConfig(num_experts=experts, ffn_dim=ffn_dim, top_k=hf.get("num_experts_per_tok", 2), balance_coef=coef)
    heads = int(hf["num_attention_heads"])
    kv_heads = hf.get("num_key_value_heads", _DEFAULT_KV_HEADS[family]) or heads
    head_dim = hf.get("head_dim")
    return ModelConfig(
        vocab_size=hf["vocab_size"],
        dim=hf["hidden_size"],
        num_layers=hf["num_hidden_layers"],
        num_heads=heads,
        num_kv_heads=None if kv_heads == heads else kv_heads,
        head_dim=None if head_dim is None or head_dim * heads == hf["hidden_size"] else head_dim,
        ffn_dim=None if moe else ffn_dim,
        norm_eps=hf.get("rms_norm_eps", _DEFAULT_EPS[family]),
        rope_theta=theta,
        rope_scaling=scaling,
        max_seq_len=hf.get("max_position_embeddings"),
        qkv_bias=family == "qwen2" or attention_bias,
        bias=mlp_bias,
        tie_embeddings=bool(hf.get("tie_word_embeddings", False)),
        moe=moe,
        init_std=hf.get("initializer_range", 0.02),
    )


def hf_family(config: ModelConfig) -> str:
    """The architecture in transformers that computes exactly what ``config`` does: llama, qwen2 or mixtral.

    Raises:
        UserError: there is none; every option that stands in the way is named.
    """
    found = []
    if config.norm != "rms":
        found.append("norm: layer")
    if config.activation != "swiglu":
        found.append(f"activation: {config.activation}")
    if config.positions != "rope":
        found.append(f"positions: {config.positions}")
    found += [f"{name}: true" for name in ("qk_norm", "embedding_norm") if getattr(config, name)]
    if config.bias and not (config.qkv_bias and config.moe is None):
        found.append("bias: true (only together with qkv_bias: true, in a dense model)")
    if config.moe is not None:
        if config.num_moe_layers != config.num_layers:
            found.append(f"moe_every: {config.moe_every}")
        if config.moe.score != "softmax" or not config.moe.renormalize:
            found.append("moe: Mixtral scores by softmax and renormalises")
        if config.qkv_bias:
            found.append("qkv_bias: true in a mixture of experts")
    if found:
        raise UserError(*(f"no Hugging Face architecture for {problem}" for problem in found))
    if config.moe is not None:
        return "mixtral"
    return "qwen2" if config.qkv_bias and not config.bias else "llama"


def config_to_hf(config: ModelConfig, max_seq_len: int | None = None) -> dict[str, Any]:
    """``config.json`` for ``config``, readable by transformers 4 and 5.

    Args:
        config: the decoder.
        max_seq_len: longest text it was trained for; needed where ``config.max_seq_len`` is null.
    """
    family = hf_family(config)
    length = max_seq_len or config.max_seq_len
    if length is None:
        raise UserError("config.json needs the longest text of the model: give max_seq_len")
    rope: dict[str, Any] = {"rope_type": "default"}
    if config.rope_scaling is not None:
        scaling = config.rope_scaling
        rope = {
            "rope_type": "llama3",
            "factor": scaling.factor,
            "low_freq_factor": scaling.low_freq_factor,
            "high_freq_factor": scaling.high_freq_factor,
            "original_max_position_embeddings": scaling.original_max_seq_len,
        }
    hf: dict[str, Any] = {
        "architectures": [ARCHITECTURES[family]],
        "model_type": family,
        "vocab_size": config.vocab_size,
        "hidden_size": config.dim,
        "num_hidden_layers": config.num_layers,
        "num_attention_heads": config.num_heads,
        "num_key_value_heads": config.kv_heads,
        "head_dim": config.head_width,
        "intermediate_size": config.moe.ffn_dim if config.moe else config.ffn_dim,
        "hidden_act": "silu",
        "rms_norm_eps": config.norm_eps,
        "max_position_embeddings": length,
        "rope_theta": config.rope_theta,
        "rope_scaling": None if config.rope_scaling is None else rope,
        "rope_parameters": {**rope, "rope_theta": config.rope_theta},
        "tie_word_embeddings": config.tie_embeddings,
        "initializer_range": config.weight_std,
        "use_cache": True,
    }
    if family == "llama":
        hf |= {"attention_bias": config.qkv_bias, "mlp_bias": config.bias}
    if config.moe is not None:
        hf |= {
            "num_local_experts": config.moe.num_experts,
            "num_experts_per_tok": config.moe.top_k,
            "sliding_window": None,
            "router_aux_loss_coef": config.moe.balance_coef,
        }
    return hf

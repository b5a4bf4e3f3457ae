"""``ModelConfig`` to the ``config.json`` of the architecture that computes the same."""

from __future__ import annotations

import math
from collections.abc import Callable
from typing import Any

from llmrecipes.convert.families import ARCHITECTURES, ATTENTION_BIAS, MLP_BIAS, hf_family
from llmrecipes.convert.hf_rope import rope_to_hf
from llmrecipes.errors import UserError
from llmrecipes.recipe.model_config import ModelConfig


def config_to_hf(config: ModelConfig, max_seq_len: int | None = None) -> dict[str, Any]:
    """``config.json`` for ``config``, readable by transformers 4 and 5.

    Args:
        config: the decoder; rows that pad its vocabulary are not counted.
        max_seq_len: longest text it was trained for; needed where ``config.max_seq_len`` is null.

    Raises:
        UserError: no architecture computes the same, or the longest text is unknown.
    """
    family = hf_family(config)
    hf: dict[str, Any] = {
        "architectures": [ARCHITECTURES[family]],
        "model_type": family,
        "vocab_size": config.vocab_size,
        "initializer_range": config.weight_std,
        "tie_word_embeddings": config.tie_embeddings,
        "use_cache": True,
    }
    length = max_seq_len or config.max_seq_len
    if family == "bloom":
        return hf | _bloom(config, length)
    if length is None:
        raise UserError("config.json needs the longest text of the model: give max_seq_len")
    if family == "gpt2":
        return hf | _gpt2(config, length)
    length = _longest(config, length)
    if family in _CLASSIC:
        sizes = _sizes(config, length)
        if family == "gpt_neox":
            del sizes["num_key_value_heads"]
        return hf | _CLASSIC[family](config) | sizes | rope_to_hf(config, partial=family != "starcoder2")
    hf |= _sizes(config, length) | _llama_like(config) | _attention(config, family) | _experts(config, family)
    return hf | rope_to_hf(config, family == "phi3") | (_SPECIAL[family](config) if family in _SPECIAL else {})


def _longest(config: ModelConfig, length: int) -> int:
    """Where the stretching of the angles follows from the longest text, that is not a free choice."""
    scaling = config.rope_scaling
    if scaling is not None and scaling.kind == "dynamic":
        return scaling.original_max_seq_len
    if scaling is not None and scaling.kind == "longrope":
        return round(scaling.original_max_seq_len * scaling.factor)
    return length


def _gpt2(config: ModelConfig, length: int) -> dict[str, Any]:
    return {
        "n_embd": config.dim,
        "n_layer": config.num_layers,
        "n_head": config.num_heads,
        "n_inner": config.ffn_dim,
        "n_positions": config.max_seq_len or length,
        "activation_function": "gelu_new" if config.activation == "gelu_tanh" else "gelu",
        "layer_norm_epsilon": config.norm_eps,
    } | dict.fromkeys(("resid_pdrop", "embd_pdrop", "attn_pdrop"), config.dropout)


def _bloom(config: ModelConfig, length: int | None) -> dict[str, Any]:
    return {
        "hidden_size": config.dim,
        "n_layer": config.num_layers,
        "n_head": config.num_heads,
        "layer_norm_epsilon": config.norm_eps,
        "apply_residual_connection_post_layernorm": False,
        "hidden_dropout": config.dropout,
        "attention_dropout": config.dropout,
    } | ({} if length is None else {"seq_length": length})


def _sizes(config: ModelConfig, length: int) -> dict[str, Any]:
    return {
        "hidden_size": config.dim,
        "num_hidden_layers": config.num_layers,
        "num_attention_heads": config.num_heads,
        "num_key_value_heads": config.kv_heads,
        "intermediate_size": config.ffn_dim or (config.moe.ffn_dim if config.moe else None),
        "max_position_embeddings": length,
    }


def _llama_like(config: ModelConfig) -> dict[str, Any]:
    act = "gelu_pytorch_tanh" if config.activation == "geglu" else "silu"
    return {"head_dim": config.head_width, "hidden_act": act, "rms_norm_eps": config.norm_eps}


def _gelu(config: ModelConfig) -> str:
    return "gelu_pytorch_tanh" if config.activation == "gelu_tanh" else "gelu"


def _gpt_neox(config: ModelConfig) -> dict[str, Any]:
    return {
        "hidden_act": _gelu(config),
        "layer_norm_eps": config.norm_eps,
        "use_parallel_residual": config.parallel_residual,
        "attention_bias": config.qkv_bias,
        "rotary_pct": config.rotary_fraction,
        "rotary_emb_base": config.rope_theta,
    } | dict.fromkeys(("attention_dropout", "hidden_dropout"), config.dropout)


def _starcoder2(config: ModelConfig) -> dict[str, Any]:
    return {
        "hidden_act": _gelu(config),
        "norm_epsilon": config.norm_eps,
        "use_bias": config.bias,
        "sliding_window": config.sliding_window,
    } | dict.fromkeys(("attention_dropout", "residual_dropout", "embedding_dropout"), config.dropout)


def _stablelm(config: ModelConfig) -> dict[str, Any]:
    return {
        "hidden_act": "silu",
        "layer_norm_eps": config.norm_eps,
        "use_qkv_bias": config.qkv_bias,
        "use_parallel_residual": False,
        "qk_layernorm": False,
    }


def _gemma3(config: ModelConfig) -> dict[str, Any]:
    hf = _layer_types(config) | {"hidden_activation": "gelu_pytorch_tanh"}
    scalar = (config.attention_scale or config.head_width**-0.5) ** -2
    hf["query_pre_attn_scalar"] = round(scalar) if math.isclose(scalar, round(scalar), rel_tol=1e-12) else scalar
    # Its code makes the mask of the windows even where no layer has one.
    hf |= {"attn_logit_softcapping": None, "final_logit_softcapping": None}
    hf["sliding_window"] = config.sliding_window or 4096
    rope = rope_to_hf(config)
    local = config.window_rope_theta or config.rope_theta
    hf["rope_local_base_freq"] = local
    windowed = {"rope_type": "default", "rope_theta": local}
    hf["rope_parameters"] = {"full_attention": rope["rope_parameters"], "sliding_attention": windowed}
    return hf


def _smollm3(config: ModelConfig) -> dict[str, Any]:
    nope = config.nope_layers or []
    return {"no_rope_layers": [int(i not in nope) for i in range(config.num_layers)]} | _layer_types(config)


def _granite(config: ModelConfig) -> dict[str, Any]:
    return {
        "embedding_multiplier": config.embedding_scale,
        "residual_multiplier": config.residual_scale,
        "attention_multiplier": config.attention_scale or config.head_width**-0.5,
        "logits_scaling": config.logit_divisor,
    }


def _phi3(config: ModelConfig) -> dict[str, Any]:
    hf: dict[str, Any] = dict.fromkeys(("resid_pdrop", "embd_pdrop", "attention_dropout"), config.dropout)
    hf["sliding_window"] = config.sliding_window
    scaling = config.rope_scaling
    if scaling is None:
        return hf
    # Transformers 4 wants these keys only, and takes the factor from the two lengths.
    rope: dict[str, Any] = {
        "type": "longrope",
        "short_factor": scaling.short_factor,
        "long_factor": scaling.long_factor,
    }
    if scaling.attention_factor is not None:
        rope["attention_factor"] = scaling.attention_factor
    return hf | {"original_max_position_embeddings": scaling.original_max_seq_len, "rope_scaling": rope}


_CLASSIC: dict[str, Callable[[ModelConfig], dict[str, Any]]] = {
    "gpt_neox": _gpt_neox,
    "starcoder2": _starcoder2,
    "stablelm": _stablelm,
}
_SPECIAL: dict[str, Callable[[ModelConfig], dict[str, Any]]] = {
    "gemma": lambda _: {"hidden_activation": "gelu_pytorch_tanh"},
    "gemma3_text": _gemma3,
    "smollm3": _smollm3,
    "granite": _granite,
    "phi3": _phi3,
}


def _layer_types(config: ModelConfig) -> dict[str, Any]:
    windows = [config.window_of(layer) for layer in range(config.num_layers)]
    return {"layer_types": ["full_attention" if w is None else "sliding_attention" for w in windows]}


def _attention(config: ModelConfig, family: str) -> dict[str, Any]:
    """Biases and sliding windows."""
    hf: dict[str, Any] = {}
    if family in ATTENTION_BIAS:
        hf["attention_bias"] = config.qkv_bias
    if family in MLP_BIAS:
        hf["mlp_bias"] = config.bias
    if family in ("mistral", "mixtral"):
        hf["sliding_window"] = config.sliding_window
    if family == "qwen2_moe":
        hf["qkv_bias"] = config.qkv_bias
    if family in ("qwen2", "qwen3", "qwen2_moe", "qwen3_moe", "smollm3"):
        hf |= {"use_sliding_window": config.sliding_window is not None, "sliding_window": config.sliding_window}
    if family in ("qwen2", "qwen3", "qwen2_moe"):
        hf |= _layer_types(config)
        # What older versions of transformers look at: right where the windows begin at one layer and go on.
        windowed = (i for i in range(config.num_layers) if config.window_of(i) is not None)
        hf["max_window_layers"] = next(windowed, config.num_layers)
    return hf


def _experts(config: ModelConfig, family: str) -> dict[str, Any]:
    moe = config.moe
    if moe is None:
        return {}
    hf: dict[str, Any] = {"num_experts_per_tok": moe.top_k, "router_aux_loss_coef": moe.balance_coef}
    hf |= {"output_router_logits": False}
    if family in ("mixtral", "olmoe"):
        hf["intermediate_size"] = moe.ffn_dim
    experts = moe.num_experts or config.layer_experts[0]
    if family == "mixtral":
        return hf | {"num_local_experts": experts}
    hf |= {"num_experts": experts, "norm_topk_prob": moe.renormalize}
    if family == "olmoe":
        return hf
    if moe.shared_ffn_dim is not None:
        hf["shared_expert_intermediate_size"] = moe.shared_ffn_dim
    every, listed = config.moe_every, config.dense_layers or []
    return hf | {"moe_intermediate_size": moe.ffn_dim, "decoder_sparse_step": every, "mlp_only_layers": listed}

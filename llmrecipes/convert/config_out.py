"""``ModelConfig`` to the ``config.json`` of the architecture that computes the same."""

from __future__ import annotations

from typing import Any

from llmrecipes.convert.families import ARCHITECTURES, hf_family
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
    return hf | _llama_like(config, length) | _rope(config) | _attention(config, family) | _experts(config, family)


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


def _llama_like(config: ModelConfig, length: int) -> dict[str, Any]:
    return {
        "hidden_size": config.dim,
        "num_hidden_layers": config.num_layers,
        "num_attention_heads": config.num_heads,
        "num_key_value_heads": config.kv_heads,
        "head_dim": config.head_width,
        "intermediate_size": config.ffn_dim or (config.moe.ffn_dim if config.moe else None),
        "hidden_act": "silu",
        "rms_norm_eps": config.norm_eps,
        "max_position_embeddings": length,
    }


def _rope(config: ModelConfig) -> dict[str, Any]:
    rope: dict[str, Any] = {"rope_type": "default"}
    scaling = config.rope_scaling
    if scaling is not None:
        rope = {"rope_type": scaling.kind, "factor": scaling.factor}
        if scaling.kind == "llama3":
            rope |= {
                "low_freq_factor": scaling.low_freq_factor,
                "high_freq_factor": scaling.high_freq_factor,
                "original_max_position_embeddings": scaling.original_max_seq_len,
            }
    return {
        "rope_theta": config.rope_theta,
        "rope_scaling": None if scaling is None else rope,
        "rope_parameters": {**rope, "rope_theta": config.rope_theta},
    }


def _attention(config: ModelConfig, family: str) -> dict[str, Any]:
    """Biases and sliding windows."""
    hf: dict[str, Any] = {}
    if family in ("llama", "qwen3", "qwen3_moe", "olmoe"):
        hf["attention_bias"] = config.qkv_bias
    if family == "llama":
        hf["mlp_bias"] = config.bias
    if family in ("mistral", "mixtral"):
        hf["sliding_window"] = config.sliding_window
    if family == "qwen2_moe":
        hf["qkv_bias"] = config.qkv_bias
    if family in ("qwen2", "qwen3", "qwen2_moe", "qwen3_moe"):
        hf |= {"use_sliding_window": config.sliding_window is not None, "sliding_window": config.sliding_window}
    if family in ("qwen2", "qwen3", "qwen2_moe"):
        windows = [config.window_of(layer) for layer in range(config.num_layers)]
        hf["layer_types"] = ["full_attention" if w is None else "sliding_attention" for w in windows]
        # What older versions of transformers look at: right where the windows begin at one layer and go on.
        hf["max_window_layers"] = next((i for i, w in enumerate(windows) if w is not None), config.num_layers)
    return hf


def _experts(config: ModelConfig, family: str) -> dict[str, Any]:
    moe = config.moe
    if moe is None:
        return {}
    hf: dict[str, Any] = {"num_experts_per_tok": moe.top_k, "router_aux_loss_coef": moe.balance_coef}
    hf |= {"output_router_logits": False}
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

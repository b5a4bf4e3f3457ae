"""Which architecture of transformers computes exactly what a ``ModelConfig`` describes."""

from __future__ import annotations

from collections.abc import Iterator

from llmrecipes.errors import UserError
from llmrecipes.recipe.model_config import ModelConfig

ARCHITECTURES = {
    "llama": "LlamaForCausalLM",
    "mistral": "MistralForCausalLM",
    "qwen2": "Qwen2ForCausalLM",
    "qwen3": "Qwen3ForCausalLM",
    "gpt2": "GPT2LMHeadModel",
    "bloom": "BloomForCausalLM",
    "mixtral": "MixtralForCausalLM",
    "olmoe": "OlmoeForCausalLM",
    "qwen2_moe": "Qwen2MoeForCausalLM",
    "qwen3_moe": "Qwen3MoeForCausalLM",
}
# Read, but written as another: the code of Qwen-1 is not in transformers, and Qwen2 computes the same.
READ_ONLY = {"qwen": "qwen2"}


def hf_family(config: ModelConfig) -> str:
    """The ``model_type`` in transformers that computes exactly what ``config`` does.

    Raises:
        UserError: there is none; every option that stands in the way of the nearest one is named.
    """
    if config.lora is not None:
        raise UserError(
            "no Hugging Face architecture has low-rank adapters: fold them into the weights (llmrecipes merge fold), "
            "or write one adapter alone (llmrecipes convert to-peft)"
        )
    family = _nearest(config)
    found = list(_obstacles(config, family))
    if found:
        raise UserError(*(f"no Hugging Face architecture for {problem} (nearest: {family})" for problem in found))
    return family


def _nearest(config: ModelConfig) -> str:
    if config.norm == "layer" or config.positions in ("alibi", "learned"):
        return "bloom" if config.positions == "alibi" else "gpt2"
    if config.moe is not None:
        if config.moe.shared_ffn_dim is not None:
            return "qwen2_moe"
        if not config.qk_norm:
            return "mixtral"
        return "qwen3_moe" if config.qk_norm_scope == "head" else "olmoe"
    if config.qk_norm:
        return "qwen3"
    if config.qkv_bias and not config.has_out_bias:
        return "qwen2"
    return "llama" if config.sliding_window is None else "mistral"


def _obstacles(config: ModelConfig, family: str) -> Iterator[str]:
    if family in ("gpt2", "bloom"):
        yield from _classic(config, family)
    else:
        yield from _modern(config, family)
        yield from _experts(config, family)


def _classic(config: ModelConfig, family: str) -> Iterator[str]:
    """GPT-2 and BLOOM: LayerNorm, GELU, biases everywhere, one key/value head per head."""
    if config.norm != "layer":
        yield f"norm: {config.norm}"
    if config.activation not in ("gelu", "gelu_tanh") or (family == "bloom" and config.activation == "gelu"):
        yield f"activation: {config.activation}"
    if config.positions != ("learned" if family == "gpt2" else "alibi"):
        yield f"positions: {config.positions}"
    if not (config.bias and config.qkv_bias and config.has_out_bias):
        yield "a map without bias"
    if config.qk_norm:
        yield "qk_norm: true"
    if config.embedding_norm != (family == "bloom"):
        yield f"embedding_norm: {str(config.embedding_norm).lower()}"
    if config.kv_heads != config.num_heads:
        yield f"num_kv_heads: {config.num_kv_heads}"
    if config.head_width * config.num_heads != config.dim:
        yield f"head_dim: {config.head_dim}"
    if config.sliding_window is not None:
        yield f"sliding_window: {config.sliding_window}"
    if config.moe is not None:
        yield "moe"
    if family == "bloom" and config.moe is None and config.ffn_dim != 4 * config.dim:
        yield f"ffn_dim: {config.ffn_dim} (BLOOM's is 4 x dim)"


def _modern(config: ModelConfig, family: str) -> Iterator[str]:
    """Llama and its relatives: RMSNorm, SwiGLU, rotary positions."""
    if config.norm != "rms":
        yield f"norm: {config.norm}"
    if config.activation != "swiglu":
        yield f"activation: {config.activation}"
    if config.positions != "rope":
        yield f"positions: {config.positions}"
    if config.embedding_norm:
        yield "embedding_norm: true"
    if config.bias and family != "llama":
        yield "bias: true"
    if config.has_out_bias != config.qkv_bias and family not in ("qwen2", "qwen2_moe"):
        yield f"qkv_bias: {str(config.qkv_bias).lower()} beside out_bias: {str(config.has_out_bias).lower()}"
    elif config.has_out_bias and family == "qwen2_moe":
        yield "out_bias: true"
    elif config.qkv_bias and family in ("mixtral", "mistral"):
        yield "qkv_bias: true"
    if config.qk_norm and family == "qwen2_moe":
        yield "qk_norm: true beside moe.shared_ffn_dim"
    elif config.qk_norm and config.qk_norm_scope == "all" and family != "olmoe":
        yield "qk_norm_scope: all in a dense model"
    if config.head_width * config.num_heads != config.dim and family == "olmoe":
        yield f"head_dim: {config.head_dim}"
    if config.dim % config.num_heads and family == "llama":
        yield f"num_heads: {config.num_heads}, which does not divide dim {config.dim}"
    if config.sliding_window is not None:
        windows = [config.window_of(layer) for layer in range(config.num_layers)]
        if family in ("llama", "olmoe"):
            yield f"sliding_window: {config.sliding_window}"
        elif None in windows and family not in ("qwen2", "qwen3", "qwen2_moe"):
            yield "window_layers: not all layers"


def _experts(config: ModelConfig, family: str) -> Iterator[str]:
    if config.moe is None:
        return
    if config.num_moe_layers != config.num_layers and family not in ("qwen2_moe", "qwen3_moe"):
        yield f"{config.num_layers - config.num_moe_layers} layers without experts"
    if config.moe.router != "per_mlp":
        yield f"moe.router: {config.moe.router}"
    if len(set(config.layer_experts)) > 1:
        yield "moe.experts_per_layer: layers with different numbers of experts"
    if config.moe.residual:
        yield "moe.residual: true"
    if config.moe.eval_capacity_factor is not None:
        yield f"moe.eval_capacity_factor: {config.moe.eval_capacity_factor}, with which experts drop tokens"
    if config.moe.score != "softmax":
        yield f"moe.score: {config.moe.score}"
    if family == "mixtral" and not config.moe.renormalize:
        yield "moe.renormalize: false"

"""Which architecture of transformers computes exactly what a ``ModelConfig`` describes."""

from __future__ import annotations

import math
from collections.abc import Iterator

from llmrecipes.errors import UserError
from llmrecipes.recipe.model_config import GATED, ModelConfig

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
    "gpt_neox": "GPTNeoXForCausalLM",
    "stablelm": "StableLmForCausalLM",
    "starcoder2": "Starcoder2ForCausalLM",
    "phi3": "Phi3ForCausalLM",
    "gemma": "GemmaForCausalLM",
    "gemma3_text": "Gemma3ForCausalLM",
    "olmo2": "Olmo2ForCausalLM",
    "smollm3": "SmolLM3ForCausalLM",
    "granite": "GraniteForCausalLM",
}
# Read, but written as another: the code of Qwen-1 is not in transformers, and Qwen2 computes the same.
READ_ONLY = {"qwen": "qwen2"}
# Families in which one key sets the biases of all maps of attention, and of the feed-forward network.
ATTENTION_BIAS = {"llama", "qwen3", "qwen3_moe", "olmoe", "gemma", "gemma3_text", "olmo2", "smollm3", "granite"}
MLP_BIAS = {"llama", "smollm3", "granite"}

_IMAGES = "it holds an encoder of images beside the decoder; save its text model alone, if that is of a family below"
_ONE_NORM = "one norm feeds attention and feed-forward network at once"
_CODE = "its code is not in transformers, so nothing could be compared"
# Families that people ask for, and what in them this decoder does not compute.
UNSUPPORTED = {
    "gemma2": "scores and logits are capped by tanh",
    "gemma3": _IMAGES,
    "gemma3n": _IMAGES,
    "mistral3": _IMAGES,
    "llama4": _IMAGES,
    "qwen2_vl": _IMAGES,
    "qwen2_5_vl": _IMAGES,
    "qwen3_vl": _IMAGES,
    "llava": _IMAGES,
    "phi": f"{_ONE_NORM} and its head has a bias",
    "gptj": f"{_ONE_NORM} and its head has a bias",
    "codegen": f"{_ONE_NORM} and its head has a bias",
    "falcon": f"{_ONE_NORM}",
    "cohere": f"{_ONE_NORM}, without a bias, and neighbouring features are rotated",
    "cohere2": f"{_ONE_NORM}, without a bias, and neighbouring features are rotated",
    "olmo": "its norms have no weights",
    "olmo3": "its windows and its stretched positions depend on each other",
    "opt": "its activation is ReLU and its positions begin at 2",
    "mpt": "its norms have no bias",
    "gpt_bigcode": "it has one key/value head beside learned positions",
    "gpt_neo": "its attention is local in every other layer and not scaled",
    "gpt_neox_japanese": "its activation, dropout and biases have places of their own",
    "phimoe": "its router samples in training and its head has a bias",
    "granitemoe": "the layout of its experts is not known here",
    "deepseek_v2": "keys and values are compressed (multi-head latent attention)",
    "deepseek_v3": "keys and values are compressed (multi-head latent attention)",
    "gpt_oss": "attention has sinks and the experts have biases",
    "glm": "neighbouring features are rotated",
    "glm4": "neighbouring features are rotated",
    "nemotron": "its norms are LayerNorm by 1 + weight and its activation is squared ReLU",
    "persimmon": "its activation is squared ReLU",
    "mamba": "it has no attention",
    "mamba2": "it has no attention",
    "falcon_mamba": "it has no attention",
    "rwkv": "it has no attention",
    "jamba": "most of its layers have no attention",
    "t5": "it is an encoder and a decoder, not a decoder alone",
    "bert": "it is an encoder, not a decoder",
    "baichuan": _CODE,
    "chatglm": _CODE,
    "internlm": _CODE,
    "internlm2": _CODE,
    "plamo": _CODE,
    "stablelm_alpha": _CODE,
}
# Options that few families have, as: field of ModelConfig, its usual value, who else may have it.
_RARE: tuple[tuple[str, object, tuple[str, ...]], ...] = (
    ("parallel_residual", False, ("gpt_neox",)),
    ("rotary_fraction", 1.0, ("gpt_neox", "stablelm", "phi3")),
    ("norm_plus_one", False, ("gemma", "gemma3_text")),
    ("embedding_scale", 1.0, ("gemma", "gemma3_text", "granite")),
    ("residual_scale", 1.0, ("granite",)),
    ("logit_divisor", 1.0, ("granite",)),
    ("attention_scale", None, ("granite", "gemma3_text")),
    ("nope_layers", None, ("smollm3",)),
    ("window_rope_theta", None, ("gemma3_text",)),
)


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
        return _nearest_with_layer_norm(config)
    if config.moe is not None:
        if config.moe.shared_ffn_dim is not None:
            return "qwen2_moe"
        if not config.qk_norm:
            return "mixtral"
        return "qwen3_moe" if config.qk_norm_scope == "head" else "olmoe"
    if config.norm_plus_one:
        return "gemma3_text" if config.norm_position == "both" else "gemma"
    if config.norm_position == "post":
        return "olmo2"
    if config.nope_layers:
        return "smollm3"
    if any(
        (config.embedding_scale != 1, config.residual_scale != 1, config.logit_divisor != 1, config.attention_scale)
    ):
        return "granite"
    if config.qk_norm:
        return "qwen3"
    if config.rotary_fraction != 1:
        return "phi3"
    if config.qkv_bias and not config.has_out_bias:
        return "qwen2"
    if config.rope_scaling is not None and config.rope_scaling.kind == "longrope":
        return "phi3"
    return "llama" if config.sliding_window is None else "mistral"


def _nearest_with_layer_norm(config: ModelConfig) -> str:
    if config.positions in ("alibi", "learned"):
        return "bloom" if config.positions == "alibi" else "gpt2"
    if config.activation == "swiglu":
        return "stablelm"
    grouped = config.kv_heads != config.num_heads or config.sliding_window is not None
    neox = config.parallel_residual or config.rotary_fraction != 1 or not (grouped or config.tie_embeddings)
    return "gpt_neox" if neox and config.bias and config.positions == "rope" else "starcoder2"


def _obstacles(config: ModelConfig, family: str) -> Iterator[str]:
    yield from _rare(config, family)
    if family in ("gpt2", "bloom"):
        yield from _classic(config, family)
    elif family in ("gpt_neox", "starcoder2", "stablelm"):
        yield from _rotary_classic(config, family)
    else:
        yield from _modern(config, family)
        yield from _experts(config, family)


def _rare(config: ModelConfig, family: str) -> Iterator[str]:
    """Options that few families have."""
    for name, usual, families in _RARE:
        if getattr(config, name) != usual and family not in families:
            yield f"{name}: {str(getattr(config, name)).lower()}"
    position = {"olmo2": "post", "gemma3_text": "both"}.get(family, "pre")
    if config.norm_position != position:
        yield f"norm_position: {config.norm_position}"
    kind = None if config.rope_scaling is None else config.rope_scaling.kind
    if family == "phi3" and kind not in (None, "longrope"):
        yield f"rope_scaling of kind {kind}"
    if family in ("gemma", "gemma3_text"):
        if config.embedding_scale != math.sqrt(config.dim):
            yield f"embedding_scale: {config.embedding_scale} (Gemma's is the root of dim)"
        if config.activation != "geglu":
            yield f"activation: {config.activation}"
    scalar = (config.attention_scale or 1.0) ** -2
    if family == "gemma3_text" and not math.isclose(scalar, round(scalar), rel_tol=1e-12):
        yield f"attention_scale: {config.attention_scale} (Gemma 3 has 1 over the root of a whole number)"
    if family == "gemma3_text" and not config.qk_norm:
        yield "qk_norm: false"


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


def _rotary_classic(config: ModelConfig, family: str) -> Iterator[str]:
    """GPT-NeoX, StarCoder2 and StableLM: LayerNorm and rotary positions."""
    if config.positions != "rope":
        yield f"norm: layer with positions: {config.positions}"
    if config.activation == "geglu":
        yield "activation: geglu with norm: layer"
    for name in ("qk_norm", "embedding_norm"):
        if getattr(config, name):
            yield f"{name}: true"
    if config.moe is not None:
        yield "moe"
    if config.head_width * config.num_heads != config.dim:
        yield f"head_dim: {config.head_dim}"
    if family != "starcoder2" and config.sliding_window is not None:
        yield f"sliding_window: {config.sliding_window}"
    if family == "starcoder2" and config.window_layers is not None:
        yield "window_layers: not all layers"
    if family == "gpt_neox" and config.kv_heads != config.num_heads:
        yield f"num_kv_heads: {config.num_kv_heads}"
    alike = {
        "gpt_neox": config.bias and config.qkv_bias == config.has_out_bias,
        "starcoder2": config.bias == config.qkv_bias == config.has_out_bias,
        "stablelm": not config.bias and not config.has_out_bias,
    }
    if not alike[family]:
        biases = f"qkv_bias: {config.qkv_bias}, bias: {config.bias}, out_bias: {config.has_out_bias}"
        yield biases.lower()
    if family == "stablelm" and config.dropout:
        yield f"dropout: {config.dropout}"


def _modern(config: ModelConfig, family: str) -> Iterator[str]:
    """Llama and its relatives: RMSNorm, a gated feed-forward network, rotary positions."""
    if config.norm != "rms":
        yield f"norm: {config.norm}"
    if config.activation not in GATED:
        yield f"activation: {config.activation}"
    if config.positions != "rope":
        yield f"positions: {config.positions}"
    if config.embedding_norm:
        yield "embedding_norm: true"
    if config.bias and family not in MLP_BIAS:
        yield "bias: true"
    if config.has_out_bias != config.qkv_bias and family not in ("qwen2", "qwen2_moe"):
        yield f"qkv_bias: {str(config.qkv_bias).lower()} beside out_bias: {str(config.has_out_bias).lower()}"
    elif config.has_out_bias and family == "qwen2_moe":
        yield "out_bias: true"
    elif config.qkv_bias and family not in ATTENTION_BIAS and family not in ("qwen2", "qwen2_moe"):
        yield "qkv_bias: true"
    if family == "olmo2" and not (config.qk_norm and config.qk_norm_scope == "all"):
        yield "norm_position: post without qk_norm of all heads together"
    if config.qk_norm and family == "qwen2_moe":
        yield "qk_norm: true beside moe.shared_ffn_dim"
    elif config.qk_norm and config.qk_norm_scope == "all" and family not in ("olmoe", "olmo2"):
        yield "qk_norm_scope: all in a dense model"
    if config.qk_norm and family in ("gemma", "smollm3", "granite"):
        yield "qk_norm: true"
    if config.head_width * config.num_heads != config.dim and family in ("olmoe", "phi3"):
        yield f"head_dim: {config.head_dim}"
    if config.dim % config.num_heads and family in ("llama", "granite", "gemma3_text"):
        yield f"num_heads: {config.num_heads}, which does not divide dim {config.dim}"
    if config.sliding_window is not None:
        windows = [config.window_of(layer) for layer in range(config.num_layers)]
        if family in ("llama", "olmoe", "olmo2", "granite", "gemma"):
            yield f"sliding_window: {config.sliding_window}"
        elif None in windows and family not in ("qwen2", "qwen3", "qwen2_moe", "gemma3_text", "smollm3"):
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

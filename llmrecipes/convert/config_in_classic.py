"""``config.json`` of the families with LayerNorm, and of Qwen-1, whose keys have names of their own."""

from __future__ import annotations

from typing import Any

from llmrecipes.convert.hf_reader import Reader
from llmrecipes.convert.hf_rope import read_rope
from llmrecipes.recipe.model_config import Activation

# Of Qwen-1: what begins beyond its longest text, and how fast or in which type it is computed.
_QWEN1_ELSEWHERE = {
    "use_dynamic_ntk", "use_logn_attn", "max_position_embeddings", "use_flash_attn", "fp16", "bf16", "fp32",
    "softmax_in_fp32", "onnx_safe", "tokenizer_type", "use_cache_quantization", "use_cache_kernel",
}  # fmt: skip
_GELU: dict[str, Activation] = {
    "gelu": "gelu",
    "gelu_new": "gelu_tanh",
    "gelu_pytorch_tanh": "gelu_tanh",
    "gelu_fast": "gelu_tanh",
}


def gpt_neox(r: Reader) -> dict[str, Any]:
    """GPT-NeoX: rinna, open-calm, Pythia."""
    rope = read_rope(r, fraction=0.25, theta_key="rotary_emb_base", fraction_key="rotary_pct")
    for key in ("rope_theta", "partial_rotary_factor"):
        r.asked.add(key)  # written beside the family's own names by to-hf, for readers of these
    attention_bias = r.flag("attention_bias", True)
    dim, heads = r.size("hidden_size", 6144), r.size("num_attention_heads", 64)
    return _classic(dim, r.layers(default=44), heads) | rope.values() | {
        "ffn_dim": r.size("intermediate_size", 24576),
        "norm_eps": r.number("layer_norm_eps", 1e-5),
        "activation": r.word("hidden_act", _GELU, "gelu"),
        "parallel_residual": r.flag("use_parallel_residual", True),
        "max_seq_len": r.optional_size("max_position_embeddings", 2048),
        "qkv_bias": attention_bias,
        "out_bias": None if attention_bias else False,
        "tie_embeddings": r.flag("tie_word_embeddings", False),
        "dropout": r.dropout("attention_dropout", "hidden_dropout"),
    }  # fmt: skip


def starcoder2(r: Reader) -> dict[str, Any]:
    """StarCoder2."""
    # The same once more under the names of its predecessor, which no code reads.
    r.asked |= {"activation_function", "attention_softmax_in_fp32", "scale_attention_softmax_in_fp32"}
    r.asked |= {"scale_attn_weights", "layer_norm_epsilon"}
    r.only("norm_type", "layer_norm", why="only LayerNorm is known of this family")
    r.only("mlp_type", "default", why="only the plain feed-forward network is known of this family")
    bias, heads = r.flag("use_bias", True), r.size("num_attention_heads", 24)
    kv_heads = r.size("num_key_value_heads", 2)
    return _classic(r.size("hidden_size", 3072), r.layers(default=30), heads) | read_rope(r).values() | {
        "num_kv_heads": None if kv_heads == heads else kv_heads,
        "ffn_dim": r.size("intermediate_size", 12288),
        "norm_eps": r.number("norm_epsilon", 1e-5),
        "activation": r.word("hidden_act", _GELU, "gelu_pytorch_tanh"),
        "sliding_window": r.optional_size("sliding_window"),
        "max_seq_len": r.optional_size("max_position_embeddings", 4096),
        "qkv_bias": bias,
        "bias": bias,
        "tie_embeddings": r.flag("tie_word_embeddings", True),
        "dropout": r.dropout("attention_dropout", "residual_dropout", "embedding_dropout"),
    }  # fmt: skip


def stablelm(r: Reader) -> dict[str, Any]:
    """StableLM: LayerNorm, a gated feed-forward network, part of each head rotated."""
    r.only("qk_layernorm", False, why="a norm of its own for each head's queries and keys is not supported")
    r.only("use_parallel_residual", False, why="one norm for attention and feed-forward network is not supported")
    r.only("hidden_act", "silu", "swish", why="only 'silu' (SwiGLU) is supported")
    r.asked.add("rotary_scaling_factor")  # of the first files; no code of transformers reads it
    r.no_dropout("attention_dropout")
    r.only("hidden_dropout", 0, why="dropout after the feed-forward network alone is not supported; set it to 0")
    heads = r.size("num_attention_heads", 32)
    kv_heads = r.size("num_key_value_heads", 32)
    rope = read_rope(r, fraction=0.25)
    return _classic(r.size("hidden_size", 2560), r.layers(default=32), heads) | rope.values() | {
        "num_kv_heads": None if kv_heads == heads else kv_heads,
        "ffn_dim": r.size("intermediate_size", 6912),
        "norm_eps": r.number("layer_norm_eps", 1e-5),
        "max_seq_len": r.optional_size("max_position_embeddings", 4096),
        "qkv_bias": r.flag("use_qkv_bias", False),
        "bias": False,
        "tie_embeddings": r.flag("tie_word_embeddings", False),
    }  # fmt: skip


def gpt2(r: Reader) -> dict[str, Any]:
    """GPT-2."""
    r.asked |= {"n_ctx", "reorder_and_upcast_attn"}  # the table's length once more; another order of the same sums
    r.only("scale_attn_weights", True, why="attention is always scaled here")
    r.only("scale_attn_by_inverse_layer_idx", False, why="not supported")
    r.only("add_cross_attention", False, why="not supported")
    dim = r.size("n_embd", 768)
    return _classic(dim, r.layers("n_layer", 12), r.size("n_head", 12)) | {
        "ffn_dim": r.size("n_inner", 4 * dim),
        "norm_eps": r.number("layer_norm_epsilon", 1e-5),
        "activation": r.word("activation_function", _GELU, "gelu_new"),
        "positions": "learned",
        "max_seq_len": r.size("n_positions", 1024, 1 << 31),
        "tie_embeddings": r.flag("tie_word_embeddings", True),
        "dropout": r.dropout("resid_pdrop", "embd_pdrop", "attn_pdrop") if "resid_pdrop" in r.hf else 0.0,
    }


def bloom(r: Reader) -> dict[str, Any]:
    """BLOOM."""
    for key in ("slow_but_exact", "attention_softmax_in_fp32", "masked_softmax_fusion", "bias_dropout_fusion",
                "offset_alibi", "skip_bias_add", "skip_bias_add_qkv", "unk_token_id"):  # fmt: skip
        r.asked.add(key)  # the same mathematics in another order, or leftovers of the training software
    r.only("apply_residual_connection_post_layernorm", False, why="only pre-norm blocks are supported")
    heads, layers = r.size("num_attention_heads", 8), r.layers(default=2)
    dim = r.size("hidden_size", r.size("n_embed", 64))
    return _classic(dim, r.layers("n_layer", layers), r.size("n_head", heads)) | {
        "ffn_dim": 4 * dim,
        "norm_eps": r.number("layer_norm_epsilon", 1e-5),
        "activation": "gelu_tanh",
        "positions": "alibi",
        "embedding_norm": True,
        "max_seq_len": r.optional_size("seq_length"),
        "tie_embeddings": r.flag("tie_word_embeddings", True),
        "dropout": r.dropout("hidden_dropout", "attention_dropout"),
    }


def _classic(dim: int, layers: int, heads: int) -> dict[str, Any]:
    return {"dim": dim, "num_layers": layers, "num_heads": heads, "norm": "layer", "qkv_bias": True, "bias": True}


def qwen1(r: Reader) -> dict[str, Any]:
    """Qwen-1: its dynamic NTK and log-n scaling begin beyond ``seq_length`` only, which becomes the longest text."""
    r.asked |= _QWEN1_ELSEWHERE
    r.only("no_bias", True, why="biases beside those of queries, keys and values are not supported")
    r.only("rotary_pct", 1, why="only full rotary positions (1.0) are supported")
    r.only("scale_attn_weights", True, why="attention is always scaled here")
    heads, dim = r.size("num_attention_heads"), r.size("hidden_size")
    width = r.size("kv_channels", max(1, dim // heads))
    if width * heads != dim:
        r.problems.append(f"kv_channels {width}: hidden_size / num_attention_heads is {dim // heads}")
    return {
        "dim": dim,
        "num_layers": r.layers(),
        "num_heads": heads,
        "ffn_dim": r.size("intermediate_size") // 2,
        "norm_eps": r.number("layer_norm_epsilon", 1e-6),
        "rope_theta": r.number("rotary_emb_base", 1e4),
        "max_seq_len": r.size("seq_length", 2048, 1 << 31),
        "qkv_bias": True,
        "tie_embeddings": r.flag("tie_word_embeddings", False),
        "dropout": r.dropout("attn_dropout_prob", "emb_dropout_prob"),
    }

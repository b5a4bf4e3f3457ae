"""``config.json`` of the supported families to ``ModelConfig``; what is not understood is refused by name."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass, field
from typing import Any

from llmrecipes.convert.families import ARCHITECTURES, READ_ONLY
from llmrecipes.errors import UserError
from llmrecipes.recipe.model_config import Activation, ModelConfig, MoEConfig, RopeScaling

# Keys that every config.json may hold and that change no logits.
_NEUTRAL = {
    "_attn_implementation", "_attn_implementation_internal", "_commit_hash", "_name_or_path", "architectures",
    "auto_map", "bos_token_id", "chunk_size_feed_forward", "decoder_start_token_id", "dtype", "eos_token_id",
    "experts_implementation", "id2label", "initializer_range", "is_decoder", "is_encoder_decoder", "label2id",
    "model_type", "output_attentions", "output_hidden_states", "output_router_logits", "pad_token_id",
    "pretraining_tp", "problem_type", "return_dict", "router_aux_loss_coef", "sep_token_id", "task_specific_params",
    "tokenizer_class", "torch_dtype", "transformers_version", "unk_token_id", "use_cache", "vocab_size",
}  # fmt: skip
# Of Qwen-1: what begins beyond its longest text, and how fast or in which type it is computed.
_QWEN1_ELSEWHERE = {
    "use_dynamic_ntk", "use_logn_attn", "max_position_embeddings", "use_flash_attn", "fp16", "bf16", "fp32",
    "softmax_in_fp32", "onnx_safe", "tokenizer_type", "use_cache_quantization", "use_cache_kernel",
}  # fmt: skip
_ROPE_KEYS: dict[str, tuple[str, ...]] = {
    "default": (),
    "linear": ("factor",),
    "llama3": ("factor", "low_freq_factor", "high_freq_factor", "original_max_position_embeddings"),
}
_SILU = ("silu", "swish")
_GELU: dict[str, Activation] = {
    "gelu": "gelu",
    "gelu_new": "gelu_tanh",
    "gelu_pytorch_tanh": "gelu_tanh",
    "gelu_fast": "gelu_tanh",
}
_THETA = {"mixtral": 1e6}
_EPS = {"mixtral": 1e-5, "olmoe": 1e-5}


@dataclass
class Reader:
    """Hands out the values of a ``config.json`` and remembers which were asked for and what is wrong.

    Attributes:
        hf: the parsed file. asked: keys that were looked at. problems: sentences.
    """

    hf: Mapping[str, Any]
    asked: set[str] = field(default_factory=lambda: set(_NEUTRAL))
    problems: list[str] = field(default_factory=list)

    def get(self, key: str, default: Any = None) -> Any:
        """The value, or ``default`` where it is missing or null."""
        self.asked.add(key)
        value = self.hf.get(key)
        return default if value is None else value

    def size(self, key: str, default: int | None = None) -> int:
        """A whole number above 0 that must be there, or have a default."""
        value = self.get(key, default)
        if isinstance(value, bool) or not isinstance(value, int) or value < 1:
            self.problems.append(f"{key} {value!r}: a whole number above 0 is needed")
            return 1
        return value

    def only(self, key: str, *allowed: Any, why: str) -> None:
        """Refuse a value that the decoder cannot do; a missing or null one is fine."""
        value = self.get(key)
        if value is not None and value not in allowed:
            self.problems.append(f"{key} {value!r}: {why}")

    def dropout(self, *keys: str) -> float:
        """One probability for all places, as the decoder has it."""
        values = {float(self.get(key, 0.0)) for key in keys}
        if len(values) == 1:
            return values.pop()
        self.problems.append(f"{', '.join(keys)} differ: one dropout for all is supported; set them all to 0 or alike")
        return 0.0

    def no_dropout(self, key: str) -> None:
        """Refuse dropout of the attention weights alone."""
        self.only(key, 0, why="dropout of the attention weights alone is not supported; set it to 0")

    def finish(self) -> None:
        """Refuse what was found wrong, and every key that nobody asked for and that says something."""
        # A leading underscore marks what transformers keeps for itself, such as the name a file once had.
        unasked = [key for key in self.hf if key not in self.asked and not key.startswith("_")]
        left = [key for key in unasked if _says_something(self.hf[key])]
        self.problems += [f"{key} {self.hf[key]!r}: not understood; what it does would be lost" for key in left]
        if self.problems:
            raise UserError(*(f"config.json: {problem}" for problem in self.problems))


def _says_something(value: Any) -> bool:
    return value is not None and value is not False and value not in ([], {}, "")


def config_from_hf(hf: Mapping[str, Any]) -> ModelConfig:
    """The decoder that a parsed ``config.json`` (or ``PretrainedConfig.to_dict()``) describes.

    Raises:
        UserError: the architecture or one of its options is not supported; every reason is listed.
    """
    family = str(hf.get("model_type"))
    readers = {"gpt2": _gpt2, "bloom": _bloom, "qwen": _qwen1}
    if family not in ARCHITECTURES and family not in READ_ONLY:
        known = ", ".join((*ARCHITECTURES, *READ_ONLY))
        raise UserError(f"config.json: model_type {family!r} is not supported: use one of {known}")
    reader = Reader(hf)
    values = readers[family](reader) if family in readers else _llama_like(reader, family)
    reader.finish()
    values["init_std"] = hf.get("initializer_range", 0.02)
    try:
        return ModelConfig(vocab_size=reader.size("vocab_size"), **values)
    except ValueError as error:
        raise UserError(*(f"config.json: {problem}" for problem in str(error).split("; "))) from None


def _llama_like(r: Reader, family: str) -> dict[str, Any]:
    """Llama, Mistral, Qwen2, Qwen3, Mixtral, OLMoE, Qwen2-MoE, Qwen3-MoE."""
    theta, scaling = _rope(r, family)
    r.only("hidden_act", *_SILU, why="only 'silu' (SwiGLU) is supported")
    r.no_dropout("attention_dropout")
    heads, dim = r.size("num_attention_heads"), r.size("hidden_size")
    kv_heads = r.size("num_key_value_heads", _kv_heads(family, heads))
    head_dim = r.get("head_dim", 128 if family == "qwen3" else None)
    layers = r.size("num_hidden_layers")
    window, window_layers = _window(r, family, layers)
    qkv_bias = out_bias = (
        bool(r.get("attention_bias", False)) if family not in ("qwen2", "mistral", "mixtral", "qwen2_moe") else False
    )
    if family == "qwen2":
        qkv_bias = True
    if family == "qwen2_moe":
        qkv_bias = bool(r.get("qkv_bias", True))
    bias = bool(r.get("mlp_bias", False)) if family == "llama" else False
    moe = _experts(r, family)
    mixed = family in ("qwen2_moe", "qwen3_moe")
    dense_layers = sorted(r.get("mlp_only_layers", [])) if mixed else []
    every = r.size("decoder_sparse_step", 1) if mixed else 1
    ffn_dim = None if family in ("mixtral", "olmoe") else r.size("intermediate_size")
    if moe is not None and every == 1 and not dense_layers:
        ffn_dim = None
    return {
        "dim": dim,
        "num_layers": layers,
        "num_heads": heads,
        "num_kv_heads": None if kv_heads == heads else kv_heads,
        "head_dim": None if head_dim is None or head_dim * heads == dim else head_dim,
        "ffn_dim": ffn_dim,
        "norm_eps": float(r.get("rms_norm_eps", _EPS.get(family, 1e-6))),
        "rope_theta": theta,
        "rope_scaling": scaling,
        "sliding_window": window,
        "window_layers": window_layers,
        "max_seq_len": r.get("max_position_embeddings"),
        "qkv_bias": qkv_bias,
        "bias": bias,
        "out_bias": None if out_bias == bias else out_bias,
        "qk_norm": family in ("qwen3", "qwen3_moe", "olmoe"),
        "qk_norm_scope": "all" if family == "olmoe" else "head",
        "tie_embeddings": bool(r.get("tie_word_embeddings", False)),
        "moe": moe,
        "moe_every": every,
        "dense_layers": dense_layers or None,
    }


def _kv_heads(family: str, heads: int) -> int:
    """What transformers assumes where config.json is silent."""
    return {"qwen2": 32, "qwen3": 32, "mistral": 8, "mixtral": 8, "qwen2_moe": 16, "qwen3_moe": 4}.get(family, heads)


def _rope(r: Reader, family: str) -> tuple[float, RopeScaling | None]:
    """Base and scaling, from ``rope_parameters`` (transformers 5) or ``rope_theta`` and ``rope_scaling`` (before)."""
    r.asked |= {"rope_scaling", "rope_theta", "rope_parameters"}
    rope = dict(r.get("rope_parameters") or r.get("rope_scaling") or {})
    theta = float(rope.pop("rope_theta", None) or r.get("rope_theta", _THETA.get(family, 1e4)))
    legacy, kind = rope.pop("type", "default"), rope.pop("rope_type", None)
    kind = kind or legacy
    for partial in (rope.pop("partial_rotary_factor", None), r.get("partial_rotary_factor")):
        if partial is not None and float(partial) != 1.0:
            r.problems.append(f"partial_rotary_factor {partial}: only full rotary positions (1.0) are supported")
    names = _ROPE_KEYS.get(kind)
    if names is None:
        r.problems.append(f"rope_type {kind!r}: only 'default', 'linear' and 'llama3' are supported")
        return theta, None
    r.problems += [f"rope_scaling lacks {name}" for name in names if name not in rope]
    extra = [name for name in rope if name not in names and rope[name] is not None]
    # Configurations in memory carry what belongs to other kinds, at no effect.
    if kind == "default":
        extra = [name for name in extra if name != "original_max_position_embeddings"]
    r.problems += [f"rope_scaling.{name} {rope[name]!r}: not understood" for name in extra]
    if kind == "default" or r.problems:
        return theta, None
    if kind == "linear":
        return theta, RopeScaling(kind="linear", factor=float(rope["factor"]))
    return theta, RopeScaling(
        kind="llama3",
        factor=float(rope["factor"]),
        low_freq_factor=float(rope["low_freq_factor"]),
        high_freq_factor=float(rope["high_freq_factor"]),
        original_max_seq_len=int(rope["original_max_position_embeddings"]),
    )


def _window(r: Reader, family: str, layers: int) -> tuple[int | None, list[int] | None]:
    """Sliding window, and the layers that have it (None = all)."""
    if family in ("llama", "olmoe"):
        return None, None  # a key that is there all the same is refused as not understood
    window = r.get("sliding_window", 4096 if family == "mistral" and "sliding_window" not in r.hf else None)
    if family in ("mistral", "mixtral"):
        kinds = r.get("layer_types")
        if kinds is not None and set(kinds) != {"sliding_attention" if window else "full_attention"}:
            r.problems.append(f"layer_types {kinds!r}: {family} has one kind of attention in all layers")
        return window, None
    listed, first = r.get("layer_types"), r.get("max_window_layers", 28)
    if not r.get("use_sliding_window", False):
        if listed is not None and set(listed) != {"full_attention"}:
            r.problems.append("layer_types: sliding attention without use_sliding_window")
        return None, None
    window = window or 4096
    if family == "qwen3_moe":
        return window, None  # transformers gives it to every layer, whatever max_window_layers says
    if listed is None:
        # Qwen2-MoE: every other layer below the first full one.
        slides = [i % 2 == 0 and i < first if family == "qwen2_moe" else i >= first for i in range(layers)]
        listed = ["sliding_attention" if yes else "full_attention" for yes in slides]
    if set(listed) - {"sliding_attention", "full_attention"} or len(listed) != layers:
        r.problems.append(f"layer_types {listed!r}: one of 'sliding_attention', 'full_attention' for each layer")
        return None, None
    where = [i for i, kind in enumerate(listed) if kind == "sliding_attention"]
    if not where:
        return None, None
    return window, None if len(where) == layers else where


def _experts(r: Reader, family: str) -> MoEConfig | None:
    defaults = {
        "mixtral": (8, 2, 0.001), "olmoe": (64, 8, 0.01), "qwen2_moe": (60, 4, 0.001), "qwen3_moe": (128, 8, 0.001)
    }  # fmt: skip
    if family not in defaults:
        return None
    experts, top_k, coef = defaults[family]
    experts = r.size("num_local_experts", r.size("num_experts", experts))
    top_k = r.size("num_experts_per_tok", top_k)
    coef = float(r.get("router_aux_loss_coef", coef))
    r.only("clip_qkv", why="clipping of queries, keys and values is not supported")
    if family == "mixtral":
        r.only("router_jitter_noise", 0, why="noise on the router's input is not supported; set it to 0")
    if family in ("qwen2_moe", "qwen3_moe"):
        width = r.size("moe_intermediate_size", 768 if family == "qwen3_moe" else 1408)
    else:
        width = r.size("intermediate_size")
    shared = r.size("shared_expert_intermediate_size", 5632) if family == "qwen2_moe" else None
    renormalize = True if family == "mixtral" else bool(r.get("norm_topk_prob", False))
    if top_k > experts:
        r.problems.append(f"num_experts_per_tok {top_k}: there are {experts} experts")
        return None
    return MoEConfig(
        num_experts=experts,
        ffn_dim=width,
        top_k=top_k,
        balance_coef=coef,
        renormalize=renormalize,
        shared_ffn_dim=shared,
    )


def _gpt2(r: Reader) -> dict[str, Any]:
    for key in ("summary_type", "summary_use_proj", "summary_activation", "summary_proj_to_labels", "n_ctx",
                "summary_first_dropout", "reorder_and_upcast_attn"):  # fmt: skip
        r.asked.add(key)  # of other heads, or the same mathematics in another order
    r.only("scale_attn_weights", True, why="attention is always scaled here")
    r.only("scale_attn_by_inverse_layer_idx", False, why="not supported")
    r.only("add_cross_attention", False, why="not supported")
    dim = r.size("n_embd", 768)
    act = r.get("activation_function", "gelu_new")
    if act not in _GELU:
        r.problems.append(f"activation_function {act!r}: one of {', '.join(_GELU)} is supported")
    return _classic(dim, r.size("n_layer", 12), r.size("n_head", 12)) | {
        "ffn_dim": r.size("n_inner", 4 * dim),
        "norm_eps": float(r.get("layer_norm_epsilon", 1e-5)),
        "activation": _GELU.get(act, "gelu"),
        "positions": "learned",
        "max_seq_len": r.size("n_positions", 1024),
        "tie_embeddings": bool(r.get("tie_word_embeddings", True)),
        "dropout": r.dropout("resid_pdrop", "embd_pdrop", "attn_pdrop") if "resid_pdrop" in r.hf else 0.0,
    }


def _bloom(r: Reader) -> dict[str, Any]:
    for key in ("slow_but_exact", "attention_softmax_in_fp32", "masked_softmax_fusion", "bias_dropout_fusion",
                "offset_alibi", "skip_bias_add", "skip_bias_add_qkv", "unk_token_id"):  # fmt: skip
        r.asked.add(key)  # the same mathematics in another order, or leftovers of the training software
    r.only("apply_residual_connection_post_layernorm", False, why="only pre-norm blocks are supported")
    heads = r.get("num_attention_heads", 8)
    dim = r.size("hidden_size", r.size("n_embed", 64))
    return _classic(dim, r.size("n_layer", r.get("num_hidden_layers", 2)), r.size("n_head", heads)) | {
        "ffn_dim": 4 * dim,
        "norm_eps": float(r.get("layer_norm_epsilon", 1e-5)),
        "activation": "gelu_tanh",
        "positions": "alibi",
        "embedding_norm": True,
        "max_seq_len": r.get("seq_length"),
        "tie_embeddings": bool(r.get("tie_word_embeddings", True)),
        "dropout": r.dropout("hidden_dropout", "attention_dropout"),
    }


def _classic(dim: int, layers: int, heads: int) -> dict[str, Any]:
    return {"dim": dim, "num_layers": layers, "num_heads": heads, "norm": "layer", "qkv_bias": True, "bias": True}


def _qwen1(r: Reader) -> dict[str, Any]:
    """Qwen-1: its dynamic NTK and log-n scaling begin beyond ``seq_length`` only, which becomes the longest text."""
    r.asked |= _QWEN1_ELSEWHERE
    r.only("no_bias", True, why="biases beside those of queries, keys and values are not supported")
    r.only("rotary_pct", 1, why="only full rotary positions (1.0) are supported")
    r.only("scale_attn_weights", True, why="attention is always scaled here")
    heads, dim = r.size("num_attention_heads"), r.size("hidden_size")
    width = r.get("kv_channels", dim // heads)
    if width * heads != dim:
        r.problems.append(f"kv_channels {width}: hidden_size / num_attention_heads is {dim // heads}")
    return {
        "dim": dim,
        "num_layers": r.size("num_hidden_layers"),
        "num_heads": heads,
        "ffn_dim": r.size("intermediate_size") // 2,
        "norm_eps": float(r.get("layer_norm_epsilon", 1e-6)),
        "rope_theta": float(r.get("rotary_emb_base", 1e4)),
        "max_seq_len": r.size("seq_length", 2048),
        "qkv_bias": True,
        "tie_embeddings": bool(r.get("tie_word_embeddings", False)),
        "dropout": r.dropout("attn_dropout_prob", "emb_dropout_prob"),
    }

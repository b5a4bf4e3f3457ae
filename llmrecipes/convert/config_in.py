"""``config.json`` of the supported families to ``ModelConfig``; what is not understood is refused by name."""

from __future__ import annotations

import math
from collections.abc import Callable, Mapping
from typing import Any

from llmrecipes.convert.config_in_classic import bloom, gpt2, gpt_neox, qwen1, stablelm, starcoder2
from llmrecipes.convert.families import ARCHITECTURES, ATTENTION_BIAS, MLP_BIAS, READ_ONLY, UNSUPPORTED
from llmrecipes.convert.hf_reader import Reader
from llmrecipes.convert.hf_rope import Rope, read_rope, read_scaling
from llmrecipes.errors import UserError
from llmrecipes.recipe.model_config import Activation, ModelConfig
from llmrecipes.recipe.moe_config import MoEConfig

_GATED: dict[str, Activation] = {
    "silu": "swiglu",
    "swish": "swiglu",
    "gelu_pytorch_tanh": "geglu",
    "gelu_new": "geglu",
    "gelu_fast": "geglu",
}
_THETA = {"mixtral": 1e6, "smollm3": 2e6}
_EPS = {"mixtral": 1e-5, "olmoe": 1e-5, "phi3": 1e-5, "olmo2": 1e-5}
_MOST_EXPERTS = 1 << 16
_QK_NORM = {"qwen3": "head", "qwen3_moe": "head", "gemma3_text": "head", "olmoe": "all", "olmo2": "all"}


def config_from_hf(hf: Mapping[str, Any]) -> ModelConfig:
    """The decoder that a parsed ``config.json`` (or ``PretrainedConfig.to_dict()``) describes.

    Raises:
        UserError: the architecture or one of its options is not supported; every reason is listed.
    """
    return read_config(hf)[0]


def read_config(hf: Mapping[str, Any]) -> tuple[ModelConfig, list[str]]:
    """The decoder, and the keys that were left out because they change no logits.

    Raises:
        UserError: the architecture or one of its options is not supported; every reason is listed.
    """
    family = hf.get("model_type")
    if not isinstance(family, str) or (family not in ARCHITECTURES and family not in READ_ONLY):
        known = ", ".join((*ARCHITECTURES, *READ_ONLY))
        why = UNSUPPORTED.get(family) if isinstance(family, str) else None
        because = "" if why is None else f", because {why}"
        raise UserError(f"config.json: model_type {family!r} is not supported{because}: use one of {known}")
    reader = Reader(hf)
    values = _READERS[family](reader) if family in _READERS else _llama_like(reader, family)
    values["init_std"] = reader.number("initializer_range", 0.02)
    size = reader.size("vocab_size", most=1 << 27)
    reader.finish()
    try:
        return ModelConfig(vocab_size=size, **values), reader.left_out()
    except ValueError as error:
        raise UserError(*(f"config.json: {problem}" for problem in str(error).split("; "))) from None


def _llama_like(r: Reader, family: str) -> dict[str, Any]:
    """RMSNorm, a gated feed-forward network and rotary positions: Llama and what came of it."""
    gemma = family in ("gemma", "gemma3_text")
    activation: Activation = "geglu" if gemma else r.word("hidden_act", _GATED, "silu")
    if family != "phi3":
        r.no_dropout("attention_dropout")
    heads, dim = r.size("num_attention_heads"), r.size("hidden_size")
    kv_heads = r.size("num_key_value_heads", _kv_heads(family, heads))
    head_dim = r.optional_size("head_dim", 128 if family == "qwen3" else None)
    if max(heads, kv_heads) * (head_dim or 1) > 1 << 20:
        r.problems.append(
            f"num_attention_heads {heads} x head_dim {head_dim}: more than {1 << 20:,} is surely a mistake"
        )
    layers = r.layers()
    rope = _rope(r, family)
    window, window_layers = _window(r, family, layers)
    qkv_bias = out_bias = r.flag("attention_bias", False) if family in ATTENTION_BIAS else False
    if family == "qwen2":
        qkv_bias = True
    if family == "qwen2_moe":
        qkv_bias = r.flag("qkv_bias", True)
    bias = r.flag("mlp_bias", False) if family in MLP_BIAS else False
    moe = _experts(r, family)
    mixed = family in ("qwen2_moe", "qwen3_moe")
    dense_layers = sorted(r.numbers("mlp_only_layers") or []) if mixed else []
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
        "norm_eps": r.number("rms_norm_eps", _EPS.get(family, 1e-6)),
        "activation": activation,
        **rope.values(),
        "sliding_window": window,
        "window_layers": window_layers,
        "max_seq_len": r.optional_size("max_position_embeddings"),
        "qkv_bias": qkv_bias,
        "bias": bias,
        "out_bias": None if out_bias == bias else out_bias,
        "qk_norm": family in _QK_NORM,
        "qk_norm_scope": _QK_NORM.get(family, "head"),
        "tie_embeddings": r.flag("tie_word_embeddings", gemma or family == "smollm3"),
        "moe": moe,
        "moe_every": every,
        "dense_layers": dense_layers or None,
    } | (_SPECIAL[family](r) if family in _SPECIAL else {})


def _kv_heads(family: str, heads: int) -> int:
    """What transformers assumes where config.json is silent."""
    silent = {"qwen2": 32, "qwen3": 32, "mistral": 8, "mixtral": 8, "qwen2_moe": 16, "qwen3_moe": 4, "gemma": 16}
    return (silent | {"smollm3": 4}).get(family, heads)


def _rope(r: Reader, family: str) -> Rope:
    if family == "phi3":
        r.asked.add("original_max_position_embeddings")
        return read_rope(r, fraction=1.0, old_kinds={"su": "longrope", "yarn": "longrope"})
    if family == "gemma3_text":
        return _gemma3_rope(r)
    return read_rope(r, _THETA.get(family, 1e4))


def _gemma3_rope(r: Reader) -> Rope:
    """Of the layers without a window; the others have a base of their own, which `_gemma3` reads."""
    r.asked |= {"rope_scaling", "rope_parameters", "rope_theta"}
    by_kind = r.hf.get("rope_parameters")
    full = by_kind.get("full_attention") if isinstance(by_kind, dict) else None
    outside = r.hf.get("rope_scaling")
    full = {**(full if isinstance(full, dict) else {}), **(outside if isinstance(outside, dict) else {})}
    part = Reader({key: value for key, value in full.items() if value is not None})
    part.problems = r.problems
    return Rope(part.number("rope_theta", r.number("rope_theta", 1e6)), read_scaling(r, part, {}), 1.0)


def _gemma(r: Reader) -> dict[str, Any]:
    """Gemma 1: norms by 1 + weight, the embedding times sqrt(dim); "gelu" means its tanh form in these files."""
    r.only("hidden_act", "gelu", "gelu_pytorch_tanh", why="Gemma's 'gelu_pytorch_tanh' is supported")
    r.only("hidden_activation", "gelu", "gelu_pytorch_tanh", why="Gemma's 'gelu_pytorch_tanh' is supported")
    r.only("use_bidirectional_attention", False, why="only causal attention is supported")
    scale = math.sqrt(r.size("hidden_size"))
    return {"norm_plus_one": True, "embedding_scale": scale}


def _gemma3(r: Reader) -> dict[str, Any]:
    """Gemma 3 without its image encoder."""
    for key in ("attn_logit_softcapping", "final_logit_softcapping"):
        r.only(key, why="capping by tanh is not supported")
    scalar = r.number("query_pre_attn_scalar", 256.0)
    by_kind = r.hf.get("rope_parameters")
    local = by_kind.get("sliding_attention") if isinstance(by_kind, dict) else None
    local = local if isinstance(local, dict) else {}
    if local.get("rope_type", "default") != "default":
        r.problems.append(f"rope_parameters.sliding_attention {local!r}: only rope_type 'default' is supported")
    part = Reader(local)
    part.problems = r.problems
    theta = part.number("rope_theta", r.number("rope_local_base_freq", 1e4))
    windows = _window(r, "gemma3_text", r.layers())[0]
    return _gemma(r) | {
        "norm_position": "both",
        "attention_scale": scalar**-0.5,
        "window_rope_theta": None if windows is None else theta,
    }


def _smollm3(r: Reader) -> dict[str, Any]:
    """SmolLM3: ``no_rope_layers`` has a 1 for each layer that does rotate."""
    layers, every = r.layers(), r.size("no_rope_layer_interval", 4)
    rotates = r.numbers("no_rope_layers")
    if rotates is None:
        rotates = [int((i + 1) % every != 0) for i in range(layers)]
    if len(rotates) < layers:
        r.problems.append(f"no_rope_layers has {len(rotates)} numbers for {layers} layers")
    return {"nope_layers": [i for i, one in enumerate(rotates[:layers]) if not one] or None}


def _granite(r: Reader) -> dict[str, Any]:
    return {
        "embedding_scale": r.number("embedding_multiplier", 1.0),
        "residual_scale": r.number("residual_multiplier", 1.0),
        "attention_scale": r.number("attention_multiplier", 1.0),
        "logit_divisor": r.number("logits_scaling", 1.0),
    }


def _olmo2(r: Reader) -> dict[str, Any]:
    r.only("clip_qkv", why="clipping of queries, keys and values is not supported")
    return {"norm_position": "post"}


def _phi3(r: Reader) -> dict[str, Any]:
    for key in ("full_attn_mod", "interpolate_factor"):
        r.only(key, 1, why="only 1 is known of this family")
    return {"dropout": r.dropout("resid_pdrop", "embd_pdrop", "attention_dropout")}


_SPECIAL: dict[str, Callable[[Reader], dict[str, Any]]] = {
    "gemma": _gemma,
    "gemma3_text": _gemma3,
    "smollm3": _smollm3,
    "granite": _granite,
    "olmo2": _olmo2,
    "phi3": _phi3,
}
_READERS: dict[str, Callable[[Reader], dict[str, Any]]] = {
    "gpt2": gpt2,
    "bloom": bloom,
    "gpt_neox": gpt_neox,
    "starcoder2": starcoder2,
    "stablelm": stablelm,
    "qwen": qwen1,
}


def _window(r: Reader, family: str, layers: int) -> tuple[int | None, list[int] | None]:
    """Sliding window, and the layers that have it (None = all)."""
    if family in ("llama", "olmoe", "gemma", "olmo2", "granite"):
        # A window that is there all the same is refused as not understood.
        kinds = r.get("layer_types")
        if kinds is not None and kinds != ["full_attention"] * layers:
            r.problems.append(f"layer_types {kinds!r}: {family} has no sliding window")
        return None, None
    r.asked.add("sliding_window")
    idle = family not in ("mistral", "mixtral", "phi3", "gemma3_text") and r.hf.get("use_sliding_window") in (
        None,
        False,
    )
    # Without use_sliding_window its value says nothing: Qwen2-MoE in memory has 0.
    window = None if idle else r.optional_size("sliding_window", _silent_window(r, family))
    listed = r.numbers("layer_types", str)
    if family in ("mistral", "mixtral", "phi3"):
        if listed is not None and set(listed) != {"sliding_attention" if window else "full_attention"}:
            r.problems.append(f"layer_types {listed!r}: {family} has one kind of attention in all layers")
        return window, None
    if family == "gemma3_text":
        pattern = r.size("sliding_window_pattern", r.size("_sliding_window_pattern", 6))
        if listed is None:
            listed = ["sliding_attention" if (i + 1) % pattern else "full_attention" for i in range(layers)]
        return _listed_windows(r, window, listed, layers)
    first = r.get("max_window_layers", 28)
    if not r.flag("use_sliding_window", False):
        if listed is not None and set(listed) != {"full_attention"}:
            r.problems.append("layer_types: sliding attention without use_sliding_window")
        return None, None
    if family == "qwen3_moe":
        return window or 4096, None  # transformers gives it to every layer, whatever max_window_layers says
    if family == "smollm3":
        if listed is None:
            nope = (_smollm3(r)["nope_layers"] or []) if window else []
            listed = ["sliding_attention" if i in nope else "full_attention" for i in range(layers)]
        return _listed_windows(r, window, listed, layers)
    if not isinstance(first, int) or isinstance(first, bool):
        r.problems.append(f"max_window_layers {first!r}: a whole number is needed")
        return None, None
    if listed is None:
        # Qwen2-MoE: every other layer below the first full one.
        slides = [i % 2 == 0 and i < first if family == "qwen2_moe" else i >= first for i in range(layers)]
        listed = ["sliding_attention" if yes else "full_attention" for yes in slides]
    return _listed_windows(r, window or 4096, listed, layers)


def _silent_window(r: Reader, family: str) -> int | None:
    """What transformers assumes where config.json has no such key."""
    return 4096 if family in ("mistral", "gemma3_text") and "sliding_window" not in r.hf else None


def _listed_windows(
    r: Reader, window: int | None, listed: list[str], layers: int
) -> tuple[int | None, list[int] | None]:
    if set(listed) - {"sliding_attention", "full_attention"} or len(listed) != layers:
        r.problems.append(f"layer_types {listed!r}: one of 'sliding_attention', 'full_attention' for each layer")
        return None, None
    where = [i for i, kind in enumerate(listed) if kind == "sliding_attention"]
    if not where:
        return None, None
    if window is None:
        r.problems.append("layer_types: sliding attention without sliding_window")
    return window, None if len(where) == layers else where


def _experts(r: Reader, family: str) -> MoEConfig | None:
    defaults = {
        "mixtral": (8, 2, 0.001), "olmoe": (64, 8, 0.01), "qwen2_moe": (60, 4, 0.001), "qwen3_moe": (128, 8, 0.001)
    }  # fmt: skip
    if family not in defaults:
        return None
    experts, top_k, coef = defaults[family]
    experts = r.size("num_local_experts", r.size("num_experts", experts, _MOST_EXPERTS), _MOST_EXPERTS)
    top_k = r.size("num_experts_per_tok", top_k)
    coef = r.number("router_aux_loss_coef", coef, least=0.0)
    r.only("clip_qkv", why="clipping of queries, keys and values is not supported")
    if family == "mixtral":
        r.only("router_jitter_noise", 0, why="noise on the router's input is not supported; set it to 0")
    if family in ("qwen2_moe", "qwen3_moe"):
        width = r.size("moe_intermediate_size", 768 if family == "qwen3_moe" else 1408)
    else:
        width = r.size("intermediate_size")
    shared = r.size("shared_expert_intermediate_size", 5632) if family == "qwen2_moe" else None
    renormalize = True if family == "mixtral" else r.flag("norm_topk_prob", False)
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

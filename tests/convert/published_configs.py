"""``config.json`` of published models, as far as it says something: of many families, with all that is left in them."""

from __future__ import annotations

_LLAMA = {
    "architectures": ["LlamaForCausalLM"], "model_type": "llama", "attention_bias": False, "attention_dropout": 0.0,
    "hidden_act": "silu", "initializer_range": 0.02, "mlp_bias": False, "pretraining_tp": 1, "rms_norm_eps": 1e-5,
    "rope_scaling": None, "rope_theta": 10000.0, "tie_word_embeddings": False, "torch_dtype": "bfloat16",
    "transformers_version": "4.43.0", "use_cache": True, "bos_token_id": 1, "eos_token_id": 2,
}  # fmt: skip


def _sizes(vocab, dim, inner, layers, heads, kv_heads=None, longest=4096, **more):
    return {
        "vocab_size": vocab, "hidden_size": dim, "intermediate_size": inner, "num_hidden_layers": layers,
        "num_attention_heads": heads, "num_key_value_heads": kv_heads or heads, "max_position_embeddings": longest,
        **more,
    }  # fmt: skip


def _without(config, *names):
    return {key: value for key, value in config.items() if key not in names}


_LLAMA3 = {
    "factor": 8.0, "high_freq_factor": 4.0, "low_freq_factor": 1.0, "original_max_position_embeddings": 8192,
    "rope_type": "llama3",
}  # fmt: skip
_MISTRAL = _without(_LLAMA, "attention_bias", "mlp_bias", "pretraining_tp", "rope_scaling") | {"model_type": "mistral"}
_MISTRAL_7B = _MISTRAL | _sizes(32000, 4096, 14336, 32, 32, 8, 32768, sliding_window=4096)
_QWEN2 = _without(_MISTRAL, "bos_token_id") | {
    "model_type": "qwen2", "rms_norm_eps": 1e-6, "rope_theta": 1e6, "sliding_window": 32768, "max_window_layers": 21,
    "use_sliding_window": False, "use_mrope": False,
}  # fmt: skip
_MIXTRAL = _MISTRAL | {
    "model_type": "mixtral", "num_experts_per_tok": 2, "num_local_experts": 8, "output_router_logits": False,
    "router_aux_loss_coef": 0.02, "sliding_window": None, "rope_theta": 1e6, "router_jitter_noise": 0.0,
}  # fmt: skip
_NEOX = {
    "architectures": ["GPTNeoXForCausalLM"], "model_type": "gpt_neox", "hidden_act": "gelu", "initializer_range": 0.02,
    "layer_norm_eps": 1e-5, "rotary_emb_base": 10000, "tie_word_embeddings": False, "use_cache": True,
    "torch_dtype": "float16", "bos_token_id": 1, "eos_token_id": 0, "classifier_dropout": 0.1,
}  # fmt: skip
_NEOX_2816 = _without(_sizes(52096, 2816, 11264, 36, 22, longest=2048), "num_key_value_heads")
_GPT2 = {
    "activation_function": "gelu_new", "architectures": ["GPT2LMHeadModel"], "attn_pdrop": 0.1, "bos_token_id": 1,
    "embd_pdrop": 0.1, "eos_token_id": 2, "gradient_checkpointing": False, "initializer_range": 0.02,
    "layer_norm_epsilon": 1e-5, "model_type": "gpt2", "n_ctx": 1024, "n_embd": 1024, "n_head": 16, "n_inner": 4096,
    "n_layer": 24, "n_positions": 1024, "output_past": True, "resid_pdrop": 0.1, "summary_activation": None,
    "summary_first_dropout": 0.1, "summary_proj_to_labels": True, "summary_type": "cls_index", "summary_use_proj": True,
    "task_specific_params": {"text-generation": {"do_sample": True, "max_length": 50}}, "vocab_size": 32000,
}  # fmt: skip
_STABLELM = {
    "architectures": ["StableLmForCausalLM"], "model_type": "stablelm", "hidden_act": "silu", "initializer_range": 0.02,
    "layer_norm_eps": 1e-5, "rope_theta": 10000, "tie_word_embeddings": False, "use_cache": True, "bos_token_id": 0,
    "eos_token_id": 0, "partial_rotary_factor": 0.25, "torch_dtype": "bfloat16", "attention_dropout": 0.0,
}  # fmt: skip
_PHI3 = {
    "_name_or_path": "Phi-3-mini", "architectures": ["Phi3ForCausalLM"], "attention_dropout": 0.0,
    "auto_map": {"AutoConfig": "configuration_phi3.Phi3Config"}, "bos_token_id": 1, "embd_pdrop": 0.0,
    "eos_token_id": 32000, "hidden_act": "silu", "initializer_range": 0.02, "model_type": "phi3",
    "original_max_position_embeddings": 4096, "pad_token_id": 32000, "resid_pdrop": 0.0, "rms_norm_eps": 1e-5,
    "rope_scaling": None, "rope_theta": 10000.0, "tie_word_embeddings": False, "torch_dtype": "bfloat16",
    "use_cache": True, "attention_bias": False,
}  # fmt: skip
_GEMMA = {
    "architectures": ["GemmaForCausalLM"], "attention_bias": False, "attention_dropout": 0.0, "bos_token_id": 2,
    "eos_token_id": 1, "head_dim": 256, "hidden_act": "gelu", "hidden_activation": None, "initializer_range": 0.02,
    "model_type": "gemma", "pad_token_id": 0, "rms_norm_eps": 1e-6, "rope_scaling": None, "rope_theta": 10000.0,
    "torch_dtype": "bfloat16", "use_cache": True,
}  # fmt: skip
_GEMMA3 = {
    "architectures": ["Gemma3ForCausalLM"], "attention_bias": False, "attention_dropout": 0.0,
    "attn_logit_softcapping": None, "bos_token_id": 2, "cache_implementation": "hybrid", "eos_token_id": [1, 106],
    "final_logit_softcapping": None, "head_dim": 256, "hidden_activation": "gelu_pytorch_tanh",
    "initializer_range": 0.02,
    "model_type": "gemma3_text", "pad_token_id": 0, "query_pre_attn_scalar": 256, "rms_norm_eps": 1e-6,
    "rope_local_base_freq": 10000, "rope_scaling": None, "rope_theta": 1000000, "sliding_window": 512,
    "sliding_window_pattern": 6, "torch_dtype": "bfloat16", "use_cache": True,
}  # fmt: skip
_FACTORS = [1.0 + 0.25 * i for i in range(48)]

# What comes in, and the number of its parameters where the model's card or paper is exact about it (None elsewhere).
READ = {
    "SmolLM2-135M": (
        _LLAMA | _sizes(49152, 576, 1536, 30, 9, 3, 8192, tie_word_embeddings=True, rope_theta=100000)
        | {"is_llama_config": True, "rope_interleaved": False,
           "transformers.js_config": {"kv_cache_dtype": {"q4f16": "float16"}}}, 134_515_008),
    "Llama-3.1-8B": (
        _LLAMA | _sizes(128256, 4096, 14336, 32, 32, 8, 131072, rope_theta=5e5, rope_scaling=_LLAMA3), 8_030_261_248),
    "Llama-3.2-1B": (
        _LLAMA | _sizes(128256, 2048, 8192, 16, 32, 8, 131072, rope_theta=5e5, head_dim=64, tie_word_embeddings=True,
                        rope_scaling=_LLAMA3 | {"factor": 32.0}), 1_235_814_400),
    "TinyLlama-1.1B": (_LLAMA | _sizes(32000, 2048, 5632, 22, 32, 4, 2048), 1_100_048_384),
    "llm-jp-3-1.8b": (_LLAMA | _sizes(99584, 2048, 7168, 24, 16, 16, head_dim=128), None),
    "sarashina2-7b": (_LLAMA | _sizes(102400, 4096, 11008, 32, 32), None),
    "Swallow-7b": (_LLAMA | _sizes(43176, 4096, 11008, 32, 32), None),
    "calm2-7b": (_LLAMA | _sizes(65024, 4096, 11008, 32, 32, longest=32768, rope_theta=5e5), None),
    "deepseek-coder-6.7b (linear)": (
        _LLAMA | _sizes(32256, 4096, 11008, 32, 32, longest=16384, rope_theta=1e5,
                        rope_scaling={"factor": 4.0, "type": "linear"}), None),
    "a Llama with dynamic NTK": (
        _LLAMA | _sizes(32000, 4096, 11008, 32, 32, rope_scaling={"factor": 2.0, "type": "dynamic"}), None),
    "Yarn-Llama-2-7b": (
        _LLAMA | _sizes(32000, 4096, 11008, 32, 32, longest=65536,
                        rope_scaling={"factor": 16.0, "original_max_position_embeddings": 4096, "type": "yarn",
                                      "finetuned": True}), None),
    "Mistral-7B-v0.1": (_MISTRAL_7B, 7_241_732_096),
    "Mistral-7B-v0.3": (_MISTRAL_7B | {"vocab_size": 32768, "sliding_window": None, "rope_theta": 1e6}, 7_248_023_552),
    "Mistral-Nemo": (
        _MISTRAL | _sizes(131072, 5120, 14336, 40, 32, 8, 1024000, head_dim=128, sliding_window=None), 12_247_782_400),
    "japanese-stablelm-base-gamma-7b": (_MISTRAL_7B, 7_241_732_096),
    "Qwen2.5-0.5B": (_QWEN2 | _sizes(151936, 896, 4864, 24, 14, 2, 32768, tie_word_embeddings=True), 494_032_768),
    "Qwen2.5-7B (yarn)": (
        _QWEN2 | _sizes(152064, 3584, 18944, 28, 28, 4, 32768, rope_scaling={
            "factor": 4.0, "original_max_position_embeddings": 32768, "type": "yarn"}), 7_615_616_512),
    "Qwen3-0.6B": (
        _QWEN2 | _sizes(151936, 1024, 3072, 28, 16, 8, 40960, head_dim=128, tie_word_embeddings=True)
        | {"model_type": "qwen3", "sliding_window": None, "layer_types": ["full_attention"] * 28}, 596_049_920),
    "Qwen3-30B-A3B": (
        _QWEN2 | _sizes(151936, 2048, 6144, 48, 32, 4, 40960, head_dim=128)
        | {"model_type": "qwen3_moe", "sliding_window": None, "decoder_sparse_step": 1, "mlp_only_layers": [],
           "moe_intermediate_size": 768, "norm_topk_prob": True, "num_experts": 128, "num_experts_per_tok": 8,
           "output_router_logits": False, "router_aux_loss_coef": 0.001}, 30_532_122_624),
    "Mixtral-8x7B": (_MIXTRAL | _sizes(32000, 4096, 14336, 32, 32, 8, 32768), 46_702_792_704),
    "Mixtral-8x22B": (_MIXTRAL | _sizes(32768, 6144, 16384, 56, 48, 8, 65536), 140_630_071_296),
    "OLMoE-1B-7B": (
        _without(_LLAMA, "pretraining_tp", "mlp_bias") | _sizes(50304, 2048, 1024, 16, 16)
        | {"model_type": "olmoe", "clip_qkv": None, "norm_topk_prob": False, "num_experts": 64,
            "num_experts_per_tok": 8,
           "output_router_logits": False, "router_aux_loss_coef": 0.01}, 6_919_161_856),
    "japanese-gpt-neox-3.6b": (
        _NEOX | _NEOX_2816 | {"vocab_size": 32000, "rotary_pct": 1.0, "use_parallel_residual": False}, None),
    "open-calm-3b": (_NEOX | _NEOX_2816 | {"rotary_pct": 1.0, "use_parallel_residual": False}, None),
    "pythia-160m": (
        _NEOX | _without(_sizes(50304, 768, 3072, 12, 12, longest=2048), "num_key_value_heads")
        | {"rotary_pct": 0.25, "use_parallel_residual": True}, 162_322_944),
    "japanese-gpt2-medium": (_GPT2, None),
    "gpt2": (
        _without(_GPT2, "n_inner") | {"n_embd": 768, "n_head": 12, "n_layer": 12, "vocab_size": 50257},
        124_439_808),
    "bloom-560m": (
        {"apply_residual_connection_post_layernorm": False, "attention_dropout": 0.0, "attention_softmax_in_fp32": True,
         "bias_dropout_fusion": True, "hidden_dropout": 0.0, "initializer_range": 0.02, "layer_norm_epsilon": 1e-5,
         "masked_softmax_fusion": True, "model_type": "bloom", "n_embed": 1024, "n_inner": None, "n_layer": 24,
         "num_attention_heads": 16, "offset_alibi": 100, "pretraining_tp": 1, "skip_bias_add": True,
         "skip_bias_add_qkv": False, "unk_token_id": 0, "use_cache": True, "vocab_size": 250880}, 559_214_592),
    "japanese-stablelm-3b-4e1t": (_STABLELM | _sizes(50304, 2560, 6912, 32, 32), 2_795_443_200),
    "stablelm-2-1_6b": (
        _STABLELM | _sizes(100352, 2048, 5632, 24, 32, use_qkv_bias=True, qk_layernorm=False,
                           use_parallel_residual=False), 1_644_515_328),
    "Phi-3-mini-4k": (_PHI3 | _sizes(32064, 3072, 8192, 32, 32, sliding_window=2047), 3_821_079_552),
    "Phi-3-mini-128k": (
        _PHI3 | _sizes(32064, 3072, 8192, 32, 32, longest=131072, sliding_window=262144, rope_scaling={
            "type": "longrope", "short_factor": _FACTORS, "long_factor": _FACTORS[::-1]}), 3_821_079_552),
    "Phi-4-mini": (
        _PHI3 | _sizes(200064, 3072, 8192, 32, 24, 8, 131072, sliding_window=262144, tie_word_embeddings=True,
                       partial_rotary_factor=0.75, rope_scaling={
                           "type": "longrope", "short_factor": _FACTORS, "long_factor": _FACTORS[::-1]})
        | {"full_attn_mod": 1, "interpolate_factor": 1, "lm_head_bias": False, "mlp_bias": False}, 3_836_021_760),
    "gemma-2b": (_GEMMA | _sizes(256000, 2048, 16384, 18, 8, 1, 8192), 2_506_172_416),
    "gemma-3-1b": (_GEMMA3 | _sizes(262144, 1152, 6912, 26, 4, 1, 32768), 999_885_952),
    "gemma-3-270m": (
        _GEMMA3 | _sizes(262144, 640, 2048, 18, 4, 1, 32768) | {
            "_sliding_window_pattern": 6, "use_bidirectional_attention": False,
            "layer_types": (["sliding_attention"] * 5 + ["full_attention"]) * 3}, 268_098_176),
    "OLMo-2-1B": (
        _without(_LLAMA, "pretraining_tp", "mlp_bias") | _sizes(100352, 2048, 8192, 16, 16, rope_theta=5e5,
            rms_norm_eps=1e-6)
        | {"model_type": "olmo2"}, 1_484_916_736),
    "starcoder2-3b": (
        {"activation_function": "gelu", "architectures": ["Starcoder2ForCausalLM"], "attention_dropout": 0.1,
         "attention_softmax_in_fp32": True, "bos_token_id": 0, "embedding_dropout": 0.1, "eos_token_id": 0,
         "hidden_act": "gelu_pytorch_tanh", "initializer_range": 0.018042195912175804, "layer_norm_epsilon": 1e-5,
         "mlp_type": "default", "model_type": "starcoder2", "norm_epsilon": 1e-5, "norm_type": "layer_norm",
         "residual_dropout": 0.1, "rope_theta": 999999.4420358813, "scale_attention_softmax_in_fp32": True,
         "scale_attn_weights": True, "sliding_window": 4096, "use_bias": True, "use_cache": True}
        | _sizes(49152, 3072, 12288, 30, 24, 2, 16384), 3_030_371_328),
    "SmolLM3-3B": (
        _without(_LLAMA, "pretraining_tp") | _sizes(128256, 2048, 11008, 36, 16, 4, 65536, tie_word_embeddings=True)
        | {"model_type": "smollm3", "layer_types": ["full_attention"] * 36, "max_window_layers": 28,
           "no_rope_layer_interval": 4, "no_rope_layers": [1, 1, 1, 0] * 9, "rms_norm_eps": 1e-6, "rope_theta": 5e6,
           "sliding_window": None, "use_sliding_window": False}, 3_075_098_624),
    "granite-3.1-2b": (
        _without(_LLAMA, "pretraining_tp") | _sizes(49155, 2048, 8192, 40, 32, 8, 131072, tie_word_embeddings=True)
        | {"model_type": "granite", "attention_multiplier": 0.015625, "embedding_multiplier": 12.0,
            "logits_scaling": 8.0,
           "residual_multiplier": 0.22, "attention_dropout": 0.0, "rope_theta": 5e6}, 2_533_531_648),
}  # fmt: skip

# What is refused, and the sentence's beginning after "config.json: ".
REFUSED = {
    "phi-2": ({"model_type": "phi"}, "model_type 'phi' is not supported, because one norm feeds"),
    "gpt-j-6b": ({"model_type": "gptj"}, "model_type 'gptj' is not supported, because one norm feeds"),
    "falcon-7b": ({"model_type": "falcon"}, "model_type 'falcon' is not supported, because one norm feeds"),
    "c4ai-command-r": ({"model_type": "cohere"}, "model_type 'cohere' is not supported, because one norm feeds"),
    "OLMo-1B": ({"model_type": "olmo"}, "model_type 'olmo' is not supported, because its norms have no weights"),
    "gemma-2-2b": ({"model_type": "gemma2"}, "model_type 'gemma2' is not supported, because scores and logits are cap"),
    "gemma-3-4b": ({"model_type": "gemma3"}, "model_type 'gemma3' is not supported, because it holds an encoder of im"),
    "DeepSeek-V2-Lite": ({"model_type": "deepseek_v2"}, "model_type 'deepseek_v2' is not supported, because keys and"),
    "DeepSeek-V3": ({"model_type": "deepseek_v3"}, "model_type 'deepseek_v3' is not supported, because keys and value"),
    "gpt-oss-20b": ({"model_type": "gpt_oss"}, "model_type 'gpt_oss' is not supported, because attention has sinks"),
    "opt-125m": ({"model_type": "opt"}, "model_type 'opt' is not supported, because its activation is ReLU"),
    "mamba-130m": ({"model_type": "mamba"}, "model_type 'mamba' is not supported, because it has no attention"),
    "plamo-13b": ({"model_type": "plamo"}, "model_type 'plamo' is not supported, because its code is not in"),
    "t5-small": ({"model_type": "t5"}, "model_type 't5' is not supported, because it is an encoder and a decoder"),
    "a file without model_type": ({"hidden_size": 64}, "model_type None is not supported: use one of llama"),
    "stablelm-2-12b": (
        _STABLELM | _sizes(100352, 5120, 13824, 40, 32, 8, qk_layernorm=True, use_parallel_residual=True),
        "qk_layernorm True: a norm of its own for each head's queries and keys is not supported"),
    "Llama-2-7B-GPTQ": (
        _LLAMA | _sizes(32000, 4096, 11008, 32, 32, quantization_config={"bits": 4, "quant_method": "gptq"}),
        "quantization_config: quantized weights are not read; save them in bfloat16 first"),
    "Qwen2-VL's positions": (
        _QWEN2 | _sizes(151936, 1536, 8960, 28, 12, 2, rope_scaling={"type": "mrope", "mrope_section": [16, 24, 24]}),
        "rope_type 'mrope': one of default, linear, dynamic, llama3, yarn, longrope is supported"),
    "a Llama with a factor nobody knows": (
        _LLAMA | _sizes(32000, 4096, 11008, 32, 32, mup_scale=4.0),
        "mup_scale 4.0: not understood; what it does would"),
    "ReLU in a Llama": (
        _LLAMA | _sizes(32000, 4096, 11008, 32, 32, hidden_act="relu"), "hidden_act 'relu': one of silu, swish, gelu_"),
    "noise on Mixtral's router": (
        _MIXTRAL | _sizes(32000, 4096, 14336, 32, 32, 8, router_jitter_noise=0.1),
        "router_jitter_noise 0.1: noise on the"),
    "clipped OLMoE": (
        _MIXTRAL | _sizes(50304, 2048, 1024, 16, 16, clip_qkv=8.0) | {"model_type": "olmoe"},
        "clip_qkv 8.0: clipping of"),
}  # fmt: skip


def shrunk(hf: dict) -> dict:
    """The same options with sizes that take no time; kinds of layers and factors of angles cut to fit."""
    few = {"num_hidden_layers": 6, "n_layer": 6, "hidden_size": 64, "n_embed": 64, "n_embd": 64,
        "intermediate_size": 96,
           "moe_intermediate_size": 24, "vocab_size": 120, "num_attention_heads": 4, "n_head": 4, "num_experts": 6,
           "num_local_experts": 4, "num_experts_per_tok": 2, "head_dim": 16, "sliding_window": 20, "n_inner": 96,
           "query_pre_attn_scalar": 24, "max_window_layers": 3}  # fmt: skip
    small = hf | {key: value for key, value in few.items() if hf.get(key) is not None}
    small |= dict.fromkeys(("bos_token_id", "eos_token_id", "pad_token_id"))
    if "num_key_value_heads" in hf:
        small["num_key_value_heads"] = 4 if hf["num_key_value_heads"] == hf["num_attention_heads"] else 2
    for key in ("layer_types", "no_rope_layers"):
        if key in hf:
            small[key] = hf[key][:6]
    scaling = dict(hf.get("rope_scaling") or {})
    for key in ("short_factor", "long_factor"):
        if key in scaling:
            scaling[key] = scaling[key][: int(16 * hf.get("partial_rotary_factor", 1.0)) // 2]
    return small | ({"rope_scaling": scaling} if scaling else {})

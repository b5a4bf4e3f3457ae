"""Which tensor of a Hugging Face checkpoint is which part of ours: one list of parts for every family.

Ours are fused where a fused product is faster (query, key and value; gate and up) and stacked over experts; theirs are
separate, or laid out differently. A :class:`Part` says which rows of ours one of theirs is.
"""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import dataclass
from typing import Literal

import torch
from torch import Tensor

from llmrecipes.convert.families import hf_family
from llmrecipes.models import Decoder
from llmrecipes.recipe.model_config import ModelConfig

Layout = Literal["same", "transposed", "by_head"]


@dataclass(frozen=True)
class Part:
    """One of their tensors.

    Attributes:
        theirs: its name, as files have it. ours: the tensor of ours that it is a part of.
        expert: index in the first dimension of ours; None = there are no experts, or all.
        begin, end: rows of ours; None = to the last.
        layout: how the rows stand in theirs: the ``same``; ``transposed`` (GPT-2's ``Conv1D``); or ``by_head``
            (BLOOM, GPT-NeoX: query, key and value of the first head, then of the second, ...).
        heads: of ``by_head``.
        factor: theirs is so many times ours.
    """

    theirs: str
    ours: str
    expert: int | None = None
    begin: int = 0
    end: int | None = None
    layout: Layout = "same"
    heads: int = 1
    factor: float = 1.0

    def to_theirs(self, rows: Tensor) -> Tensor:
        """Their tensor from the rows of ours."""
        rows = rows if self.factor == 1 else rows * self.factor
        if self.layout == "transposed":
            return rows.t() if rows.ndim == 2 else rows
        if self.layout == "by_head":
            return rows.unflatten(0, (3, self.heads, -1)).transpose(0, 1).flatten(0, 2)
        return rows

    def to_ours(self, tensor: Tensor) -> Tensor:
        """The rows of ours from their tensor."""
        tensor = tensor if self.factor == 1 else tensor / self.factor
        if self.layout == "transposed":
            return tensor.t() if tensor.ndim == 2 else tensor
        if self.layout == "by_head":
            return tensor.unflatten(0, (self.heads, 3, -1)).transpose(0, 1).flatten(0, 2)
        return tensor

    def rows_of(self, ours: Tensor) -> Tensor:
        """The rows that this part is, of the whole tensor: a view."""
        return (ours if self.expert is None else ours[self.expert])[self.begin : self.end]


def our_shapes(config: ModelConfig) -> dict[str, torch.Size]:
    """Names and shapes of a decoder's state, without its memory."""
    with torch.device("meta"):
        return {name: tensor.shape for name, tensor in Decoder(config).state_dict().items()}


def has_no_twin(name: str) -> bool:
    """Whether a tensor of ours exists nowhere else: a router's balancing bias."""
    return name.endswith(("mlp.gate.bias", ".router.bias"))


def parts(config: ModelConfig, source: str | None = None, fused: bool = False) -> list[Part]:
    """All tensors of the Hugging Face twin of a decoder.

    Args:
        config: the decoder.
        source: the family whose names are meant; None = the one that `hf_family` finds.
        fused: names of the module in memory (transformers 5), not of files: experts stacked, one name for every head.
    """
    family = source or hf_family(config)
    if family == "gpt2":
        return list(_gpt2(config))
    if family == "bloom":
        return list(_bloom(config))
    if family == "qwen":
        return list(_qwen1(config))
    if family == "gpt_neox":
        return list(_gpt_neox(config, fused))
    return list(_llama_like(config, family, fused))


def _linear(
    ours: str, theirs: tuple[str, ...], sizes: tuple[int, ...], bias: bool, layout: Layout = "same"
) -> Iterator[Part]:
    """Maps of theirs whose rows stand below each other in one of ours."""
    for kind in ("weight", "bias") if bias else ("weight",):
        begin = 0
        for name, size in zip(theirs, sizes, strict=True):
            yield Part(f"{name}.{kind}", f"{ours}.{kind}", None, begin, begin + size, layout)
            begin += size


def _norm(ours: str, theirs: str, bias: bool = False) -> Iterator[Part]:
    for kind in ("weight", "bias") if bias else ("weight",):
        yield Part(f"{theirs}.{kind}", f"{ours}.{kind}")


def _outside(
    config: ModelConfig, embedding: str, norm: str, bias: bool = False, head: str = "lm_head"
) -> Iterator[Part]:
    """Embedding, last norm and head; rows that only pad the vocabulary have no twin."""
    yield Part(f"{embedding}.weight", "embed.weight", end=config.vocab_size)
    yield from _norm("norm", norm, bias)
    if not config.tie_embeddings:
        yield Part(f"{head}.weight", "head.weight", end=config.vocab_size)


def _llama_like(config: ModelConfig, family: str, fused: bool) -> Iterator[Part]:
    """Llama and all that keep its names: with other norms (OLMo 2, Gemma 3), or fused as ours (Phi-3)."""
    bias = config.norm == "layer"
    yield from _outside(config, "model.embed_tokens", "model.norm", bias)
    for i in range(config.num_layers):
        us, them = f"layers.{i}", f"model.layers.{i}"
        for ours, theirs in _block_norms(config):
            yield from _norm(f"{us}.{ours}", f"{them}.{theirs}", bias)
        yield from _attention(config, us, them, whole=family == "phi3")
        if config.is_moe_layer(i):
            yield from _experts(config, us, them, family, fused)
        else:
            yield from _feed_forward(config, us, them, whole=family == "phi3")


def _block_norms(config: ModelConfig) -> list[tuple[str, str]]:
    if config.norm_position == "post":
        return [("attention_norm", "post_attention_layernorm"), ("mlp_norm", "post_feedforward_layernorm")]
    if config.norm_position == "pre":
        return [("attention_norm", "input_layernorm"), ("mlp_norm", "post_attention_layernorm")]
    return [
        ("attention_norm", "input_layernorm"),
        ("attention_post_norm", "post_attention_layernorm"),
        ("mlp_norm", "pre_feedforward_layernorm"),
        ("mlp_post_norm", "post_feedforward_layernorm"),
    ]


def _attention(config: ModelConfig, us: str, them: str, whole: bool) -> Iterator[Part]:
    q, kv = config.num_heads * config.head_width, config.kv_heads * config.head_width
    if whole:
        yield Part(f"{them}.self_attn.qkv_proj.weight", f"{us}.attention.qkv.weight")
    else:
        projections = tuple(f"{them}.self_attn.{x}_proj" for x in "qkv")
        yield from _linear(f"{us}.attention.qkv", projections, (q, kv, kv), config.qkv_bias)
    yield from _linear(f"{us}.attention.out", (f"{them}.self_attn.o_proj",), (config.dim,), config.has_out_bias)
    if config.qk_norm:
        yield from _norm(f"{us}.attention.q_norm", f"{them}.self_attn.q_norm")
        yield from _norm(f"{us}.attention.k_norm", f"{them}.self_attn.k_norm")


def _feed_forward(config: ModelConfig, us: str, them: str, whole: bool) -> Iterator[Part]:
    ffn = config.ffn_dim or 0
    if config.maps_in == 1:
        yield from _linear(f"{us}.mlp.up", (f"{them}.mlp.c_fc",), (ffn,), config.bias)
        yield from _linear(f"{us}.mlp.down", (f"{them}.mlp.c_proj",), (config.dim,), config.bias)
        return
    maps = (f"{them}.mlp.gate_up_proj",) if whole else (f"{them}.mlp.gate_proj", f"{them}.mlp.up_proj")
    yield from _linear(f"{us}.mlp.gate_up", maps, (2 * ffn,) if whole else (ffn, ffn), config.bias)
    yield from _linear(f"{us}.mlp.down", (f"{them}.mlp.down_proj",), (config.dim,), config.bias)


def _experts(config: ModelConfig, us: str, them: str, family: str, fused: bool) -> Iterator[Part]:
    assert config.moe is not None
    ffn, shared = config.moe.ffn_dim, config.moe.shared_ffn_dim
    # No family has a place for it: it goes into what it multiplies.
    scaling = config.moe.routed_scaling_factor
    block = f"{them}.{'block_sparse_moe' if family == 'mixtral' and not fused else 'mlp'}"
    gate, up, down = ("w1", "w3", "w2") if family == "mixtral" else ("gate_proj", "up_proj", "down_proj")
    yield Part(f"{block}.gate.weight", f"{us}.mlp.gate.weight")
    if shared is not None:
        yield Part(f"{block}.shared_expert_gate.weight", f"{us}.mlp.shared_gate.weight")
        halves = tuple(f"{block}.shared_expert.{name}_proj" for name in ("gate", "up"))
        yield from _linear(f"{us}.mlp.shared.gate_up", halves, (shared, shared), bias=False)
        yield Part(f"{block}.shared_expert.down_proj.weight", f"{us}.mlp.shared.down.weight")
    if fused:
        yield Part(f"{block}.experts.gate_up_proj", f"{us}.mlp.experts.gate_up_proj")
        yield Part(f"{block}.experts.down_proj", f"{us}.mlp.experts.down_proj", factor=scaling)
        return
    for e in range(config.layer_experts[0]):
        expert = f"{block}.experts.{e}"
        yield Part(f"{expert}.{gate}.weight", f"{us}.mlp.experts.gate_up_proj", e, 0, ffn)
        yield Part(f"{expert}.{up}.weight", f"{us}.mlp.experts.gate_up_proj", e, ffn, 2 * ffn)
        yield Part(f"{expert}.{down}.weight", f"{us}.mlp.experts.down_proj", e, factor=scaling)


def _gpt2(config: ModelConfig) -> Iterator[Part]:
    yield from _outside(config, "transformer.wte", "transformer.ln_f", bias=True)
    yield Part("transformer.wpe.weight", "position_embed.weight")
    for i in range(config.num_layers):
        us, them = f"layers.{i}", f"transformer.h.{i}"
        yield from _norm(f"{us}.attention_norm", f"{them}.ln_1", bias=True)
        yield from _norm(f"{us}.mlp_norm", f"{them}.ln_2", bias=True)
        for ours, theirs in (
            ("attention.qkv", "attn.c_attn"),
            ("attention.out", "attn.c_proj"),
            ("mlp.up", "mlp.c_fc"),
            ("mlp.down", "mlp.c_proj"),
        ):
            for kind in ("weight", "bias"):
                yield Part(f"{them}.{theirs}.{kind}", f"{us}.{ours}.{kind}", layout="transposed")


def _bloom(config: ModelConfig) -> Iterator[Part]:
    yield from _outside(config, "transformer.word_embeddings", "transformer.ln_f", bias=True)
    yield from _norm("embed_norm", "transformer.word_embeddings_layernorm", bias=True)
    for i in range(config.num_layers):
        us, them = f"layers.{i}", f"transformer.h.{i}"
        yield from _norm(f"{us}.attention_norm", f"{them}.input_layernorm", bias=True)
        yield from _norm(f"{us}.mlp_norm", f"{them}.post_attention_layernorm", bias=True)
        qkv = f"{them}.self_attention.query_key_value"
        for kind in ("weight", "bias"):
            yield Part(f"{qkv}.{kind}", f"{us}.attention.qkv.{kind}", layout="by_head", heads=config.num_heads)
        for ours, theirs in (
            ("attention.out", "self_attention.dense"),
            ("mlp.up", "mlp.dense_h_to_4h"),
            ("mlp.down", "mlp.dense_4h_to_h"),
        ):
            for kind in ("weight", "bias"):
                yield Part(f"{them}.{theirs}.{kind}", f"{us}.{ours}.{kind}")


def _gpt_neox(config: ModelConfig, in_memory: bool) -> Iterator[Part]:
    head = "lm_head" if in_memory else "embed_out"
    yield from _outside(config, "gpt_neox.embed_in", "gpt_neox.final_layer_norm", bias=True, head=head)
    for i in range(config.num_layers):
        us, them = f"layers.{i}", f"gpt_neox.layers.{i}"
        yield from _norm(f"{us}.attention_norm", f"{them}.input_layernorm", bias=True)
        yield from _norm(f"{us}.mlp_norm", f"{them}.post_attention_layernorm", bias=True)
        qkv = f"{them}.attention.query_key_value"
        for kind in ("weight", "bias") if config.qkv_bias else ("weight",):
            yield Part(f"{qkv}.{kind}", f"{us}.attention.qkv.{kind}", layout="by_head", heads=config.num_heads)
        size, ffn = (config.dim,), (config.ffn_dim or 0,)
        yield from _linear(f"{us}.attention.out", (f"{them}.attention.dense",), size, config.has_out_bias)
        yield from _linear(f"{us}.mlp.up", (f"{them}.mlp.dense_h_to_4h",), ffn, bias=True)
        yield from _linear(f"{us}.mlp.down", (f"{them}.mlp.dense_4h_to_h",), size, bias=True)


def _qwen1(config: ModelConfig) -> Iterator[Part]:
    """Qwen-1 as its files name it: ``w2`` is the gate of ``w1``."""
    ffn = config.ffn_dim or 0
    yield from _outside(config, "transformer.wte", "transformer.ln_f")
    for i in range(config.num_layers):
        us, them = f"layers.{i}", f"transformer.h.{i}"
        yield from _norm(f"{us}.attention_norm", f"{them}.ln_1")
        yield from _norm(f"{us}.mlp_norm", f"{them}.ln_2")
        for kind in ("weight", "bias"):
            yield Part(f"{them}.attn.c_attn.{kind}", f"{us}.attention.qkv.{kind}")
        yield Part(f"{them}.attn.c_proj.weight", f"{us}.attention.out.weight")
        yield from _linear(f"{us}.mlp.gate_up", (f"{them}.mlp.w2", f"{them}.mlp.w1"), (ffn, ffn), bias=False)
        yield Part(f"{them}.mlp.c_proj.weight", f"{us}.mlp.down.weight")

"""Weights of Llama, Qwen2 and Mixtral in Hugging Face's names to ours and back, bit for bit.

The mapping is data: each of our tensors is made of one or more of theirs, one below the other.
"""

from __future__ import annotations

from collections.abc import Iterator, Mapping
from dataclasses import dataclass

import torch
from torch import Tensor

from llmrecipes.convert.configs import hf_family
from llmrecipes.errors import UserError
from llmrecipes.recipe.model_config import ModelConfig


@dataclass(frozen=True)
class Entry:
    """One of our tensors and the tensors of theirs it consists of.

    Attributes:
        ours: name in our state dict.
        theirs: names in theirs, stacked along the first dimension in this order.
        sizes: rows of each of ``theirs``.
        per_expert: names of the same tensor split by expert, with ``{}`` for the expert, as files of Mixtral hold it;
            for each expert these are stacked along the first dimension.
        per_expert_rows: rows of each of ``per_expert``.
    """

    ours: str
    theirs: tuple[str, ...]
    sizes: tuple[int, ...]
    per_expert: tuple[str, ...] = ()
    per_expert_rows: tuple[int, ...] = ()


def _linear(ours: str, theirs: tuple[str, ...], sizes: tuple[int, ...], bias: bool) -> Iterator[Entry]:
    for part in ("weight", "bias") if bias else ("weight",):
        yield Entry(f"{ours}.{part}", tuple(f"{name}.{part}" for name in theirs), sizes)


def mapping(config: ModelConfig) -> list[Entry]:
    """Every tensor of a decoder that has a Hugging Face twin."""
    hf_family(config)
    dim, vocab = config.dim, config.vocab_size
    q, kv = config.num_heads * config.head_width, config.kv_heads * config.head_width
    entries = [Entry("embed.weight", ("model.embed_tokens.weight",), (vocab,))]
    for i in range(config.num_layers):
        us, them = f"layers.{i}", f"model.layers.{i}"
        projections = tuple(f"{them}.self_attn.{x}_proj" for x in "qkv")
        entries.append(Entry(f"{us}.attention_norm.weight", (f"{them}.input_layernorm.weight",), (dim,)))
        entries.append(Entry(f"{us}.mlp_norm.weight", (f"{them}.post_attention_layernorm.weight",), (dim,)))
        entries += _linear(f"{us}.attention.qkv", projections, (q, kv, kv), config.qkv_bias)
        entries += _linear(f"{us}.attention.out", (f"{them}.self_attn.o_proj",), (dim,), config.bias)
        if config.moe is None:
            ffn = config.ffn_dim or 0
            gate_up = (f"{them}.mlp.gate_proj", f"{them}.mlp.up_proj")
            entries += _linear(f"{us}.mlp.gate_up", gate_up, (ffn, ffn), config.bias)
            entries += _linear(f"{us}.mlp.down", (f"{them}.mlp.down_proj",), (dim,), config.bias)
            continue
        experts, ffn = config.moe.num_experts, config.moe.ffn_dim
        file = f"{them}.block_sparse_moe.experts.{{}}"
        entries += [
            Entry(f"{us}.mlp.gate.weight", (f"{them}.mlp.gate.weight",), (experts,)),
            Entry(
                f"{us}.mlp.experts.gate_up_proj",
                (f"{them}.mlp.experts.gate_up_proj",),
                (experts,),
                (f"{file}.w1.weight", f"{file}.w3.weight"),
                (ffn, ffn),
            ),
            Entry(
                f"{us}.mlp.experts.down_proj",
                (f"{them}.mlp.experts.down_proj",),
                (experts,),
                (f"{file}.w2.weight",),
                (dim,),
            ),
        ]
    entries.append(Entry("norm.weight", ("model.norm.weight",), (dim,)))
    if not config.tie_embeddings:
        entries.append(Entry("head.weight", ("lm_head.weight",), (vocab,)))
    return entries


def _bias_names(config: ModelConfig) -> list[str]:
    return [f"layers.{i}.mlp.gate.bias" for i in range(config.num_layers) if config.is_moe_layer(i)]


def to_hf_state_dict(config: ModelConfig, state: Mapping[str, Tensor], *, per_expert: bool = True) -> dict[str, Tensor]:
    """Our weights under Hugging Face's names; a tied head is left out, as in its files.

    Args:
        config: the decoder.
        state: ``Decoder.state_dict()``.
        per_expert: True for the names in files (``block_sparse_moe.experts.0.w1``), False for those of the module in
            memory (``mlp.experts.gate_up_proj``).

    Raises:
        UserError: a tensor is missing, or a balancing bias is not zero (Mixtral has no place for it).
    """
    missing = [entry.ours for entry in mapping(config) if entry.ours not in state]
    if missing:
        raise UserError(*(f"the weights lack {name}" for name in missing))
    moved = [name for name in _bias_names(config) if name in state and bool(state[name].any())]
    if moved:
        raise UserError(f"Mixtral has no place for a balancing bias, but {moved[0]} is not zero: see moe.balance")
    out: dict[str, Tensor] = {}
    for entry in mapping(config):
        tensor = state[entry.ours]
        if entry.per_expert and per_expert:
            for expert, matrix in enumerate(tensor.unbind(0)):
                parts = matrix.split(entry.per_expert_rows)
                out |= {n.format(expert): part.clone() for n, part in zip(entry.per_expert, parts, strict=True)}
        else:
            parts = tensor.split(entry.sizes)
            out |= {name: part.clone() for name, part in zip(entry.theirs, parts, strict=True)}
    if per_expert:
        return {name.replace(".mlp.gate.", ".block_sparse_moe.gate."): tensor for name, tensor in out.items()}
    return out


def _take(entry: Entry, hf: dict[str, Tensor], num_experts: int, missing: list[str]) -> Tensor | None:
    names = list(entry.theirs)
    if entry.per_expert and names[0] not in hf:
        names = [name.format(expert) for expert in range(num_experts) for name in entry.per_expert]
    absent = [name for name in names if name not in hf]
    if absent:
        missing += absent
        return None
    parts = [hf.pop(name) for name in names]
    if len(names) == len(entry.theirs):
        return torch.cat(parts)
    whole = torch.cat(parts)
    return whole.view(num_experts, sum(entry.per_expert_rows), whole.shape[-1])


def from_hf_state_dict(config: ModelConfig, hf_state: Mapping[str, Tensor]) -> dict[str, Tensor]:
    """Hugging Face's weights, from files or from a module, as our state dict.

    Raises:
        UserError: tensors are missing or left over; all are named.
    """
    hf = {name.replace(".block_sparse_moe.gate.", ".mlp.gate."): tensor for name, tensor in hf_state.items()}
    missing: list[str] = []
    state: dict[str, Tensor] = {}
    for entry in mapping(config):
        tensor = _take(entry, hf, config.moe.num_experts if config.moe else 0, missing)
        if tensor is not None:
            state[entry.ours] = tensor
    if config.tie_embeddings:
        hf.pop("lm_head.weight", None)
    extra = [name for name in hf if not name.endswith("rotary_emb.inv_freq")]
    if missing or extra:
        raise UserError(
            *(f"the checkpoint lacks {name}" for name in missing),
            *(f"the checkpoint holds {name}, for which this model has no place" for name in extra),
        )
    for name in _bias_names(config):
        assert config.moe is not None
        state[name] = torch.zeros(config.moe.num_experts, dtype=torch.float32)
    return state

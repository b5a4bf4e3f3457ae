"""State dicts in memory: Hugging Face's names to ours and back, bit for bit."""

from __future__ import annotations

import re
from collections.abc import Collection, Iterable, Mapping
from typing import Protocol

import torch
from torch import Tensor

from llmrecipes.convert.families import hf_family
from llmrecipes.convert.names import Part, has_no_twin, our_shapes, parts
from llmrecipes.errors import UserError
from llmrecipes.recipe.model_config import ModelConfig

# Tables and masks that older versions of transformers saved beside the parameters.
_NO_PARAMETER = re.compile(r"rotary_emb\.inv_freq$|\.(attn|attention)\.(bias|masked_bias)$")


_MOST_PROBLEMS = 20


class HasShape(Protocol):
    """A tensor, or what a file's header says of one."""

    @property
    def shape(self) -> tuple[int, ...]:
        """Its sizes."""


def to_hf_state_dict(config: ModelConfig, state: Mapping[str, Tensor], *, per_expert: bool = True) -> dict[str, Tensor]:
    """Our weights under Hugging Face's names; a tied head is left out, as in its files.

    Args:
        config: the decoder.
        state: ``Decoder.state_dict()``.
        per_expert: True for the names in files (``block_sparse_moe.experts.0.w1``), False for those of the module in
            memory (``mlp.experts.gate_up_proj``).

    Raises:
        UserError: a tensor is missing, or a balancing bias is not zero (no architecture has a place for it).
    """
    listed = parts(config, fused=not per_expert)
    missing = list(dict.fromkeys(part.ours for part in listed if part.ours not in state))
    if missing:
        raise UserError(*(f"the weights lack {name}" for name in missing))
    refuse_balancing_bias(hf_family(config), {name: state[name] for name in state if has_no_twin(name)})
    return {part.theirs: part.to_theirs(part.rows_of(state[part.ours])).clone().contiguous() for part in listed}


def refuse_balancing_bias(family: str, biases: Mapping[str, Tensor]) -> None:
    """Refuse what no architecture has a place for.

    Raises:
        UserError: a bias that balances experts has moved.
    """
    moved = [name for name, bias in biases.items() if bool(bias.any())]
    if moved:
        raise UserError(
            f"{family} has no place for a balancing bias, but {moved[0]} is not zero: it chose experts in training "
            "(moe.balance: bias), and without it other experts would be chosen"
        )


def from_hf_state_dict(
    config: ModelConfig, hf_state: Mapping[str, Tensor], source: str | None = None
) -> dict[str, Tensor]:
    """Hugging Face's weights, from files or from a module, as our state dict.

    Args:
        config: the decoder.
        hf_state: tensors by their names.
        source: the family whose names these are; None = the one that `hf_family` finds.

    Raises:
        UserError: tensors are missing, left over or of another shape; all are named.
    """
    found = find_parts(config, hf_state, source)
    state: dict[str, Tensor] = {}
    for name, shape in our_shapes(config).items():
        if has_no_twin(name):
            state[name] = torch.zeros(shape, dtype=torch.float32)
        else:
            state[name] = join(shape, [(part, hf_state[theirs]) for part, theirs in found[name]])
    return state


def join(shape: Iterable[int], pieces: list[tuple[Part, Tensor]]) -> Tensor:
    """One of our tensors from the parts that make it up; rows that only pad are zero."""
    whole = torch.zeros(tuple(shape), dtype=pieces[0][1].dtype)
    for part, tensor in pieces:
        part.rows_of(whole).copy_(part.to_ours(tensor))
    return whole


def find_parts(
    config: ModelConfig, available: Mapping[str, HasShape], source: str | None = None
) -> dict[str, list[tuple[Part, str]]]:
    """For each of our tensors the parts that make it up, each with the name under which it is available.

    Args:
        available: anything with a ``shape`` by name; files of older versions of transformers may lack the prefix
            ``transformer.``, and modules in memory have experts stacked.

    Raises:
        UserError: something is missing, left over or of another shape; all are named.
    """
    left = {_canonical(name): name for name in available if not _NO_PARAMETER.search(name)}
    fused = any(name.endswith("experts.gate_up_proj") for name in left)
    listed = parts(config, source, fused)
    shapes = our_shapes(config)
    found: dict[str, list[tuple[Part, str]]] = {}
    problems = []
    for part in listed:
        name = left.pop(_canonical(part.theirs), None)
        if name is None:
            problems.append(f"the checkpoint lacks {part.theirs}")
            continue
        expected = tuple(_their_shape(part, shapes[part.ours]))
        if tuple(available[name].shape) != expected:
            shape = list(available[name].shape)
            problems.append(f"the checkpoint's {name} is {shape}, config.json makes it {list(expected)}")
        found.setdefault(part.ours, []).append((part, name))
    if config.tie_embeddings:
        left.pop("lm_head.weight", None)
    problems += [f"the checkpoint holds {name}, for which this model has no place" for name in left.values()]
    if problems:
        more = len(problems) - _MOST_PROBLEMS
        raise UserError(*problems[:_MOST_PROBLEMS], *([f"and {more} more like these"] if more > 0 else []))
    return found


def refuse_impossible(config: ModelConfig, available: Collection[str]) -> None:
    """Refuse sizes for which there cannot be tensors enough, before a model of that size is thought of.

    Raises:
        UserError: more layers or experts than tensors.
    """
    experts = (config.moe.num_experts or 0) if config.moe else 0
    if config.moe and any(name.endswith("experts.gate_up_proj") for name in available):
        experts = 0
    for what, number in (("layers", config.num_layers), ("experts", experts)):
        if number > len(available):
            raise UserError(f"config.json: {number:,} {what}, but the files hold {len(available):,} tensors only")


def _canonical(name: str) -> str:
    if re.match(r"(h\.\d+|wte|wpe|ln_f|word_embeddings|word_embeddings_layernorm)\.", name):
        return f"transformer.{name}"
    return "lm_head.weight" if name == "embed_out.weight" else name  # GPT-NeoX in files, and in transformers 5


def _their_shape(part: Part, ours: torch.Size) -> torch.Size:
    return part.to_theirs(part.rows_of(torch.empty(ours, device="meta"))).shape

"""``llmrecipes merge fold``: adapters into the weights: a plain dense model, or a plain mixture of experts."""

from __future__ import annotations

from dataclasses import replace
from functools import partial
from pathlib import Path

import torch

from llmrecipes.convert.from_hf import write_model_folder
from llmrecipes.convert.merge_btx import plan
from llmrecipes.convert.merge_check import check_same
from llmrecipes.convert.names import our_shapes
from llmrecipes.convert.readers import Folded, Made, OnDisk, Reader, open_reader, source_of
from llmrecipes.convert.tokenizer_files import check_tokenizer
from llmrecipes.convert.writing import Planned, new_folder, write_origin, write_tensors
from llmrecipes.errors import UserError
from llmrecipes.recipe.model_config import ModelConfig
from llmrecipes.recipe.moe_config import MoEConfig


def fold(src: str, dst: str, max_shard_gb: float = 5.0) -> None:
    """Write ``W + scale B A`` in place of adapters; the logits stay what they were, and are compared.

    One adapter becomes a dense model. Several with one router per feed-forward network become a mixture of experts,
    which `convert to-hf` writes as a Mixtral; with a router per linear map, a mixture with a router per linear map.

    Args:
        src: a run, a checkpoint, or a folder of `merge lora` or `convert from-peft`.
        dst: a folder that does not exist yet.
        max_shard_gb: size of a file, in GB.
    """
    if max_shard_gb <= 0:
        raise UserError(f"--max_shard_gb {max_shard_gb}: must be larger than 0")
    reader = open_reader(src)
    if not isinstance(reader, OnDisk) or reader.config.lora is None:
        raise UserError(f"{src}: the model has no adapters (config.lora)")
    config, planned = plan_fold(reader, src)
    source = replace(source_of(reader), config=config)
    tokenizer = check_tokenizer(source, source.tokenizer) if source.tokenizer else None
    with new_folder(Path(dst), sum(tensor.bytes for tensor in planned)) as folder:
        write_tensors(folder, planned, int(max_shard_gb * 1e9))
        write_model_folder(folder, Path(dst), source, tokenizer)
        write_origin(folder, "merge fold", src)
        difference = check_same(reader, Made(config, planned), source)
    sizes = f"{config.num_params:,} parameters"
    print(f"wrote {dst}: {sizes}; logits equal those with adapters to {difference:.1e} of the largest")


def plan_fold(reader: Reader, src: str) -> tuple[ModelConfig, list[Planned]]:
    """The model without adapters, and its tensors, none of which was made yet.

    Raises:
        UserError: a router chooses between adapters of attention: no mixture of networks computes that.
    """
    lora, routing = reader.config.lora, reader.config.routing
    assert lora is not None
    if lora.experts is None:
        one = Folded(reader)
        return one.config, [Planned(n, one.dtype(n), shape, partial(one.read, n)) for n, shape in one.shapes.items()]
    layers = [reader.config.adapted(i) for i in range(reader.config.num_layers)]
    if any(name.startswith("self_attn") for layer in layers for name in layer):
        raise UserError(f"{src}: routers choose between adapters of attention, which no mixture of networks does")
    if reader.config.bias:
        raise UserError(f"{src}: the feed-forward network has biases (bias: true), which experts have not")
    assert routing is not None
    config = _mixture(reader.config, routing)
    experts: list[Reader] = [Folded(reader, e) for e in range(lora.experts.num_experts)]
    experts += [Folded(reader)] if lora.experts.null_expert else []
    planned = []
    for tensor in plan(config, Folded(reader), experts, seed=0):
        trained = _router_name(tensor.name, reader)
        if trained is not None and trained in reader.shapes:
            tensor = Planned(tensor.name, reader.dtype(trained), tensor.shape, partial(reader.read, trained))
        elif trained is not None:  # a map without adapters: all experts are equal, and any choice is right
            tensor = replace(tensor, make=partial(torch.zeros, tensor.shape, dtype=tensor.dtype))
        planned.append(tensor)
    assert [tensor.name for tensor in planned] == list(our_shapes(config))
    return config, planned


def _mixture(config: ModelConfig, routing: MoEConfig) -> ModelConfig:
    """What the adapters amount to; layers without adapters stay dense."""
    assert config.lora is not None
    assert config.lora.experts is not None
    assert config.ffn_dim is not None
    plain = [i for i in range(config.num_layers) if not config.adapted(i)]
    moe = replace(routing, ffn_dim=config.ffn_dim, router=config.lora.experts.router)
    return replace(config, lora=None, moe=moe, ffn_dim=config.ffn_dim if plain else None, dense_layers=plain or None)


def _router_name(name: str, reader: Reader) -> str | None:
    """Where the router of a folded model was among the adapters; None for what is no router's."""
    block, _, rest = name.partition(".mlp.")
    if rest in ("gate.weight", "gate.bias"):
        return f"{block}.mlp.router.{rest.partition('.')[2]}"
    owner, _, kind = rest.rpartition(".router.")
    if not owner:
        return None
    part = owner.removeprefix("experts.").removesuffix("_proj")
    fused = "gate_up" if part in ("gate", "up") and reader.config.maps_in == 2 else part
    return f"{block}.mlp.{fused}.lora.{part}.router.{kind}"

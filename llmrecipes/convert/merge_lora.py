"""``llmrecipes merge lora``: branches with one adapter each as one model with several, and routers between them."""

from __future__ import annotations

from dataclasses import replace
from functools import partial
from pathlib import Path
from typing import Literal

import torch
from torch import Tensor

from llmrecipes.convert.from_hf import how_to_train, write_model_folder
from llmrecipes.convert.merge_check import check_experts
from llmrecipes.convert.names import our_shapes
from llmrecipes.convert.readers import Made, OnDisk, Reader, open_reader, source_of
from llmrecipes.convert.tokenizer_files import check_tokenizer
from llmrecipes.convert.upcycle import draw_router
from llmrecipes.convert.writing import Planned, new_folder, write_origin, write_tensors
from llmrecipes.errors import UserError
from llmrecipes.models.lora import is_adapter
from llmrecipes.recipe.lora_config import LoraConfig, LoraExperts
from llmrecipes.recipe.model_config import ModelConfig


def merge_lora(
    seed: str,
    dst: str,
    experts: list[str],
    top_k: int = 2,
    null_expert: bool = True,
    router: Literal["per_linear", "per_mlp"] = "per_linear",
    random_seed: int = 0,
    max_shard_gb: float = 5.0,
) -> None:
    """Put the adapters of several branches side by side over the model they were trained on.

    Args:
        seed: the model beneath: a run, a checkpoint, a folder of ours or of Hugging Face.
        dst: a folder that does not exist yet.
        experts: runs of LoraExpertModule, folders with one adapter, or adapters of PEFT; in the order of the experts.
        top_k: experts that each token uses.
        null_expert: one more choice that adds nothing: the seed itself.
        router: one for each linear map, or one per feed-forward network (which folds into a Mixtral).
        random_seed: of the routers, which begin as N(0, 0.02).
        max_shard_gb: size of a file, in GB.
    """
    if max_shard_gb <= 0:
        raise UserError(f"--max_shard_gb {max_shard_gb}: must be larger than 0")
    base = open_reader(seed)
    if not isinstance(base, OnDisk) or base.config.lora is not None:
        raise UserError(f"{seed}: must be a model without adapters: the one that the experts were trained on")
    branches = [open_reader(path, base) for path in experts]
    config = merged_config(base, branches, experts, LoraExperts(
        num_experts=len(branches), top_k=top_k, null_expert=null_expert, router=router
    ))  # fmt: skip
    for branch, path in zip(branches, experts, strict=True):
        _same_base(base, branch, path, seed)
    planned = plan(config, base, branches, random_seed)
    source = replace(source_of(base), config=config)
    tokenizer = check_tokenizer(source, source.tokenizer) if source.tokenizer else None
    with new_folder(Path(dst), sum(tensor.bytes for tensor in planned)) as folder:
        write_tensors(folder, planned, int(max_shard_gb * 1e9))
        write_model_folder(folder, Path(dst), source, tokenizer)
        write_origin(folder, "merge lora", seed, experts)
        everyone = [*branches, base] if null_expert else branches
        differences = check_experts(Made(config, planned), everyone, source)
    print(f"wrote {dst}: {config.num_params:,} parameters, {config.active_params:,} active; held to one expert its")
    print(f"logits are that expert's own to {max(differences):.1e} of the largest ({len(everyone)} compared)")
    print(how_to_train(Path(dst)))


def merged_config(base: Reader, branches: list[Reader], paths: list[str], experts: LoraExperts) -> ModelConfig:
    """The merged decoder, with the largest rank of the branches.

    Raises:
        UserError: a branch has no adapter, other sizes, or its adapter is on other maps.
    """
    problems, adapters = [], list[LoraConfig]()
    if not branches:
        problems.append("--experts: name at least one")
    for branch, path in zip(branches, paths, strict=True):
        lora = branch.config.lora
        if lora is None or lora.experts is not None:
            problems.append(f"{path}: must have one adapter (config.lora without experts)")
            continue
        adapters.append(lora)
        if replace(branch.config, lora=None, dropout=0.0) != replace(base.config, dropout=0.0):
            problems.append(f"{path}: is a model of other sizes than the seed")
        layers = range(base.config.num_layers)
        if not problems and any(branch.config.adapted(i) != branches[0].config.adapted(i) for i in layers):
            problems.append(f"{path}: its adapter is on other linear maps than that of {paths[0]}")
    if problems:
        raise UserError(*problems)
    first = adapters[0]
    rank = max(lora.rank for lora in adapters)
    # The scale of the first: what another branch has more or less goes into its B.
    alpha = first.scale * rank if rank != first.rank or first.rank_stabilized else first.alpha
    merged = LoraConfig(
        rank=rank, alpha=alpha, dropout=max(a.dropout for a in adapters), targets=first.targets, experts=experts
    )
    try:
        return replace(base.config, lora=merged)
    except ValueError as error:
        raise UserError(f"merge lora: {error}") from None


def _same_base(base: Reader, branch: Reader, path: str, seed: str) -> None:
    """An adapter belongs to the very weights that it was trained over."""
    if not isinstance(branch, OnDisk):
        return  # PEFT does not say
    for name in base.shapes:
        if not torch.equal(base.read(name), branch.read(name)):
            raise UserError(f"{path} was trained over another model than {seed}: {name} differs")


def plan(config: ModelConfig, base: Reader, branches: list[Reader], seed: int) -> list[Planned]:
    """Every tensor of the merged model, none of which was made yet."""
    planned = []
    for name, shape in our_shapes(config).items():
        if is_adapter(name):
            make = partial(_stack, config, name, shape, branches)
            planned.append(Planned(name, branches[0].dtype(_branch_name(name, branches[0])), shape, make))
        elif name.endswith("router.bias"):
            planned.append(Planned(name, torch.float32, shape, partial(torch.zeros, shape)))
        elif name.endswith("router.weight"):
            dtype = base.dtype("norm.weight")
            planned.append(Planned(name, dtype, shape, partial(draw_router, name, shape, "random", seed, dtype)))
        else:
            planned.append(Planned(name, base.dtype(name), shape, partial(base.read, name)))
    return planned


def _branch_name(name: str, branch: Reader) -> str:
    """A merged tensor's name in a branch, where each adapter stands beside its map."""
    if name in branch.shapes:
        return name
    block, _, part = name.partition(".mlp.lora.")
    fused = {"gate": "gate_up", "up": "gate_up", "down": "down"} if branch.config.maps_in == 2 else {}
    return f"{block}.mlp.{fused.get(part.partition('.')[0], part.partition('.')[0])}.lora.{part}"


def _stack(config: ModelConfig, name: str, shape: torch.Size, branches: list[Reader]) -> Tensor:
    """A [N, r, in] or B [N, out, r] of all branches; a smaller rank is filled up with zeros, which add nothing."""
    assert config.lora is not None
    dtype = branches[0].dtype(_branch_name(name, branches[0]))
    stacked = torch.zeros(shape, dtype=dtype)
    for e, branch in enumerate(branches):
        lora = branch.config.lora
        assert lora is not None
        tensor = branch.read(_branch_name(name, branch))
        if name.endswith(".a"):
            stacked[e, : lora.rank] = tensor
        else:
            ratio = lora.scale / config.lora.scale
            stacked[e, :, : lora.rank] = (
                tensor if ratio == 1 else tensor.to(torch.promote_types(dtype, torch.float32)) * ratio
            )
    return stacked

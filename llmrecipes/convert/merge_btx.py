"""``llmrecipes merge btx``: whole feed-forward networks side by side (Branch-Train-MiX, 2403.07816)."""

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
from llmrecipes.convert.readers import Made, Networks, OnDisk, Reader, dense, open_reader, source_of
from llmrecipes.convert.tokenizer_files import check_tokenizer
from llmrecipes.convert.upcycle import draw_router, mixture_config
from llmrecipes.convert.writing import Planned, new_folder, write_origin, write_tensors
from llmrecipes.errors import UserError
from llmrecipes.recipe.model_config import ModelConfig


def merge_btx(
    seed: str,
    dst: str,
    experts: list[str],
    top_k: int = 2,
    others: Literal["average", "seed"] = "average",
    seed_expert: bool = False,
    router: Literal["per_mlp", "per_linear"] = "per_mlp",
    random_seed: int = 0,
    max_shard_gb: float = 5.0,
) -> None:
    """Make a mixture of the feed-forward networks of several models that began as one.

    Args:
        seed: the model that they began as: a run, a checkpoint, a folder of ours or of Hugging Face; dense.
        dst: a folder that does not exist yet.
        experts: trained branches of it, whole or with one adapter (which is folded), or adapters of PEFT.
        top_k: experts that each token uses.
        others: weights outside of the feed-forward networks: the average over the experts, or the seed's.
        seed_expert: the seed is an expert too, the last.
        router: one per feed-forward network (a Mixtral), or one per linear map (as mergoo composes).
        random_seed: of the routers, which begin as N(0, 0.02).
        max_shard_gb: size of a file, in GB.
    """
    if max_shard_gb <= 0:
        raise UserError(f"--max_shard_gb {max_shard_gb}: must be larger than 0")
    base = open_reader(seed)
    if not isinstance(base, OnDisk) or base.config.lora is not None:
        raise UserError(f"{seed}: must be a model without adapters: the one that the experts began as")
    branches = [dense(open_reader(path, base)) for path in experts]
    for branch, path in zip(branches, experts, strict=True):
        if replace(branch.config, dropout=0.0) != replace(base.config, dropout=0.0):
            raise UserError(f"{path}: is a model of other sizes than the seed")
    everyone = [*branches, base] if seed_expert else branches
    config = btx_config(base.config, len(everyone), top_k, router)
    planned = plan(config, base if others == "seed" else Average(everyone), everyone, random_seed)
    source = replace(source_of(base), config=config)
    tokenizer = check_tokenizer(source, source.tokenizer) if source.tokenizer else None
    made = Made(config, planned)
    with new_folder(Path(dst), sum(tensor.bytes for tensor in planned)) as folder:
        write_tensors(folder, planned, int(max_shard_gb * 1e9))
        write_model_folder(folder, Path(dst), source, tokenizer)
        write_origin(folder, "merge btx", seed, experts)
        differences = check_experts(made, [Networks(made, branch) for branch in everyone], source)
    print(f"wrote {dst}: {config.num_params:,} parameters, {config.active_params:,} active; held to one expert its")
    print(f"logits are those of that network amid the {others} weights, to {max(differences):.1e} of the largest")
    print(how_to_train(Path(dst)))


def btx_config(base: ModelConfig, experts: int, top_k: int, router: Literal["per_mlp", "per_linear"]) -> ModelConfig:
    """The mixture.

    Raises:
        UserError: too few experts, or networks that cannot be experts.
    """
    if experts < 2:
        raise UserError(f"merge btx: {experts} expert is no mixture; name more, or --seed_expert true")
    if not 1 <= top_k <= experts:
        raise UserError(f"--top_k {top_k}: must be between 1 and the {experts} experts")
    config = mixture_config(base, experts, top_k, renormalize=True)
    assert config.moe is not None
    return replace(config, moe=replace(config.moe, router=router))


class Average:
    """The mean of several models, tensor by tensor, added up in fp64."""

    def __init__(self, readers: list[Reader]) -> None:
        self.readers, self.config, self.shapes = readers, readers[0].config, readers[0].shapes

    def dtype(self, name: str) -> torch.dtype:
        """Type of a tensor."""
        return self.readers[0].dtype(name)

    def read(self, name: str) -> Tensor:
        """A tensor, in new memory."""
        total = torch.zeros(self.shapes[name], dtype=torch.float64)
        for reader in self.readers:
            total += reader.read(name)
        return (total / len(self.readers)).to(self.dtype(name))


def plan(config: ModelConfig, around: Reader, experts: list[Reader], seed: int) -> list[Planned]:
    """Every tensor of the mixture, none of which was made yet.

    Args:
        around: what is outside of the feed-forward networks. experts: whose networks.
    """
    planned = []
    for name, shape in our_shapes(config).items():
        block = name.split(".mlp.")[0]
        if name.endswith((".gate.bias", ".router.bias")):
            planned.append(Planned(name, torch.float32, shape, partial(torch.zeros, shape)))
        elif name.endswith((".gate.weight", ".router.weight")):
            dtype = around.dtype(f"{block}.mlp_norm.weight")
            planned.append(Planned(name, dtype, shape, partial(draw_router, name, shape, "random", seed, dtype)))
        elif ".mlp.experts." in name:
            origin, rows = expert_rows(experts[0].config, name, block)
            make = partial(_stack, origin, rows, shape, experts)
            planned.append(Planned(name, experts[0].dtype(origin), shape, make))
        else:
            planned.append(Planned(name, around.dtype(name), shape, partial(around.read, name)))
    return planned


def expert_rows(dense_config: ModelConfig, name: str, block: str) -> tuple[str, slice]:
    """Of which dense tensor, and which of its rows, a stack of experts is made."""
    ffn = dense_config.ffn_dim or 0
    inner = "gate_up" if dense_config.maps_in == 2 else "up"
    kind = name.partition(".mlp.experts.")[2].removesuffix(".weight")
    if kind == "down_proj":
        return f"{block}.mlp.down.weight", slice(None)
    rows = {"gate_proj": slice(0, ffn), "up_proj": slice(ffn, None) if inner == "gate_up" else slice(None)}
    return f"{block}.mlp.{inner}.weight", rows.get(kind, slice(None))


def _stack(origin: str, rows: slice, shape: torch.Size, experts: list[Reader]) -> Tensor:
    stacked = torch.empty(shape, dtype=experts[0].dtype(origin))
    for e, expert in enumerate(experts):
        stacked[e] = expert.read(origin)[rows]
    return stacked

"""``llmrecipes convert upcycle``: a mixture of experts whose experts begin as copies of a dense model's network.

Sparse upcycling (2212.05055): with routing weights that sum to one, equal experts make the mixture equal to the dense
model, whatever the router does. Experts then have to come apart: by noise, by re-drawing a part of each
(drop-upcycling, 2502.19261), or by training alone.
"""

from __future__ import annotations

import zlib
from dataclasses import replace
from functools import partial
from pathlib import Path
from typing import Literal, NamedTuple

import torch
import torch.nn.functional as F
from torch import Tensor

from llmrecipes.convert.folder import OurTensors, Source, load_decoder, open_source
from llmrecipes.convert.from_hf import how_to_train, write_model_folder
from llmrecipes.convert.names import our_shapes
from llmrecipes.convert.tokenizer_files import check_tokenizer
from llmrecipes.convert.verify import random_tokens, tolerance, widened
from llmrecipes.convert.writing import Planned, new_folder, write_origin, write_tensors
from llmrecipes.errors import UserError
from llmrecipes.recipe.model_config import ModelConfig
from llmrecipes.recipe.moe_config import MoEConfig

ROUTER_STD = 0.02


class Divergence(NamedTuple):
    """What makes the experts differ.

    Attributes:
        noise: standard deviation of what is added, in those of the matrix.
        drop: share of each expert's hidden units that is drawn anew.
        seed: of noise, drawn units and router.
        scale: of the maps back into the residual stream.
    """

    noise: float
    drop: float
    seed: int
    scale: float


def upcycle(
    src: str,
    dst: str,
    experts: int = 8,
    top_k: int = 2,
    noise: float = 0.0,
    drop: float = 0.0,
    router: Literal["random", "zero"] = "random",
    renormalize: bool = True,
    seed: int = 0,
    max_shard_gb: float = 5.0,
) -> None:
    """Make a mixture of experts of a dense model; without noise and drop its logits are the dense model's.

    Args:
        src: a Hugging Face folder, a run, a checkpoint, or a folder of from-hf or consolidate; dense, no biases.
        dst: a folder that does not exist yet.
        experts: per layer.
        top_k: experts that each token uses.
        noise: added to the experts' weights, in standard deviations of each matrix; 0.01 is a little.
        drop: share of each expert's hidden units to draw anew (drop-upcycling; its paper uses 0.5).
        router: random begins with N(0, 0.02); zero sends all tokens to the same experts until it has learned.
        renormalize: make the chosen weights sum to one (Mixtral). Without, only router zero begins as the dense model.
        seed: of everything random.
        max_shard_gb: size of a file, in GB.
    """
    _check_options(experts, top_k, noise, drop, renormalize, max_shard_gb)
    source = open_source(Path(src))
    config = mixture_config(source.config, experts, top_k, renormalize)
    # Unless they are made to sum to one, a router without opinion gives each chosen expert 1 / E.
    divergence = Divergence(noise, drop, seed, 1.0 if renormalize else experts / top_k)
    planned = plan(source, config, divergence, router)
    tokenizer = check_tokenizer(source, source.tokenizer) if source.tokenizer else None
    total = sum(tensor.bytes for tensor in planned)
    print(f"{src}: {source.config.num_params:,} parameters; {experts} experts make {config.num_params:,}")
    with new_folder(Path(dst), total) as folder:
        write_tensors(folder, planned, int(max_shard_gb * 1e9))
        write_model_folder(folder, Path(dst), replace(source, config=config), tokenizer)
        write_origin(folder, "convert upcycle", src)
        exact = noise == 0 and drop == 0 and (renormalize or router == "zero")
        difference = _compare(source, folder, exact)
    print(f"wrote {dst}: logits {'equal' if exact else 'differ from'} the dense model's {'to' if exact else 'by'} "
          f"{difference:.1e} of the largest; {config.active_params:,} parameters active per token")  # fmt: skip
    if router == "zero":
        print("router zero: all tokens go to the same experts at first; train with moe.balance loss or bias")
    print(how_to_train(Path(dst)))


def _check_options(experts: int, top_k: int, noise: float, drop: float, renormalize: bool, max_shard_gb: float) -> None:
    problems = []
    if experts < 2:
        problems.append(f"--experts {experts}: a mixture has 2 or more")
    if not 1 <= top_k <= experts:
        problems.append(f"--top_k {top_k}: must be between 1 and --experts {experts}")
    if top_k == 1 and renormalize:
        problems.append(
            "--top_k 1 with --renormalize true: the one weight is always 1, and the loss gives the router no gradient; "
            "use --renormalize false --router zero, or --top_k 2"
        )
    if noise < 0:
        problems.append(f"--noise {noise}: must be 0 or more")
    if not 0 <= drop <= 1:
        problems.append(f"--drop {drop}: must be between 0 and 1")
    if max_shard_gb <= 0:
        problems.append(f"--max_shard_gb {max_shard_gb}: must be larger than 0")
    if problems:
        raise UserError(*problems)


def mixture_config(dense: ModelConfig, experts: int, top_k: int, renormalize: bool) -> ModelConfig:
    """The mixture with as many hidden units per expert as the dense network has.

    Raises:
        UserError: it is a mixture already, or its network has biases, which experts have not.
    """
    if dense.moe is not None:
        raise UserError(f"upcycle: the model has {max(dense.layer_experts)} experts already; it must be dense")
    if dense.lora is not None:
        raise UserError("upcycle: the model has adapters; fold them first (llmrecipes merge fold)")
    if dense.bias:
        raise UserError("upcycle: the feed-forward network has biases (bias: true), which experts have not")
    assert dense.ffn_dim is not None
    moe = MoEConfig(num_experts=experts, top_k=top_k, ffn_dim=dense.ffn_dim, renormalize=renormalize)
    return replace(dense, moe=moe, ffn_dim=None)


def plan(source: Source, config: ModelConfig, divergence: Divergence, router: str) -> list[Planned]:
    """Every tensor of the mixture, none of which was made yet."""
    dense = OurTensors(source)
    planned = []
    for name, shape in our_shapes(config).items():
        make, dtype = _recipe(dense, name, shape, divergence, router)
        planned.append(Planned(name, dtype, shape, make))
    return planned


def _recipe(
    dense: OurTensors, name: str, shape: torch.Size, divergence: Divergence, router: str
) -> tuple[partial[Tensor], torch.dtype]:
    """How a tensor is made, and its type."""
    block = name.split(".mlp.")[0]
    if name.endswith("mlp.gate.bias"):
        return partial(torch.zeros, shape), torch.float32
    if name.endswith("mlp.gate.weight"):
        dtype = dense.dtype(f"{block}.mlp.down.weight")
        return partial(draw_router, name, shape, router, divergence.seed, dtype), dtype
    if ".mlp.experts." not in name:
        return partial(dense.read, name), dense.dtype(name)
    down = name.endswith("down_proj")
    inner = "down" if down else "gate_up" if f"{block}.mlp.gate_up.weight" in dense.shapes else "up"
    origin = f"{block}.mlp.{inner}.weight"
    make = partial(_experts, dense, origin, shape, divergence, down)
    return make, dense.dtype(origin)


def draw_router(name: str, shape: torch.Size, kind: str, seed: int, dtype: torch.dtype) -> Tensor:
    """The weights of a router: N(0, 0.02) by name and seed, or ``zero``."""
    if kind == "zero":
        return torch.zeros(shape, dtype=dtype)
    return torch.empty(shape).normal_(0.0, ROUTER_STD, generator=_generator(name, seed)).to(dtype)


def _experts(dense: OurTensors, origin: str, shape: torch.Size, divergence: Divergence, down: bool) -> Tensor:
    """Copies of a dense matrix, [E, out, in], made to differ."""
    matrix = dense.read(origin)
    units = dense.shapes[f"{origin.split('.mlp.')[0]}.mlp.down.weight"][1]
    stacked = torch.empty(shape, dtype=matrix.dtype)
    for expert in range(shape[0]):
        stacked[expert] = matrix * divergence.scale if down and divergence.scale != 1 else matrix
        generator = _generator(f"{origin}.{expert}", divergence.seed)
        if divergence.drop:
            redraw(stacked[expert], dropped_units(origin, expert, units, divergence), units, down, generator)
        if divergence.noise:
            values = stacked[expert].float()
            noise = torch.empty(values.shape).normal_(generator=generator)
            stacked[expert] = values + noise * (divergence.noise * values.std())
    return stacked


def dropped_units(origin: str, expert: int, units: int, divergence: Divergence) -> Tensor:
    """The hidden units of an expert that are drawn anew: the same for all of a layer's matrices."""
    layer = origin.split(".mlp.")[0]
    order = torch.randperm(units, generator=_generator(f"{layer}.{expert}.units", divergence.seed))
    return order[: round(divergence.drop * units)].sort().values


def redraw(matrix: Tensor, chosen: Tensor, units: int, down: bool, generator: torch.Generator) -> None:
    """Draw the weights of ``chosen`` hidden units from N(mean, std) of those very weights, in place (2502.19261).

    Args:
        matrix: [units, D] or, gate above up, [2 units, D]; [D, units] for ``down``.
    """
    if not len(chosen):
        return
    for block in [matrix.t()] if down else matrix.split(units):
        old = block[chosen].float()
        fresh = torch.empty(old.shape).normal_(generator=generator)
        block[chosen] = (old.mean() + fresh * old.std()).to(matrix.dtype)


def _generator(name: str, seed: int) -> torch.Generator:
    return torch.Generator().manual_seed(zlib.crc32(name.encode()) ^ seed)


def _compare(source: Source, folder: Path, exact: bool) -> float:
    """Largest difference of a logit, relative to the largest; refuses one where there must be none."""
    tokens = random_tokens(source)
    dense = _logits(source, tokens)
    mixture = _logits(open_source(folder), tokens)
    difference = float((dense - mixture).abs().max() / dense.abs().max().clamp_min(1))
    if exact and not difference <= tolerance(source.config):
        raise UserError(f"upcycle: logits differ from the dense model's by {difference:.1e}; nothing was kept")
    return difference


@torch.inference_mode()
def _logits(source: Source, tokens: Tensor) -> Tensor:
    decoder = load_decoder(source)
    with widened(decoder):
        hidden = decoder(tokens).hidden
    return F.linear(hidden, decoder.head_weight.float())[..., : source.config.vocab_size]

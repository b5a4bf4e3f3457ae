"""Initial weights that depend on the seed and the parameter's name only."""

from __future__ import annotations

import math
import zlib
from collections.abc import Collection

import torch
from torch import Tensor
from torch.distributed.tensor import DTensor, distribute_tensor

from llmrecipes.models.decoder import Decoder
from llmrecipes.models.lora import is_adapter
from llmrecipes.recipe.model_config import ModelConfig

EMBEDDINGS = ("embed.weight", "position_embed.weight", "head.weight")
ROUTER_BIAS = ("gate.bias", "router.bias")
RESIDUAL_OUTPUTS = (
    "attention.out.weight",
    "mlp.down.weight",
    "mlp.residual.down.weight",
    "mlp.shared.down.weight",
    "experts.down_proj",
    "experts.down_proj.weight",
)


def _std(name: str, tensor: Tensor, config: ModelConfig) -> float | None:
    """Standard deviation for a matrix; None for a vector (norm weights are one, biases zero)."""
    if tensor.ndim < 2:
        return None
    if name in EMBEDDINGS:
        return config.embedding_std
    depth = math.sqrt(2 * config.num_layers) if name.endswith(RESIDUAL_OUTPUTS) else 1.0
    return config.weight_std / depth


def _fill(parameter: Tensor, values: Tensor) -> None:
    """Copy ``values`` in, of which a sharded parameter keeps its own part."""
    if isinstance(parameter, DTensor):
        mine = distribute_tensor(values, parameter.device_mesh, parameter.placements, src_data_rank=None)
        parameter.to_local().copy_(mine.to_local())
    else:
        parameter.copy_(values)


@torch.no_grad()
def init_weights(model: Decoder, seed: int, only: Collection[str] | None = None) -> None:
    """Fill every parameter in place, the same for any number of processes and any order of construction.

    Matrices are N(0, weight_std), the maps that write into the residual stream divided by sqrt(2 num_layers) (GPT-2),
    embeddings and head N(0, embedding_std). A of low-rank adapters is uniform in +- 1 / sqrt(columns), their B zero: no
    update at first, as PEFT begins.
    Norm weights are one (zero where one is added to them), biases and the router's balancing bias zero. Each parameter
    has its own generator, seeded by crc32(name) ^ seed, and is drawn in fp32 whatever its type.

    Args:
        model: not on the meta device; plain or sharded.
        seed: of all of them.
        only: names of the parameters and buffers to fill; None = all.
    """
    config = model.config
    for name, parameter in model.named_parameters():
        if only is not None and name not in only:
            continue
        std = _std(name, parameter, config)
        if std is None:
            parameter.fill_(0.0 if name.endswith("bias") or config.norm_plus_one else 1.0)
            continue
        if is_adapter(name) and name.endswith(".b"):
            parameter.zero_()
            continue
        generator = torch.Generator().manual_seed(zlib.crc32(name.encode()) ^ seed)
        drawn = torch.empty(parameter.shape, dtype=torch.float32)
        if is_adapter(name):
            bound = parameter.shape[-1] ** -0.5
            drawn.uniform_(-bound, bound, generator=generator)
        else:
            drawn.normal_(0.0, std, generator=generator)
        _fill(parameter, drawn)
    for name, buffer in model.named_buffers():
        if only is not None and name not in only:
            continue
        assert name.endswith(ROUTER_BIAS), f"no initial value is known for {name}"
        buffer.zero_()

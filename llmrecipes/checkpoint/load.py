"""Putting what a checkpoint holds back into live objects, in place, whatever ranks and meshes they are on now."""

from __future__ import annotations

from collections.abc import Callable, Mapping
from pathlib import Path

import torch
from torch import Tensor, nn
from torch.distributed.checkpoint.metadata import TensorStorageMetadata

from llmrecipes.checkpoint.base import weight_folders
from llmrecipes.checkpoint.errors import CheckpointError
from llmrecipes.checkpoint.shards import Shards
from llmrecipes.errors import UserError


def load_model(folder: Path, model: nn.Module) -> None:
    """Fill parameters and persistent buffers; each rank reads only its slices, no rank waits for another.

    Args:
        folder: a verified checkpoint.
        model: not on the meta device; plain or sharded.

    Raises:
        CheckpointError: names or shapes differ; all that differ are named.
    """
    load_tensors(folder, dict(model.state_dict()))


def load_tensors(folder: Path, tensors: Mapping[str, Tensor]) -> None:
    """`load_model` for tensors by name: exactly those that the checkpoint holds."""
    Shards(folder / "model").read_into(tensors)


def load_initial(path: Path, model: nn.Module, may_lack: Callable[[str], bool] = lambda _: False) -> set[str]:
    """Begin with the weights of another folder; each rank reads only its slices.

    Args:
        path: a run, a checkpoint, or a folder of safetensors with our names.
        model: not on the meta device; plain or sharded.
        may_lack: whether a tensor of that name may be missing there; it then stays as it is.

    Returns:
        The names that are missing there.

    Raises:
        UserError: nothing whole there, or another model.
    """
    try:
        lowest, *upper = weight_folders(path)
        upper.reverse()
    except UserError as error:
        raise UserError(*(f"model.init_args.init_from: {problem}" for problem in error.problems)) from None
    try:
        state, done = dict(model.state_dict()), set[str]()
        for folder in upper:
            shards = Shards(folder)
            shards.read_into({name: state[name] for name in shards.tensors.keys() & state.keys() - done}, done)
            done |= shards.tensors.keys()
        folder, shards = lowest, Shards(lowest)
        lacking = {name for name in state.keys() - done - shards.tensors.keys() if may_lack(name)}
        shards.read_into({name: tensor for name, tensor in state.items() if name not in done | lacking}, done)
    except CheckpointError as error:
        raise UserError(f"model.init_args.init_from: {error}; its config is not the recipe's") from error
    except (OSError, ValueError) as error:
        raise UserError(f"model.init_args.init_from: {folder} cannot be read: {error}") from error
    return lacking


def load_optimizer(folder: Path, model: nn.Module, optimizer: torch.optim.Optimizer) -> None:
    """Give the optimizer the state of its parameters, found by name, on their devices and divided like them.

    ``step`` counters stay on the CPU, where PyTorch keeps them, but for fused optimizers, whose kernel reads them.
    A parameter without any state in the checkpoint never had a gradient, and begins as it would have then.

    Args:
        folder: a verified checkpoint.
        model: gives the parameters their names.
        optimizer: of any of the model's parameters.

    Raises:
        CheckpointError: state of a parameter that the optimizer does not have, or of another shape.
    """
    on_device = any(group.get("fused") or group.get("capturable") for group in optimizer.param_groups)
    trained = {id(p) for group in optimizer.param_groups for p in group["params"]}
    parameters = {name: p for name, p in model.named_parameters() if id(p) in trained}
    shards = Shards(folder / "optimizer")
    names = {name: name.rpartition(".")[0] for name in shards.tensors}
    if unknown := sorted(set(names.values()) - parameters.keys()):
        raise CheckpointError(f"{shards.folder} does not fit: the optimizer does not have {', '.join(unknown)}")
    tensors = {name: _like(parameters[owner], shards.tensors[name], on_device) for name, owner in names.items()}
    shards.read_into(tensors)
    for name, owner in names.items():
        optimizer.state[parameters[owner]][name.rpartition(".")[2]] = tensors[name]


def _like(parameter: Tensor, saved: TensorStorageMetadata, on_device: bool) -> Tensor:
    """Room for an optimizer's tensor: divided like the parameter, or a counter."""
    dtype = saved.properties.dtype
    if not saved.size and parameter.ndim:
        return torch.zeros((), dtype=dtype, device=parameter.device if on_device else "cpu")
    return torch.zeros_like(parameter, dtype=dtype, requires_grad=False)

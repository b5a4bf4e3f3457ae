"""What a checkpoint holds, gathered from and put back into live objects by parameter name."""

from __future__ import annotations

import json
import random
from dataclasses import dataclass, field
from typing import Any

import numpy as np
import torch
from torch import Tensor, nn


@dataclass
class TrainingState:
    """All that a run needs to go on as if it had never stopped.

    Args:
        step: optimizer steps done.
        model: parameters and persistent buffers by name.
        optimizer: ``<parameter name>.<key>`` -> tensor, for example ``head.weight.exp_avg``.
        rng: states of the random generators, see :func:`rng_state`.
        info: everything else, JSON values only: consumed samples and tokens, the recipe, the best validation loss.
    """

    step: int
    model: dict[str, Tensor]
    optimizer: dict[str, Tensor]
    rng: dict[str, Tensor]
    info: dict[str, Any] = field(default_factory=dict)


def optimizer_state(model: nn.Module, optimizer: torch.optim.Optimizer) -> dict[str, Tensor]:
    """The optimizer's tensors under the names of the parameters they belong to."""
    names = {id(p): name for name, p in model.named_parameters()}
    state = {}
    for parameter, values in optimizer.state.items():
        for key, value in values.items():
            state[f"{names[id(parameter)]}.{key}"] = torch.as_tensor(value)
    return state


def load_optimizer_state(model: nn.Module, optimizer: torch.optim.Optimizer, state: dict[str, Tensor]) -> None:
    """Put tensors from :func:`optimizer_state` back on their parameters' devices.

    ``step`` counters stay on the CPU, where PyTorch keeps them, but for fused optimizers, whose kernel reads them.
    """
    on_device = any(group.get("fused") or group.get("capturable") for group in optimizer.param_groups)
    for name, parameter in model.named_parameters():
        keys = [k for k in state if k.rpartition(".")[0] == name]
        if keys:
            optimizer.state[parameter] = {
                k.rpartition(".")[2]: state[k].to(parameter.device) if state[k].ndim or on_device else state[k]
                for k in keys
            }


def rng_state() -> dict[str, Tensor]:
    """States of torch's, numpy's, Python's and the GPU's generators, as tensors. Lightning restores none of them."""
    _, keys, position, has_gauss, gauss = np.random.get_state()
    version, words, gauss_next = random.getstate()
    state = {
        "torch": torch.get_rng_state(),
        "numpy.keys": torch.from_numpy(np.asarray(keys).astype(np.int64)),
        "numpy.rest": torch.tensor([position, has_gauss, gauss], dtype=torch.float64),
        "python": torch.frombuffer(bytearray(json.dumps([version, words, gauss_next]).encode()), dtype=torch.uint8),
    }
    if torch.cuda.is_available():
        state["cuda"] = torch.cuda.get_rng_state()
    return state


def set_rng_state(state: dict[str, Tensor]) -> None:
    """Put states from :func:`rng_state` back."""
    torch.set_rng_state(state["torch"].cpu())
    position, has_gauss, gauss = state["numpy.rest"].tolist()
    keys = state["numpy.keys"].numpy().astype(np.uint32)
    np.random.set_state(("MT19937", keys, int(position), int(has_gauss), gauss))
    version, words, gauss_next = json.loads(state["python"].numpy().tobytes())
    random.setstate((version, tuple(words), gauss_next))
    if "cuda" in state and torch.cuda.is_available():
        torch.cuda.set_rng_state(state["cuda"].cpu())

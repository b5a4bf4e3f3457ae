"""What a checkpoint holds, gathered from live objects by parameter name, and the random generators."""

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
        model: parameters and persistent buffers by name; DTensors where they are divided among ranks.
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

"""What a checkpoint holds, by name, and the random generators."""

from __future__ import annotations

import random
from pathlib import Path

import numpy as np
import pytest
import torch
from torch import nn

from llmrecipes.checkpoint import TrainingState, read_checkpoint, write_checkpoint
from llmrecipes.checkpoint.state import load_optimizer_state, optimizer_state, rng_state, set_rng_state
from llmrecipes.optim import AdamW


def draw():
    """Some numbers of every generator, also of a distribution that keeps a half-used pair (Box-Muller)."""
    return [
        *torch.rand(3).tolist(),
        *np.random.rand(3).tolist(),
        np.random.standard_normal(),
        random.random(),
        random.gauss(0, 1),
        *torch.randn(3).tolist(),
        float(np.random.rand(1000).sum()),  # numpy makes its words 624 at a time
    ]


def through_disk(folder: Path, rng: dict) -> dict:
    return read_checkpoint(write_checkpoint(folder, TrainingState(1, {}, {}, rng))).rng


@pytest.mark.parametrize("odd", [False, True], ids=["even", "half-used"])
def test_every_generator_goes_on_where_it_was(tmp_path, odd):
    for seed in (torch.manual_seed, np.random.seed, random.seed):
        seed(5)
    draw()
    if not odd:
        np.random.standard_normal()
    saved = through_disk(tmp_path, rng_state())
    expected = draw()
    draw()
    set_rng_state(saved)
    assert draw() == expected


@pytest.mark.parametrize("lost", ["torch", "numpy.keys", "numpy.rest", "python"])
def test_mutant_one_generator_not_restored_is_noticed(tmp_path, lost):
    saved = rng_state()
    expected = draw()
    draw()
    now = rng_state()
    set_rng_state({**saved, lost: now[lost]})
    assert draw() != expected


def small_model():
    torch.manual_seed(0)
    return nn.Sequential(nn.Linear(4, 3), nn.LayerNorm(3), nn.Linear(3, 2, bias=False))


def train(model, optimizer, steps):
    generator = torch.Generator().manual_seed(1)
    for _ in range(steps):
        model(torch.randn(8, 4, generator=generator)).square().sum().backward()
        optimizer.step()
        optimizer.zero_grad()


def test_optimizer_state_has_the_parameters_names(tmp_path):
    model = small_model()
    optimizer = AdamW(lr=0.1).build(model.named_parameters())
    assert optimizer_state(model, optimizer) == {}
    train(model, optimizer, 3)
    state = optimizer_state(model, optimizer)
    names = [name for name, _ in model.named_parameters()]
    assert len(names) == 5
    assert set(state) == {f"{name}.{key}" for name in names for key in ("step", "exp_avg", "exp_avg_sq")}
    assert {float(value) for key, value in state.items() if key.endswith(".step")} == {3.0}


def test_optimizer_goes_on_as_if_it_had_not_stopped(tmp_path):
    """The decay groups put parameters in another order than the model has; names do not care."""
    model = small_model()
    optimizer = AdamW(lr=0.1).build(model.named_parameters())
    train(model, optimizer, 3)
    path = write_checkpoint(
        tmp_path, TrainingState(3, dict(model.state_dict()), optimizer_state(model, optimizer), rng_state())
    )
    train(model, optimizer, 2)

    def resumed(load):
        other, saved = small_model(), read_checkpoint(path)
        other.load_state_dict(saved.model)
        its = AdamW(lr=0.1).build(other.named_parameters())
        load(other, its, saved.optimizer)
        train(other, its, 2)
        return [torch.equal(a, b) for a, b in zip(model.parameters(), other.parameters(), strict=True)]

    assert all(resumed(load_optimizer_state))
    # Mutant: without the moments it is another run.
    assert not any(resumed(lambda *_: None))


def test_step_counters_follow_the_kernel_that_reads_them():
    """A fused optimizer reads them on the device, the others on the CPU (torch.optim.Optimizer.load_state_dict)."""
    model = nn.Linear(2, 2, bias=False, device="meta")
    state = {"weight.step": torch.tensor(3.0), "weight.exp_avg": torch.zeros(2, 2)}
    for fused, device in ((False, "cpu"), (True, "meta")):
        optimizer = torch.optim.AdamW(model.parameters())
        optimizer.param_groups[0]["fused"] = fused
        load_optimizer_state(model, optimizer, state)
        loaded = optimizer.state[model.weight]
        assert (loaded["step"].device.type, loaded["exp_avg"].device.type) == (device, "meta")

"""What a checkpoint holds, by name, and the random generators."""

from __future__ import annotations

import random
from pathlib import Path

import numpy as np
import pytest
import torch
from torch import nn

from llmrecipes.checkpoint import CheckpointError, TrainingState, load_model, load_optimizer, read_rng, write_checkpoint
from llmrecipes.checkpoint.shards import Shards
from llmrecipes.checkpoint.state import optimizer_state, rng_state, set_rng_state
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
    return read_rng(write_checkpoint(folder, TrainingState(1, {}, {}, rng)))


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
        other = small_model()
        load_model(path, other)
        its = AdamW(lr=0.1).build(other.named_parameters())
        load(path, other, its)
        train(other, its, 2)
        return [torch.equal(a, b) for a, b in zip(model.parameters(), other.parameters(), strict=True)]

    assert all(resumed(load_optimizer))
    # Mutant: without the moments it is another run.
    assert not any(resumed(lambda *_: None))


def saved_adam(tmp_path, model, **other):
    state = {f"{n}.exp_avg": torch.ones_like(p) for n, p in model.named_parameters()}
    state |= {f"{n}.step": torch.tensor(3.0) for n, _ in model.named_parameters()}
    return write_checkpoint(tmp_path, TrainingState(3, {}, state | other, rng_state()))


def test_step_counters_follow_the_kernel_that_reads_them(tmp_path, monkeypatch):
    """A fused optimizer reads them on the device, the others on the CPU (torch.optim.Optimizer.load_state_dict)."""
    path = saved_adam(tmp_path, nn.Linear(2, 2, bias=False))
    model = nn.Linear(2, 2, bias=False, device="meta")
    monkeypatch.setattr(Shards, "read_into", lambda *_: None)  # there is no device but the CPU to read into here
    for fused, device in ((False, "cpu"), (True, "meta")):
        optimizer = torch.optim.AdamW(model.parameters())
        optimizer.param_groups[0]["fused"] = fused
        load_optimizer(path, model, optimizer)
        loaded = optimizer.state[model.weight]
        assert (loaded["step"].device.type, loaded["exp_avg"].device.type) == (device, "meta")


def test_what_does_not_fit_is_named_all_at_once(tmp_path):
    model = small_model()
    state = TrainingState(3, dict(model.state_dict()), {}, rng_state())
    state.model["0.weight"] = torch.ones(4, 3)
    state.model["5.weight"] = state.model.pop("2.weight")
    before = {name: tensor.clone() for name, tensor in model.state_dict().items()}
    path = write_checkpoint(tmp_path, state)
    message = (
        r"/model does not fit: it lacks 2\.weight; it has 5\.weight, unknown here; "
        r"0\.weight is \[4, 3\] there and \[3, 4\] here$"
    )
    with pytest.raises(CheckpointError, match=message):
        load_model(path, model)
    assert all(torch.equal(before[name], tensor) for name, tensor in model.state_dict().items())


def test_optimizer_state_must_belong_to_its_parameters(tmp_path):
    model = small_model()
    other = {"9.weight.exp_avg": torch.ones(2), "8.bias.step": torch.ones(())}
    path = saved_adam(tmp_path / "a", model, **other)
    with pytest.raises(
        CheckpointError, match=r"/optimizer does not fit: the optimizer does not have 8\.bias, 9\.weight$"
    ):
        load_optimizer(path, model, torch.optim.AdamW(model.parameters()))
    path = saved_adam(tmp_path / "b", model, **{"0.weight.exp_avg": torch.ones(4, 3)})
    with pytest.raises(CheckpointError, match=r"0\.weight\.exp_avg is \[4, 3\] there and \[3, 4\] here$"):
        load_optimizer(path, model, torch.optim.AdamW(model.parameters()))
    # Frozen now: its moments would be dropped without a word.
    path = saved_adam(tmp_path / "c", model)
    with pytest.raises(CheckpointError, match=r"the optimizer does not have 0\.bias, 0\.weight, 1\.bias, 1\.weight$"):
        load_optimizer(path, model, torch.optim.AdamW(model[2].parameters()))


def test_a_step_0_checkpoint_has_no_optimizer_state(tmp_path):
    model = small_model()
    optimizer = torch.optim.AdamW(model.parameters())
    path = write_checkpoint(tmp_path, TrainingState(0, dict(model.state_dict()), {}, rng_state()))
    load_optimizer(path, model, optimizer)
    assert len(optimizer.state) == 0

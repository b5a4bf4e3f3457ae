"""Saved on some ranks, loaded on others: every tensor is bit-equal, written once, and only its slices are read."""

from __future__ import annotations

import itertools
import math
import shutil

import pytest
import torch
import torch.distributed as dist
import torch.distributed.checkpoint as dcp
from meshes import LAYOUTS, join, net, placed_tensors, ranks_of, train, whole, whole_tensors
from ranks import run_ranks
from safetensors import safe_open

from llmrecipes.checkpoint import (
    CheckpointError,
    TrainingState,
    load_model,
    load_optimizer,
    read_rng,
    read_tensors,
    shards,
    verify,
    write_checkpoint,
)
from llmrecipes.checkpoint.shards import Shards, local
from llmrecipes.checkpoint.state import optimizer_state, rng_state


def on_ranks(layout, function, *args):
    """Run on as many ranks as the layout has; in this process when it has none."""
    return run_ranks(ranks_of(layout), function, *args) if ranks_of(layout) else [function(*args)]


def save_tensors(root, layout):
    if ranks_of(layout):
        join()
    tensors = placed_tensors(layout)
    optimizer = {f"{name}.exp_avg": t * 2 for name, t in tensors.items()}
    torch.manual_seed(100 + (dist.get_rank() if ranks_of(layout) else 0))
    return write_checkpoint(root, TrainingState(3, tensors, optimizer, rng_state(), {"layout": layout}))


def load_tensors(folder, layout):
    """What differs after loading into tensors that were something else."""
    if ranks_of(layout):
        join()
    tensors = placed_tensors(layout)
    for tensor in tensors.values():
        local(tensor).fill_(77)
    Shards(folder / "model").read_into(tensors)
    expected = whole_tensors()
    return [name for name, t in tensors.items() if not torch.equal(whole(t), expected[name])]


@pytest.fixture(scope="module")
def saved(tmp_path_factory):
    """A checkpoint of the same tensors from every layout."""
    root = tmp_path_factory.mktemp("saved")
    return {layout: on_ranks(layout, save_tensors, root / layout, layout)[0] for layout in LAYOUTS}


def pairs():
    """All; in make test every third, so that each layout is saved and loaded, and by itself."""
    for (i, source), (j, target) in itertools.product(enumerate(LAYOUTS), enumerate(LAYOUTS)):
        yield pytest.param(source, target, marks=[pytest.mark.release] * ((i - j) % 3 != 0))


@pytest.mark.parametrize(("source", "target"), pairs())
def test_any_layout_loads_what_any_layout_saved(saved, source, target):
    results = on_ranks(target, load_tensors, saved[source], target)
    assert results == [[]] * max(1, ranks_of(target))


def save_without_offsets(root, layout):
    shards.SHARDING_INFO = "LOST"
    return save_tensors(root, layout)


def test_mutant_without_offsets_is_noticed(tmp_path):
    """The offsets in the headers are what makes the difference."""
    folder = on_ranks("full-2", save_without_offsets, tmp_path, "full-2")[0]
    with pytest.raises(CheckpointError):
        load_tensors(folder, "plain")


@pytest.mark.parametrize("layout", LAYOUTS)
def test_every_element_is_written_once_and_by_many(saved, layout):
    folder, ranks = saved[layout], max(1, ranks_of(layout))
    assert verify(folder) is None
    expected = whole_tensors()
    for part, names in (("model", expected), ("optimizer", [f"{n}.exp_avg" for n in expected])):
        elements, files = dict.fromkeys(names, 0), sorted((folder / part).iterdir())
        assert len(files) == ranks
        for path in files:
            with safe_open(path, "pt") as file:
                for name in file.keys():  # noqa: SIM118 - no dict
                    elements[name] += math.prod(file.get_slice(name).get_shape())
        assert elements == {n: t.numel() for n, t in zip(names, expected.values(), strict=True)}
        sizes = [path.stat().st_size for path in files]
        assert max(sizes) < 2.5 * min(sizes) + 500, "copies take turns in writing"
    assert len(list(folder.glob("rng-*.safetensors"))) == ranks


@pytest.mark.parametrize("layout", ["plain", "hybrid-2x2"])
def test_tools_and_others_read_it(saved, layout):
    """Whole tensors in one process, by us and by torch.distributed.checkpoint alone."""
    expected = whole_tensors()
    ours = read_tensors(saved[layout], "model")
    theirs = {name: torch.zeros_like(t) for name, t in expected.items()}
    with pytest.warns(UserWarning, match="single process"):
        dcp.load(theirs, storage_reader=dcp.HuggingFaceStorageReader(str(saved[layout] / "model")), no_dist=True)
    assert ours.keys() == expected.keys()
    for name, tensor in expected.items():
        assert torch.equal(ours[name], tensor), name
        assert ours[name].dtype == tensor.dtype, name
        assert torch.equal(theirs[name], tensor), name


def test_each_rank_has_its_generators(saved):
    four = [read_rng(saved["hybrid-2x2"], rank)["torch"] for rank in range(4)]
    for rank, state in enumerate(four):
        torch.manual_seed(100 + rank)
        assert torch.equal(state, torch.get_rng_state())
    assert read_rng(saved["hybrid-2x2"], 4) is None
    assert read_rng(saved["plain"], 1) is None


def count_elements_read(folder, layout):
    join()
    read = 0
    original = dcp.HuggingFaceStorageReader._process_read_request

    def count(self, file, request, planner):
        nonlocal read
        read += math.prod(request.lengths)
        return original(self, file, request, planner)

    dcp.HuggingFaceStorageReader._process_read_request = count
    tensors = placed_tensors(layout)
    Shards(folder / "model").read_into(tensors)
    return read, sum(local(t).numel() for t in tensors.values()), sum(t.numel() for t in whole_tensors().values())


@pytest.mark.parametrize("source", ["plain", "hybrid-2x2"])
def test_a_rank_reads_its_slices_and_nothing_else(saved, source):
    results = run_ranks(4, count_elements_read, saved[source], "full-4")
    assert len(results) == 4
    for read, held, total in results:
        assert read == held < total / 2


def test_a_lost_shard_is_named_and_not_filled_with_nothing(saved, tmp_path):
    """Beyond verify(): a folder whose files were sorted by hand."""
    folder = shutil.copytree(saved["full-4"], tmp_path / "step=000003")
    (folder / "model" / "shard-00001.safetensors").unlink()
    with pytest.raises(CheckpointError, match=r"model: slices of .* are missing"):
        read_tensors(folder, "model")


def save_net(root, layout, fused):
    model, optimizer = net(layout, seed=1, fused=fused)
    train(model, optimizer, 3)
    path = write_checkpoint(
        root, TrainingState(3, dict(model.state_dict()), optimizer_state(model, optimizer), rng_state())
    )
    return path, state_of(model, optimizer)


def state_of(model, optimizer):
    tensors = {**model.state_dict(), **{f"optimizer.{k}": v for k, v in optimizer_state(model, optimizer).items()}}
    return {name: whole(t).clone().numpy() for name, t in tensors.items()}


def load_net(folder, layout, fused, steps):
    model, optimizer = net(layout, seed=2, fused=fused)
    load_model(folder, model)
    load_optimizer(folder, model, optimizer)
    placed = [
        optimizer.state[p][key].__class__ is p.data.__class__
        for p in model.parameters()
        for key in ("exp_avg", "exp_avg_sq")
    ]
    loaded = state_of(model, optimizer)
    train(model, optimizer, steps)
    return loaded, state_of(model, optimizer), placed


@pytest.mark.parametrize("fused", [False, True], ids=["plain-adam", "fused"])
@pytest.mark.parametrize(
    ("source", "target"),
    [("hybrid-2x2", t) for t in ("full-2", "plain", "full-4", "hybrid-2x2")]
    + [("plain", "full-2"), ("full-2", "full-4"), ("no-shard-4", "alone")],
)
def test_a_model_and_its_optimizer_go_on_elsewhere(tmp_path, source, target, fused):
    path, saved = on_ranks(source, save_net, tmp_path, source, fused)[0]
    results = on_ranks(target, load_net, path, target, fused, 2)
    assert len(saved) == 6 + 5 * 3
    for loaded, _, placed in results:
        assert loaded.keys() == saved.keys()
        assert all((loaded[name] == saved[name]).all() for name in saved)
        assert len(placed) == 10
        assert all(placed)  # moments are divided as their parameters are
    # And trains on: as if it had been there all the time (gradients are averages over ranks with the same data).
    whole_run = on_ranks("plain", load_net, path, "plain", fused, 2)[0][1]
    for _, after, _ in results:
        for name, expected in whole_run.items():
            torch.testing.assert_close(torch.from_numpy(after[name]), torch.from_numpy(expected), rtol=1e-4, atol=1e-5)

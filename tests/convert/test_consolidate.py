"""One folder of a checkpoint of many ranks: bit-equal, in the memory of a block, whole or not at all."""

from __future__ import annotations

import json
import shutil
import subprocess
import sys

import numpy as np
import pytest
import torch
from helpers import REPOSITORY
from ranks import run_ranks
from safetensors import safe_open
from safetensors.torch import load_file
from torch.distributed.device_mesh import init_device_mesh
from torch.distributed.tensor import Shard, distribute_tensor

from llmrecipes.checkpoint import TrainingState, durable, write_checkpoint
from llmrecipes.convert import consolidate as module
from llmrecipes.convert.commands import main
from llmrecipes.convert.consolidate import consolidate
from llmrecipes.errors import UserError

sys.path.insert(0, str(REPOSITORY / "tests" / "checkpoint"))
from meshes import join, placed_tensors, whole_tensors


def save(root):
    join()
    tensors = placed_tensors("hybrid-2x2")
    state = TrainingState(
        6, tensors, {f"{n}.exp_avg": t * 2 for n, t in tensors.items()}, {}, {"progress": {"step": 6}}
    )
    return write_checkpoint(root, state)


@pytest.fixture(scope="module")
def run_folder(tmp_path_factory):
    """Of a run on 2 x 2 ranks: an older checkpoint, the newest whole one, and a broken one."""
    folder = tmp_path_factory.mktemp("runs") / "dense"
    folder.mkdir()
    (folder / "recipe.yaml").write_text("name: dense\n")
    root = folder / "checkpoints"
    write_checkpoint(root, TrainingState(3, {"old": torch.ones(2)}, {}, {}))
    run_ranks(4, save, root)
    broken = write_checkpoint(root, TrainingState(9, {"new": torch.ones(2)}, {}, {}))
    (broken / "state.json").write_text("{}")
    return folder


@pytest.mark.parametrize("block", [1, 100, module.BLOCK_BYTES])
@pytest.mark.parametrize(("max_shard_gb", "files"), [(5, 1), (600e-9, 3), (1e-9, 9)])
@pytest.mark.parametrize("part", ["model", "optimizer"])
def test_every_tensor_is_bit_equal_however_it_is_cut(
    run_folder, tmp_path, monkeypatch, part, max_shard_gb, files, block
):
    monkeypatch.setattr(module, "BLOCK_BYTES", block)
    out = tmp_path / "out"
    consolidate(str(run_folder), str(out), part=part, max_shard_gb=max_shard_gb)
    expected = whole_tensors()
    if part == "optimizer":
        expected = {f"{name}.exp_avg": tensor * 2 for name, tensor in expected.items()}
    paths = sorted(out.glob("*.safetensors"))
    assert len(paths) == files
    assert [p.name for p in paths] == (
        ["model.safetensors"] if files == 1 else [f"model-{n + 1:05d}-of-{files:05d}.safetensors" for n in range(files)]
    )
    found = {name: tensor for path in paths for name, tensor in load_file(path).items()}
    assert found.keys() == expected.keys()
    for name, tensor in expected.items():
        assert found[name].dtype == tensor.dtype, name
        assert torch.equal(found[name], tensor), name
    index = out / "model.safetensors.index.json"
    assert index.exists() == (files > 1)
    if files > 1:
        listed = json.loads(index.read_text())
        assert listed["weight_map"].keys() == expected.keys()
        for name, file in listed["weight_map"].items():
            with safe_open(out / file, "pt") as opened:
                assert name in opened.keys()  # noqa: SIM118 - no dict
        assert listed["metadata"]["total_size"] == sum(t.nbytes for t in expected.values())
    assert json.loads((out / "state.json").read_text())["step"] == 6
    assert (out / "recipe.yaml").read_text() == "name: dense\n"


def test_the_source_may_be_a_run_a_root_or_a_checkpoint(run_folder, tmp_path, capsys):
    newest = run_folder / "checkpoints" / "step=000006"
    for n, source in enumerate((run_folder, run_folder / "checkpoints", newest)):
        assert main(["consolidate", str(source), str(tmp_path / f"{n}")]) == 0
        printed = capsys.readouterr().out
        assert f"{newest}: 9 tensors, 0.00 GB" in printed
        assert ("step=000009 is broken and passed over" in printed) == (n < 2)
    first, *others = ((tmp_path / f"{n}" / "model.safetensors").read_bytes() for n in range(3))
    assert all(other == first for other in others)


def test_mistakes_are_told(run_folder, tmp_path, capsys):
    broken = run_folder / "checkpoints" / "step=000009"
    out = tmp_path / "out"
    for source, problem in (
        (broken, "is no whole checkpoint: state.json has 2 bytes"),
        (tmp_path, "no whole checkpoint here; give a checkpoint, a checkpoints folder or a run folder"),
        (tmp_path / "absent", "no whole checkpoint here"),
    ):
        with pytest.raises(UserError, match=problem):
            consolidate(str(source), str(out))
    with pytest.raises(UserError, match="larger than 0"):
        consolidate(str(run_folder), str(out), max_shard_gb=0)
    with pytest.raises(UserError, match=r"step=000003/optimizer holds no tensors"):
        consolidate(str(run_folder / "checkpoints" / "step=000003"), str(out), part="optimizer")
    assert not out.exists()
    out.mkdir()
    (out / "mine").write_text("precious")
    with pytest.raises(UserError, match="exists already"):
        consolidate(str(run_folder), str(out))
    assert [p.name for p in out.iterdir()] == ["mine"]
    with pytest.raises(UserError, match=r"convert consolidat: no such stage - did you mean 'consolidate'\?"):
        main(["consolidat"])
    assert main([]) == 0
    assert "consolidate" in capsys.readouterr().out


def test_a_wrong_byte_is_noticed_and_nothing_is_left(run_folder, tmp_path, monkeypatch):
    """The self-check has teeth: one flipped byte of any tensor in the written file."""
    slots, _ = module.read_header(run_file(run_folder, tmp_path))
    places = [slot.begin for slot in slots.values() if slot.bytes]
    assert len(places) == 8
    for n, place in enumerate(places):
        put = durable.put

        def flip(file, piece, place=place, put=put):
            at = file.tell()
            piece = np.frombuffer(bytes(piece), np.uint8).copy()
            if at <= place < at + len(piece):
                piece[place - at] ^= 1
            put(file, piece)

        with monkeypatch.context() as patch:
            patch.setattr(durable, "put", flip)
            with pytest.raises(UserError, match=r"reads back differently from .*shard-0000"):
                consolidate(str(run_folder), str(tmp_path / f"flipped-{n}"))
    assert {p.name for p in tmp_path.iterdir()} == {"right"}


def run_file(run_folder, tmp_path):
    consolidate(str(run_folder), str(tmp_path / "right"))
    return tmp_path / "right" / "model.safetensors"


def save_large(root):
    join()
    mesh = init_device_mesh("cpu", (2,))
    tensors = {
        f"layer.{n}": distribute_tensor(torch.full((4000, 4000), float(n)), mesh, [Shard(n % 2)]) for n in range(4)
    }
    write_checkpoint(root, TrainingState(6, tensors, {}, {}))


MEASURE = r"""
import re, sys
from pathlib import Path

from llmrecipes.convert import consolidate

def peak():  # KiB, of this program alone: ru_maxrss begins with the parent's
    return int(re.search(r"VmHWM:\s+(\d+)", Path("/proc/self/status").read_text())[1])

if sys.argv[3] == "mutant":
    consolidate.BLOCK_BYTES = 2**40  # whole tensors
before = peak()
consolidate.consolidate(sys.argv[1], sys.argv[2], max_shard_gb=0.1)
print((peak() - before) / 1024)
"""


@pytest.fixture(scope="module")
def large_run(tmp_path_factory):
    """244 MiB of parameters in tensors of 61 MiB, saved by two processes."""
    folder = tmp_path_factory.mktemp("large")
    run_ranks(2, save_large, folder / "checkpoints")
    yield folder
    shutil.rmtree(folder)


@pytest.mark.slow
@pytest.mark.parametrize("way", ["blocks", "mutant"])
def test_memory_does_not_grow_with_the_model_nor_with_a_tensor(tmp_path, large_run, way):
    """The mutant holds whole tensors."""
    words = [sys.executable, "-c", MEASURE, str(large_run), str(tmp_path / "out"), way]
    done = subprocess.run(words, capture_output=True, text=True, timeout=300, check=True)
    growth = float(done.stdout.splitlines()[-1])
    print(f"{way}: {growth:.0f} MiB more at the peak")
    assert len(list((tmp_path / "out").glob("*.safetensors"))) == 4
    assert (growth < 60) == (way == "blocks"), growth
    shutil.rmtree(tmp_path)

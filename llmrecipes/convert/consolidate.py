"""One safetensors folder from a sharded checkpoint, on the CPU, in the memory of one block of one tensor.

The header of every output file is known before any data is read, so each file is written from its first byte to its
last; a block of rows is put together from the slices that hold them, written, and forgotten. Afterwards every slice
is compared with the place where it belongs.
"""

from __future__ import annotations

import json
import math
from collections.abc import Callable, Iterator
from dataclasses import dataclass, field
from pathlib import Path
from typing import Literal

import numpy as np
import torch
from tqdm import tqdm

from llmrecipes.checkpoint import checkpoints, newest_whole, verify, weight_folders
from llmrecipes.checkpoint.durable import sync_folder, write_file
from llmrecipes.checkpoint.shards import SHARDING_INFO
from llmrecipes.checkpoint.tensor_file import Slot, file_order, header, read_header
from llmrecipes.convert.writing import new_folder
from llmrecipes.errors import UserError

BLOCK_BYTES = 16 * 2**20
Progress = Callable[[int], object]


@dataclass
class Slice:
    """A part of a tensor, and where its bytes lie."""

    path: Path
    slot: Slot
    offsets: tuple[int, ...]


@dataclass
class Pieces:
    """A tensor: its whole shape, and the slices that make it up."""

    dtype: torch.dtype
    shape: tuple[int, ...] = ()
    slices: list[Slice] = field(default_factory=list)

    @property
    def bytes(self) -> int:
        """Its size."""
        return math.prod(self.shape) * self.dtype.itemsize


def consolidate(src: str, dst: str, part: Literal["model", "optimizer"] = "model", max_shard_gb: float = 5.0) -> None:
    """Make one safetensors folder, as Hugging Face tools read them, of a checkpoint that many ranks wrote.

    Args:
        src: a checkpoint, a `checkpoints` folder or a run folder; of the latter two the newest whole checkpoint.
        dst: a folder that does not exist yet.
        part: parameters, or the optimizer's state.
        max_shard_gb: size of an output file, in GB; a larger tensor has a file of its own.
    """
    source, target = find_checkpoint(Path(src)), Path(dst)
    if target.exists():
        raise UserError(f"{target} exists already; name a new folder, or remove it")
    if max_shard_gb <= 0:
        raise UserError(f"--max_shard_gb {max_shard_gb}: must be larger than 0")
    tensors: dict[str, Pieces] = {}
    for folder in weight_folders(source) if part == "model" else [source / part]:
        tensors |= read_slices(folder)
    if not tensors:
        raise UserError(f"{source}/{part} holds no tensors")
    total = sum(tensor.bytes for tensor in tensors.values())
    print(f"{source}: {len(tensors)} tensors, {total / 1e9:.2f} GB")
    with new_folder(target, total) as temporary:
        _write(temporary, source, tensors, int(max_shard_gb * 1e9))
    print(f"wrote {target}: {len(list(target.glob('*.safetensors')))} file(s), every slice compared")


def find_checkpoint(path: Path) -> Path:
    """The verified checkpoint meant by a path.

    Raises:
        UserError: it is none, or broken.
    """
    if (path / "manifest.json").exists():
        if reason := verify(path):
            raise UserError(f"{path} is no whole checkpoint: {reason}")
        return path
    root = path / "checkpoints" if checkpoints(path / "checkpoints") else path
    found, broken = newest_whole(root)
    for sentence in broken:
        print(f"warning: {sentence}")
    if found is None:
        raise UserError(f"{path}: no whole checkpoint here; give a checkpoint, a checkpoints folder or a run folder")
    return found


def read_slices(folder: Path) -> dict[str, Pieces]:
    """The tensors of a folder of shards, from the headers alone."""
    tensors: dict[str, Pieces] = {}
    for path in sorted(folder.glob("*.safetensors")):
        slots, metadata = read_header(path)
        places = json.loads(metadata.get(SHARDING_INFO, "{}"))
        for name, slot in slots.items():
            tensor = tensors.setdefault(name, Pieces(slot.dtype))
            offsets = tuple(places[name]["saved_offsets"]) if places else (0,) * len(slot.shape)
            end = tuple(o + n for o, n in zip(offsets, slot.shape, strict=True))
            tensor.shape = tuple(map(max, tensor.shape, end)) if tensor.slices else end
            tensor.slices.append(Slice(path, slot, offsets))
    for name, tensor in tensors.items():
        assert sum(s.slot.bytes for s in tensor.slices) == tensor.bytes, f"slices of {name} are missing"
    return dict(sorted(tensors.items()))


def _write(folder: Path, source: Path, tensors: dict[str, Pieces], max_bytes: int) -> None:
    """Data, index, and what tells of the model: its state, and the run's recipe when it is there."""
    files = divide(tensors, max_bytes)
    total = sum(tensor.bytes for tensor in tensors.values())
    with _bar("writing", total) as bar:
        for name, held in files.items():
            write_file(folder / name, _file(held, bar.update))
    with _bar("comparing", total) as bar:
        for name, held in files.items():
            compare(folder / name, held, bar.update)
    if len(files) > 1:
        weight_map = {tensor: name for name, held in files.items() for tensor in held}
        index = {"metadata": {"total_size": total}, "weight_map": weight_map}
        write_file(folder / "model.safetensors.index.json", [json.dumps(index, indent=1).encode()])
    for extra in (source / "state.json", source.parent.parent / "recipe.yaml"):
        if extra.exists():
            write_file(folder / extra.name, [extra.read_bytes()])
    sync_folder(folder)


def divide(tensors: dict[str, Pieces], max_bytes: int) -> dict[str, dict[str, Pieces]]:
    """Which file holds which tensors; in the order of names, each file as full as it may be."""
    groups: list[dict[str, Pieces]] = [{}]
    size = 0
    for name, tensor in tensors.items():
        if groups[-1] and size + tensor.bytes > max_bytes:
            groups.append({})
            size = 0
        groups[-1][name] = tensor
        size += tensor.bytes
    if len(groups) == 1:
        return {"model.safetensors": groups[0]}
    return {f"model-{n:05d}-of-{len(groups):05d}.safetensors": group for n, group in enumerate(groups, 1)}


def _file(tensors: dict[str, Pieces], progress: Progress) -> Iterator[bytes | np.ndarray]:
    """The bytes of an output file."""
    slots = {name: Slot(tensor.dtype, tensor.shape, 0) for name, tensor in tensors.items()}
    yield header(slots, {"format": "pt"})
    for name in file_order(slots):
        for block in _blocks(tensors[name]):
            yield block.reshape(-1)
            progress(block.nbytes)
            del block


def _blocks(tensor: Pieces) -> Iterator[np.ndarray]:
    """Its bytes, some rows at a time, put together from its slices."""
    shape = _shape_in_bytes(tensor)
    for begin, end in _row_ranges(shape):
        block = np.empty((end - begin, *shape[1:]), np.uint8)
        for piece, first, last, place in _slices_in(tensor, begin, end):
            block[place] = _rows_of(piece, first, last)
        yield block
        del block  # before the next is made


def compare(path: Path, tensors: dict[str, Pieces], progress: Progress) -> None:
    """Read a written file again and compare every slice with its place in it.

    Raises:
        OSError: one differs.
    """
    slots, _ = read_header(path)
    assert slots.keys() == tensors.keys()
    for name, tensor in tensors.items():
        whole = slots[name]
        assert (whole.dtype, whole.shape) == (tensor.dtype, tensor.shape)
        shape = _shape_in_bytes(tensor)
        for begin, end in _row_ranges(shape):
            written = _read_rows(path, whole.begin, shape, begin, end)
            for piece, first, last, place in _slices_in(tensor, begin, end):
                if not np.array_equal(written[place], _rows_of(piece, first, last)):
                    raise OSError(f"{path}: {name} reads back differently from {piece.path}")
            progress(written.nbytes)


def _slices_in(tensor: Pieces, begin: int, end: int) -> Iterator[tuple[Slice, int, int, tuple[slice, ...]]]:
    """Slices with rows between ``begin`` and ``end``: which of their rows, and their place in that block."""
    for piece in tensor.slices:
        offsets, sizes = _in_bytes(piece)
        first, last = max(begin, offsets[0]), min(end, offsets[0] + sizes[0])
        if first < last:
            inside = (slice(o, o + n) for o, n in zip(offsets[1:], sizes[1:], strict=True))
            yield piece, first - offsets[0], last - offsets[0], (slice(first - begin, last - begin), *inside)


def _rows_of(piece: Slice, first: int, last: int) -> np.ndarray:
    return _read_rows(piece.path, piece.slot.begin, _in_bytes(piece)[1], first, last)


def _shape_in_bytes(tensor: Pieces) -> list[int]:
    """Bytes instead of elements: numpy does not know bfloat16. A scalar is a row of one element."""
    *shape, columns = tensor.shape or (1,)
    return [*shape, columns * tensor.dtype.itemsize]


def _in_bytes(piece: Slice) -> tuple[list[int], list[int]]:
    """Offsets and sizes of a slice, counted in bytes in the last dimension."""
    width = piece.slot.dtype.itemsize
    offsets, sizes = list(piece.offsets or (0,)), list(piece.slot.shape or (1,))
    return [*offsets[:-1], offsets[-1] * width], [*sizes[:-1], sizes[-1] * width]


def _row_ranges(shape: list[int]) -> Iterator[tuple[int, int]]:
    """Ranges of rows of at most a block's size; of one row where a row is larger."""
    rows = max(1, BLOCK_BYTES // max(1, math.prod(shape[1:])))
    for begin in range(0, shape[0], rows):
        yield begin, min(begin + rows, shape[0])


def _read_rows(path: Path, start: int, shape: list[int], begin: int, end: int) -> np.ndarray:
    """Rows ``begin`` to ``end`` of an array of bytes that starts at ``start`` of a file."""
    row = math.prod(shape[1:])
    rows = np.fromfile(path, np.uint8, count=(end - begin) * row, offset=start + begin * row)
    return rows.reshape(end - begin, *shape[1:])


def _bar(label: str, total: int) -> tqdm:
    """For work that takes long; quiet where there is no terminal."""
    return tqdm(total=total, unit="B", unit_scale=True, desc=label, leave=False, disable=None)

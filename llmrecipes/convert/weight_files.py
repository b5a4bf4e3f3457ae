"""Tensors in safetensors files, read part by part: of one file, of many, or in the slices that many ranks wrote."""

from __future__ import annotations

import json
import math
from collections.abc import Iterator
from dataclasses import dataclass, field
from functools import cached_property
from pathlib import Path

import numpy as np
import torch
from torch import Tensor

from llmrecipes.checkpoint.shards import SHARDING_INFO
from llmrecipes.checkpoint.tensor_file import Slot, read_header
from llmrecipes.errors import UserError


@dataclass
class Stored:
    """A tensor, and the files that hold it or slices of it.

    Attributes:
        dtype, shape: of the whole tensor.
        slices: file, place in it, and where in the tensor the slice begins.
    """

    dtype: torch.dtype
    shape: tuple[int, ...] = ()
    slices: list[tuple[Path, Slot, tuple[int, ...]]] = field(default_factory=list)


class WeightFiles:
    """The tensors of folders; nothing but headers is read before it is asked for.

    Args:
        folders: each holds ``*.safetensors``; what a later one has takes the place of an earlier one's.

    Raises:
        UserError: there is none, or a file is damaged.
    """

    def __init__(self, *folders: Path) -> None:
        self.folder = folders[-1]
        self.tensors: dict[str, Stored] = {}
        for folder in folders:
            self.tensors |= _stored(folder)

    @cached_property
    def shapes(self) -> dict[str, torch.Size]:
        """Shape of every tensor."""
        return {name: torch.Size(stored.shape) for name, stored in self.tensors.items()}

    def read(self, name: str, expert: int | None = None, begin: int = 0, end: int | None = None) -> Tensor:
        """A tensor, or some rows of it, or some rows of one expert's: in new memory.

        Args:
            expert: index in the first dimension, which the result then lacks. begin, end: rows.
        """
        stored = self.tensors[name]
        wanted = [(0, size) for size in stored.shape]
        rows = 0 if expert is None else 1
        if expert is not None:
            wanted[0] = (expert, expert + 1)
        if wanted:
            wanted[rows] = (begin, wanted[rows][1] if end is None else min(end, wanted[rows][1]))
        tensor = self._region(stored, wanted)
        return tensor if expert is None else tensor[0]

    def _region(self, stored: Stored, wanted: list[tuple[int, int]]) -> Tensor:
        if len(stored.slices) == 1:
            path, slot, _ = stored.slices[0]
            return _read(path, slot, wanted)
        out = torch.empty([hi - lo for lo, hi in wanted], dtype=stored.dtype)
        for path, slot, begin in stored.slices:
            common = [(max(lo, b), min(hi, b + n)) for (lo, hi), b, n in zip(wanted, begin, slot.shape, strict=True)]
            if any(lo >= hi for lo, hi in common):
                continue
            here = tuple(slice(lo - w[0], hi - w[0]) for (lo, hi), w in zip(common, wanted, strict=True))
            out[here] = _read(path, slot, [(lo - b, hi - b) for (lo, hi), b in zip(common, begin, strict=True)])
        return out

    def __iter__(self) -> Iterator[str]:
        return iter(self.tensors)


def _stored(folder: Path) -> dict[str, Stored]:
    """What the headers of a folder's files say."""
    paths = _listed(folder)
    if not paths:
        raise UserError(f"{folder}: no *.safetensors in it{_other_weights(folder)}")
    tensors: dict[str, Stored] = {}
    for path in paths:
        try:
            _add(path, tensors)
        except (OSError, ValueError, KeyError, TypeError, AttributeError, RecursionError) as error:
            raise UserError(f"{path}: not a readable safetensors file: {error}") from None
    return tensors


def _add(path: Path, tensors: dict[str, Stored]) -> None:
    slots, metadata = read_header(path)
    size = path.stat().st_size
    places = json.loads(metadata.get(SHARDING_INFO, "{}"))
    for name, slot in slots.items():
        if slot.begin + slot.bytes > size:
            raise ValueError(f"it ends before {name} does")
        stored = tensors.setdefault(name, Stored(slot.dtype))
        begin = tuple(places[name]["saved_offsets"]) if places else (0,) * len(slot.shape)
        end = tuple(o + n for o, n in zip(begin, slot.shape, strict=True))
        stored.shape = tuple(map(max, stored.shape, end)) if stored.slices else end
        stored.slices.append((path, slot, begin))


def _read(path: Path, slot: Slot, wanted: list[tuple[int, int]]) -> Tensor:
    """A region of a stored tensor: its rows are read, into new memory, and cut to size.

    Read, not mapped: pages of a mapped file would count as memory of this process for as long as it is open.
    """
    if not wanted:
        return torch.from_numpy(np.fromfile(path, np.uint8, slot.bytes, offset=slot.begin)).view(slot.dtype)[0]
    first, last = wanted[0]
    shape, begin = list(slot.shape), slot.begin
    row = math.prod(shape[1:]) * slot.dtype.itemsize
    begin, shape[0], rest = begin + first * row, last - first, wanted[1:]
    if shape[0] == 1 and len(shape) > 1:  # one expert: its own rows lie together too
        inner = math.prod(shape[2:]) * slot.dtype.itemsize
        begin, shape[1] = begin + rest[0][0] * inner, rest[0][1] - rest[0][0]
        rest = [(0, shape[1]), *rest[1:]]
    count = math.prod(shape) * slot.dtype.itemsize
    data = torch.from_numpy(np.fromfile(path, np.uint8, count, offset=begin)).view(slot.dtype).view(shape)
    return data[(slice(None), *(slice(*w) for w in rest))]


def _listed(folder: Path) -> list[Path]:
    """The files that an index names, else all.

    Raises:
        UserError: one that it names is missing.
    """
    index = folder / "model.safetensors.index.json"
    if not index.exists():
        return sorted(folder.glob("*.safetensors"))
    try:
        names = set(json.loads(index.read_text(encoding="utf-8"))["weight_map"].values())
    except (OSError, ValueError, KeyError, AttributeError, TypeError, RecursionError) as error:
        raise UserError(f"{index}: not a readable index: {type(error).__name__}: {error}") from None
    if strange := [name for name in names if not isinstance(name, str) or Path(name).name != name]:
        raise UserError(f"{index}: {strange[0]!r} is not the name of a file beside it")
    if not names:
        raise UserError(f"{index}: it names no file")
    if missing := sorted(name for name in names if not (folder / name).is_file()):
        raise UserError(*(f"{folder / name} is missing, though {index.name} names it" for name in missing))
    return sorted(folder / name for name in names)


def _other_weights(folder: Path) -> str:
    if not folder.is_dir():
        return ": there is no such folder"
    others = [*folder.glob("*.bin"), *folder.glob("*.pt"), *folder.glob("*.pth")]
    return f"; {others[0].name} may hold code and is not read: save the model as safetensors" if others else ""

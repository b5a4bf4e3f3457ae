"""New folders: whole or not at all, one tensor in memory at a time."""

from __future__ import annotations

import json
import math
import os
import shutil
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from llmrecipes.checkpoint.durable import sync_folder, write_file
from llmrecipes.checkpoint.tensor_file import Slot, file_order, header
from llmrecipes.convert.origin import ORIGIN
from llmrecipes.convert.weight_files import WeightFiles
from llmrecipes.errors import UserError


@dataclass(frozen=True)
class Planned:
    """A tensor to write: all that a file's header says of it, and how to make it when its turn comes."""

    name: str
    dtype: torch.dtype
    shape: torch.Size
    make: Callable[[], Tensor]

    @property
    def bytes(self) -> int:
        """Its size."""
        return math.prod(self.shape) * self.dtype.itemsize


@contextmanager
def new_folder(target: Path, need: int = 0) -> Iterator[Path]:
    """A temporary folder that takes the name ``target`` when the block ends well, and is removed when it does not.

    Args:
        need: bytes that will be written.

    Raises:
        UserError: ``target`` exists, the disk is too small, or writing fails.
    """
    if target.exists():
        raise UserError(f"{target} exists already; name a new folder, or remove it")
    temporary = target.with_name(f".tmp-{target.name}-{os.getpid()}")
    try:
        target.parent.mkdir(parents=True, exist_ok=True)
        free = shutil.disk_usage(target.parent).free
        if free < need * 1.01:
            raise UserError(f"{target.parent} has {free / 1e9:.2f} GB free, {need / 1e9:.2f} GB are needed")
        temporary.mkdir()
        yield temporary
        sync_folder(temporary)
        temporary.rename(target)
        sync_folder(target.parent)
    except OSError as error:
        raise UserError(f"writing {target} failed, nothing of it was left: {error}") from error
    finally:
        shutil.rmtree(temporary, ignore_errors=True)


def write_tensors(folder: Path, tensors: list[Planned], max_bytes: int) -> None:
    """``model.safetensors``, or numbered files with an index; then every tensor is read again and compared.

    Raises:
        UserError: one reads back differently.
    """
    groups = _divide(tensors, max_bytes)
    names = ["model.safetensors"]
    if len(groups) > 1:
        names = [f"model-{n:05d}-of-{len(groups):05d}.safetensors" for n in range(1, len(groups) + 1)]
        weight_map = {t.name: file for file, group in zip(names, groups, strict=True) for t in group}
        total = sum(t.bytes for t in tensors)
        write_json(
            folder / "model.safetensors.index.json", {"metadata": {"total_size": total}, "weight_map": weight_map}
        )
    for name, group in zip(names, groups, strict=True):
        write_file(folder / name, _file(group))
    written = WeightFiles(folder)
    for tensor in tensors:
        found = written.read(tensor.name)
        if found.dtype != tensor.dtype or not torch.equal(_bits(found), _bits(tensor.make())):
            raise UserError(f"{folder}: {tensor.name} reads back differently from what was written; nothing was kept")


def _divide(tensors: list[Planned], max_bytes: int) -> list[list[Planned]]:
    """Which file holds which tensors, in their order, each file as full as it may be."""
    groups: list[list[Planned]] = [[]]
    size = 0
    for tensor in tensors:
        if groups[-1] and size + tensor.bytes > max_bytes:
            groups.append([])
            size = 0
        groups[-1].append(tensor)
        size += tensor.bytes
    return groups


def _file(group: list[Planned]) -> Iterator[Any]:
    slots = {tensor.name: Slot(tensor.dtype, tuple(tensor.shape), 0) for tensor in group}
    planned = {tensor.name: tensor for tensor in group}
    yield header(slots, {"format": "pt"})
    for name in file_order(slots):
        made = planned[name].make()
        assert (made.dtype, made.shape) == (planned[name].dtype, planned[name].shape), name
        yield _bits(made).numpy()
        del made


def _bits(tensor: Tensor) -> Tensor:
    """The bytes: equal numbers are not enough, a NaN equals nothing."""
    return tensor.detach().contiguous().reshape(-1).view(torch.uint8)


def write_json(path: Path, content: Any) -> None:
    """A JSON file, flushed to disk."""
    write_file(path, [json.dumps(content, ensure_ascii=False, indent=2).encode() + b"\n"])


def write_origin(folder: Path, command: str, base: str, parts: Sequence[str] = ()) -> None:
    """Which folders a model was made of, as they were named: `llmrecipes report` follows them.

    Args:
        folder: of the new model.
        command: that made it.
        base: the model it began as.
        parts: further ones, such as the experts of a merge.
    """
    write_json(folder / ORIGIN, {"command": command, "base": base, "parts": list(parts)})

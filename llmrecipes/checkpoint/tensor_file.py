"""The safetensors format, tensor by tensor: a header with every name, type, shape and place, then the bytes.

The library's own ``save`` builds the whole file in memory first, and refuses tensors that share storage or are not
contiguous; here no more than one tensor is held beside those that exist already.
"""

from __future__ import annotations

import json
import math
from collections.abc import Iterator, Mapping
from pathlib import Path
from typing import Any, NamedTuple

import torch
from torch import Tensor

DTYPES = {
    "F64": torch.float64,
    "F32": torch.float32,
    "F16": torch.float16,
    "BF16": torch.bfloat16,
    "F8_E4M3": torch.float8_e4m3fn,
    "F8_E5M2": torch.float8_e5m2,
    "I64": torch.int64,
    "I32": torch.int32,
    "I16": torch.int16,
    "I8": torch.int8,
    "U64": torch.uint64,
    "U32": torch.uint32,
    "U16": torch.uint16,
    "U8": torch.uint8,
    "BOOL": torch.bool,
}
NAMES = {dtype: name for name, dtype in DTYPES.items()}


class Slot(NamedTuple):
    """Where a tensor lies in a file."""

    dtype: torch.dtype
    shape: tuple[int, ...]
    begin: int

    @property
    def bytes(self) -> int:
        """Its size."""
        return math.prod(self.shape) * self.dtype.itemsize


def file_order(tensors: Mapping[str, Tensor | Slot]) -> list[str]:
    """Wide types first, so that every tensor is aligned; then by name."""
    return sorted(tensors, key=lambda name: (-tensors[name].dtype.itemsize, name))


def header(tensors: Mapping[str, Tensor | Slot], metadata: Mapping[str, str]) -> bytes:
    """The head of a file that holds ``tensors`` in :func:`file_order`."""
    entries: dict[str, Any] = {"__metadata__": dict(metadata)}
    begin = 0
    for name in file_order(tensors):
        dtype, shape = tensors[name].dtype, list(tensors[name].shape)
        end = begin + math.prod(shape) * dtype.itemsize
        entries[name] = {"dtype": NAMES[dtype], "shape": shape, "data_offsets": [begin, end]}
        begin = end
    text = json.dumps(entries, ensure_ascii=False, separators=(",", ":")).encode()
    text += b" " * (-len(text) % 8)
    return len(text).to_bytes(8, "little") + text


def pieces(tensors: Mapping[str, Tensor], metadata: Mapping[str, str]) -> Iterator[Any]:
    """The bytes of a file, for :func:`llmrecipes.checkpoint.durable.write_file`."""
    yield header(tensors, metadata)
    for name in file_order(tensors):
        yield tensors[name].detach().cpu().contiguous().reshape(-1).view(torch.uint8).numpy()


def read_header(path: Path) -> tuple[dict[str, Slot], dict[str, str]]:
    """The tensors of a file, with their places counted from the file's beginning, and its metadata.

    Raises:
        OSError: not readable. ValueError: not such a file, or it contradicts itself.
    """
    size = path.stat().st_size
    with path.open("rb") as file:
        length = int.from_bytes(file.read(8), "little")
        if length > size - 8:
            raise ValueError("it ends before its head does")
        entries = json.loads(file.read(length))
    if not isinstance(entries, dict):
        raise ValueError("its head is not a mapping")
    metadata = entries.pop("__metadata__", {})
    slots = {name: _slot(name, entry, 8 + length) for name, entry in entries.items()}
    return slots, metadata


def _slot(name: str, entry: Any, start: int) -> Slot:
    try:
        dtype, shape, (begin, end) = DTYPES[entry["dtype"]], tuple(entry["shape"]), entry["data_offsets"]
    except (KeyError, TypeError, ValueError):
        raise ValueError(f"its head says of {name}: {str(entry)[:80]}") from None
    if any(type(n) is not int or n < 0 for n in (*shape, begin, end)):
        raise ValueError(f"{name} has sizes or places that are no whole numbers")
    if begin + math.prod(shape) * dtype.itemsize != end:
        raise ValueError(f"{name} is {list(shape)} but fills {end - begin} bytes")
    return Slot(dtype, shape, start + begin)

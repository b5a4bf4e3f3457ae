"""Tensors divided among ranks, on disk: planned by torch.distributed.checkpoint (DCP), one safetensors file per rank.

The files are those of DCP's ``HuggingFaceStorageWriter(save_distributed=True)``: the header says at which offset of
the whole tensor a slice begins. Any DCP reader of that format reads them, on any number of ranks; none unpickles.
DCP's planners decide who writes and who reads which slice. Writing is ours: DCP's writer holds a rank's share twice
in memory, refuses tensors that are not contiguous, and knows no checksum of what it wrote.
"""

from __future__ import annotations

import json
import math
from collections.abc import Collection, Mapping
from pathlib import Path

import torch
from torch import Tensor
from torch.distributed.checkpoint import DefaultLoadPlanner, DefaultSavePlanner, HuggingFaceStorageReader
from torch.distributed.checkpoint.metadata import Metadata, TensorStorageMetadata
from torch.distributed.checkpoint.planner import SavePlan
from torch.distributed.tensor import DTensor

from llmrecipes.checkpoint.durable import FileRecord, write_file
from llmrecipes.checkpoint.errors import CheckpointError
from llmrecipes.checkpoint.tensor_file import pieces

SHARDING_INFO = "DCP_SHARDING_INFO"


class Share:
    """What one rank writes of ``tensors``; every slice is written once, by one of the ranks that hold it.

    First every rank makes its :meth:`local_plan`, then each is told :meth:`divide` with the plans of all, then
    :meth:`write`. Nothing here talks to other ranks.

    Args:
        tensors: this rank's view: DTensors of any mesh, or plain tensors, which are equal on all ranks.
        rank: which of the ranks that save.
    """

    def __init__(self, tensors: Mapping[str, Tensor], rank: int) -> None:
        self._planner = DefaultSavePlanner(flatten_state_dict=False, flatten_sharded_tensors=False)
        # Sorted, so that equal states make equal files, whatever filled their dicts.
        self._planner.set_up_planner(dict(sorted(tensors.items())), is_coordinator=rank == 0)
        self._rank = rank
        self.total_bytes = 0

    def local_plan(self) -> SavePlan:
        """Everything that this rank holds."""
        return self._planner.create_local_plan()

    def divide(self, plans: list[SavePlan]) -> None:
        """Settle who writes what; all ranks come to the same result.

        Args:
            plans: of every rank, in their order.

        Raises:
            ValueError: together they do not cover every tensor exactly once.
        """
        divided, metadata = self._planner.create_global_plan(plans)
        self._plan = self._planner.finish_plan(divided[self._rank])
        stored = [m for m in metadata.state_dict_metadata.values() if isinstance(m, TensorStorageMetadata)]
        self.total_bytes = sum(math.prod(m.size) * m.properties.dtype.itemsize for m in stored)

    def write(self, folder: Path) -> dict[str, FileRecord]:
        """Write this rank's ``shard-NNNNN.safetensors``, flushed to disk.

        Returns:
            Its record by name. No file for a rank that has nothing to write, but for the first, so that there is one.
        """
        items = self._plan.items
        if not items and self._rank:
            return {}
        tensors: dict[str, Tensor] = {}
        offsets: dict[str, dict[str, list[int]]] = {}
        for item in items:
            name, slice_ = item.index.fqn, self._planner.resolve_data(item)
            assert isinstance(slice_, Tensor)
            assert item.tensor_data is not None
            assert name not in tensors, f"two slices of {name} on one rank"  # a DTensor has one
            tensors[name] = slice_
            offsets[name] = {"saved_offsets": list(item.tensor_data.chunk.offsets)}
        metadata = {"format": "pt", "DCP_VERSION": "1.0", SHARDING_INFO: json.dumps(offsets)}
        name = f"shard-{self._rank:05d}.safetensors"
        return {name: write_file(folder / name, pieces(tensors, metadata))}


class Shards:
    """The tensors of a folder of shards; nothing but headers is read before it is asked for."""

    def __init__(self, folder: Path) -> None:
        self.folder = folder
        self._reader = HuggingFaceStorageReader(str(folder))
        self._metadata: Metadata = self._reader.read_metadata()
        self.tensors: dict[str, TensorStorageMetadata] = {
            name: found
            for name, found in sorted(self._metadata.state_dict_metadata.items())
            if isinstance(found, TensorStorageMetadata)
        }
        for name, found in self.tensors.items():
            if sum(math.prod(chunk.sizes) for chunk in found.chunks) != math.prod(found.size):
                raise CheckpointError(f"{folder}: slices of {name} are missing")

    def read_into(self, tensors: Mapping[str, Tensor], unwanted: Collection[str] = ()) -> None:
        """Fill ``tensors``, plain or DTensors of any mesh, in place; only the slices held here are read.

        Args:
            unwanted: names that may be here and are not read.

        Raises:
            CheckpointError: names or shapes differ; all that differ are named.
        """
        if problems := self._differences(tensors, unwanted):
            raise CheckpointError(f"{self.folder} does not fit: " + "; ".join(problems))
        # A tensor on a mesh without this rank has no slice here.
        own = {name: t for name, t in tensors.items() if not _is_elsewhere(t)}
        planner = DefaultLoadPlanner(flatten_state_dict=False, flatten_sharded_tensors=False)
        planner.set_up_planner(own, self._metadata, is_coordinator=True)
        self._reader.set_up_storage_reader(self._metadata, is_coordinator=True)
        self._reader.read_data(planner.finish_plan(planner.create_local_plan()), planner).wait()

    def _differences(self, tensors: Mapping[str, Tensor], unwanted: Collection[str]) -> list[str]:
        missing = sorted(tensors.keys() - self.tensors.keys())
        unexpected = sorted(self.tensors.keys() - tensors.keys() - set(unwanted))
        problems = [f"it lacks {', '.join(missing)}"] if missing else []
        problems += [f"it has {', '.join(unexpected)}, unknown here"] if unexpected else []
        for name in sorted(tensors.keys() & self.tensors.keys()):
            there, here = tuple(self.tensors[name].size), tuple(tensors[name].shape)
            if there != here:
                problems.append(f"{name} is {list(there)} there and {list(here)} here")
        return problems


def _is_elsewhere(tensor: Tensor) -> bool:
    return isinstance(tensor, DTensor) and tensor.device_mesh.get_coordinate() is None


def local(tensor: Tensor) -> Tensor:
    """The part of a tensor that this rank holds."""
    tensor = tensor.detach()
    return tensor.to_local() if isinstance(tensor, DTensor) else tensor


def read_whole(folder: Path) -> dict[str, Tensor]:
    """Every tensor of a folder of shards, put together, on the CPU; for tools in one process."""
    shards = Shards(folder)
    tensors = {name: torch.empty(m.size, dtype=m.properties.dtype) for name, m in shards.tensors.items()}
    shards.read_into(tensors)
    return tensors

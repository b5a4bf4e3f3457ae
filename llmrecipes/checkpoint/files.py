"""Checkpoint folders on disk: written by all ranks, atomically, manifest last; read without pickle; verified.

``checkpoints/step=000625/`` holds ``model/shard-00000.safetensors`` and ``optimizer/shard-00000.safetensors``, one
file for each rank that has something to write, ``rng-00000.safetensors`` for each rank, ``state.json`` and
``manifest.json``, which lists the size and SHA-256 of the others. A folder without a manifest is no checkpoint.
"""

from __future__ import annotations

import json
import os
import shutil
from collections.abc import Mapping
from concurrent.futures import ThreadPoolExecutor
from functools import partial
from pathlib import Path
from typing import Any

import torch
import torch.distributed as dist
from safetensors.torch import load_file
from torch import Tensor
from torch.distributed.checkpoint.planner import SavePlan

from llmrecipes.checkpoint.durable import FileRecord, difference, sync_folder, write_file
from llmrecipes.checkpoint.errors import CheckpointError
from llmrecipes.checkpoint.ranks import rank, together
from llmrecipes.checkpoint.shards import Share, local, read_whole
from llmrecipes.checkpoint.state import TrainingState
from llmrecipes.checkpoint.tensor_file import pieces

MANIFEST = "manifest.json"
FORMAT = 2
PARTS = ("model", "optimizer")


def checkpoint_name(step: int) -> str:
    """``step=000625``."""
    return f"step={step:06d}"


def step_of(folder: Path) -> int | None:
    """The step in a checkpoint folder's name, or None when it is no such name."""
    prefix, _, digits = folder.name.partition("=")
    return int(digits) if prefix == "step" and digits.isdecimal() else None


def write_checkpoint(
    root: Path,
    state: TrainingState,
    attachments: Mapping[str, bytes] | None = None,
    group: dist.ProcessGroup | None = None,
) -> Path:
    """Write ``root/step=NNNNNN`` so that it exists whole or not at all. Collective: every rank calls it.

    Args:
        root: the run's ``checkpoints`` folder, seen by all ranks; made when missing.
        state: refused when a tensor of the model or optimizer is not finite. Every rank gives its slices.
        attachments: small files to add, by name, such as the metrics so far; those of rank 0 count.
        group: the processes to talk to; None = all. A background thread needs one that nobody else uses.

    Returns:
        The folder's path.

    Raises:
        CheckpointError: not finite, not enough space, or the files read back differently, on any rank. Raised on all
            ranks. Nothing is left behind, and an earlier folder of the same name is as it was.
    """
    target, me = root / checkpoint_name(state.step), rank(group)
    each = partial(together, doing=f"writing {target} failed", group=group)
    shares = {"model": Share(state.model, me), "optimizer": Share(state.optimizer, me)}
    offers = each(lambda: _offer(state, shares))
    temporary = root / f".tmp-{target.name}-{offers[0][0]}"
    try:
        each(lambda: _begin(temporary, shares, [plans for _, plans in offers], state.step, me))
        records = each(lambda: _write_own(temporary, shares, state.rng, me))
        # The owner of a file reads it back while rank 0 writes what describes the whole.
        each(lambda: _check(target, temporary, records[me], _describe(temporary, state, attachments, records, me)))
        each(lambda: _commit(temporary, target) if me == 0 else None)
    finally:
        # Whoever failed, all have finished writing when the failure is known.
        if me == 0:
            shutil.rmtree(temporary, ignore_errors=True)
    return target


def _offer(state: TrainingState, shares: dict[str, Share]) -> tuple[int, dict[str, SavePlan]]:
    """What others must know first: this process's number, and what it holds, if it is fit to be saved."""
    _refuse_not_finite(state)
    return os.getpid(), {part: share.local_plan() for part, share in shares.items()}


def _refuse_not_finite(state: TrainingState) -> None:
    tensors = (*state.model.items(), *state.optimizer.items())
    not_finite = [name for name, tensor in tensors if not _is_finite(local(tensor))]
    if not_finite:
        others = f", nor are {len(not_finite) - 1} more" if len(not_finite) > 1 else ""
        raise CheckpointError(f"step {state.step} is not saved: {not_finite[0]} is not finite{others}")


def _is_finite(tensor: Tensor) -> bool:
    return not tensor.is_floating_point() or bool(torch.isfinite(tensor).all())


def _begin(temporary: Path, shares: dict[str, Share], plans: list[dict[str, SavePlan]], step: int, me: int) -> None:
    """Settle who writes what; rank 0 makes the folders, when there is room."""
    for part, share in shares.items():
        share.divide([plan[part] for plan in plans])
    if me != 0:
        return
    root = temporary.parent
    root.mkdir(parents=True, exist_ok=True)
    need, free = sum(share.total_bytes for share in shares.values()), shutil.disk_usage(root).free
    if free < need * 1.05:
        raise CheckpointError(f"{root} has {free / 2**30:.2f} GiB free, step {step} needs {need / 2**30:.2f} GiB")
    shutil.rmtree(temporary, ignore_errors=True)
    temporary.mkdir()
    for part in PARTS:
        (temporary / part).mkdir()


def _write_own(temporary: Path, shares: dict[str, Share], rng: dict[str, Tensor], me: int) -> dict[str, FileRecord]:
    """This rank's files, flushed to disk, by path relative to the checkpoint."""
    name = f"rng-{me:05d}.safetensors"
    records = {name: write_file(temporary / name, pieces(rng, {"format": "pt"}))}
    for part, share in shares.items():
        records |= {f"{part}/{file}": record for file, record in share.write(temporary / part).items()}
    return records


def _describe(
    temporary: Path,
    state: TrainingState,
    attachments: Mapping[str, bytes] | None,
    records: list[dict[str, FileRecord]],
    me: int,
) -> dict[str, FileRecord]:
    """Rank 0 adds state, attachments and, last, the manifest; returns the records of what it added."""
    if me != 0:
        return {}
    info = json.dumps({"step": state.step, **state.info}, ensure_ascii=False, indent=1)
    contents = {**(attachments or {}), "state.json": info.encode()}
    added = {name: write_file(temporary / name, [content]) for name, content in contents.items()}
    files = {name: record for own in (*records, added) for name, record in own.items()}
    for folder in (*(temporary / part for part in PARTS), temporary):
        sync_folder(folder)
    manifest = {"format": FORMAT, "step": state.step, "ranks": len(records), "files": dict(sorted(files.items()))}
    added[MANIFEST] = write_file(temporary / MANIFEST, [json.dumps(manifest, indent=1).encode()])
    sync_folder(temporary)
    return added


def _check(target: Path, temporary: Path, *records: dict[str, FileRecord]) -> None:
    for own in records:
        for name, expected in own.items():
            if reason := difference(temporary / name, expected):
                raise CheckpointError(f"{target} reads back differently from what was written: {name} {reason}")


def _commit(temporary: Path, target: Path) -> None:
    """Rename into place; an earlier folder of the same step (a resumed run that differs) steps aside first."""
    if target.exists():
        aside = target.with_name(f".old-{target.name}-{os.getpid()}")
        target.rename(aside)
        try:
            temporary.rename(target)
        except OSError:
            aside.rename(target)
            raise
        shutil.rmtree(aside, ignore_errors=True)
    else:
        temporary.rename(target)
    sync_folder(target.parent)


def verify(folder: Path) -> str | None:
    """Why the folder is not a whole checkpoint, or None when it is: manifest present, every size and checksum right."""
    try:
        manifest = json.loads((folder / MANIFEST).read_text(encoding="utf-8"))
        files = manifest["files"]
        if manifest["format"] != FORMAT:
            return f"format {manifest['format']} is not the one this version reads ({FORMAT})"
        with ThreadPoolExecutor(min(8, os.cpu_count() or 1)) as pool:  # checksums free the interpreter
            reasons = pool.map(lambda entry: difference(folder / entry[0], entry[1]), files.items())
            for name, reason in zip(files, reasons, strict=True):
                if reason:
                    return f"{name} {reason}"
    except FileNotFoundError as error:
        return f"{Path(str(error.filename)).relative_to(folder)} is missing"
    except (OSError, ValueError, KeyError, TypeError, AttributeError) as error:
        return f"{MANIFEST} cannot be read: {error}"
    return None


def read_info(folder: Path) -> dict[str, Any]:
    """``state.json`` of a verified checkpoint."""
    return json.loads((folder / "state.json").read_text(encoding="utf-8"))


def read_rng(folder: Path, rank: int = 0) -> dict[str, Tensor] | None:
    """The random generators of a rank of a verified checkpoint; None when fewer ranks wrote it."""
    path = folder / f"rng-{rank:05d}.safetensors"
    return load_file(path) if path.exists() else None


def read_tensors(folder: Path, part: str) -> dict[str, Tensor]:
    """All of ``model`` or ``optimizer`` of a verified checkpoint, on the CPU; for tools in one process."""
    assert part in PARTS, part
    return read_whole(folder / part)


def read_checkpoint(folder: Path) -> TrainingState:
    """A whole checkpoint with the generators of rank 0, on the CPU; for tools in one process."""
    info = read_info(folder)
    step = info.pop("step")
    model, optimizer = (read_tensors(folder, part) for part in PARTS)
    return TrainingState(step, model, optimizer, read_rng(folder) or {}, info)

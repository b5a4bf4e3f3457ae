"""Checkpoint folders on disk: written atomically, manifest last; read without pickle; verified by checksum.

``checkpoints/step=000625/`` holds ``model.safetensors``, ``optimizer.safetensors``, ``rng-00000.safetensors``,
``state.json`` and ``manifest.json``, which lists the size and SHA-256 of the others. A folder without a manifest is
no checkpoint.
"""

from __future__ import annotations

import hashlib
import json
import os
import shutil
from pathlib import Path
from typing import Any

import torch
from safetensors import SafetensorError
from safetensors.torch import load_file, save_file
from torch import Tensor

from llmrecipes.checkpoint.state import TrainingState

MANIFEST = "manifest.json"
FORMAT = 1


class CheckpointError(Exception):
    """A checkpoint could not be written or read; says which file and why."""


def checkpoint_name(step: int) -> str:
    """``step=000625``."""
    return f"step={step:06d}"


def step_of(folder: Path) -> int | None:
    """The step in a checkpoint folder's name, or None when it is no such name."""
    prefix, _, digits = folder.name.partition("=")
    return int(digits) if prefix == "step" and digits.isdecimal() else None


def write_checkpoint(root: Path, state: TrainingState, attachments: list[Path] | None = None) -> Path:
    """Write ``root/step=NNNNNN`` so that it exists whole or not at all.

    Args:
        root: the run's ``checkpoints`` folder; made when missing.
        state: refused when a tensor of the model or optimizer is not finite.
        attachments: small files copied along, such as the metrics so far.

    Returns:
        The folder's path.

    Raises:
        CheckpointError: not finite, not enough space, or the files read back differently. Nothing is left behind,
            and an earlier folder of the same name is as it was.
    """
    not_finite = [name for name, t in (*state.model.items(), *state.optimizer.items()) if not _is_finite(t)]
    if not_finite:
        others = f", nor are {len(not_finite) - 1} more" if len(not_finite) > 1 else ""
        raise CheckpointError(f"step {state.step} is not saved: {not_finite[0]} is not finite{others}")
    target, temporary = root / checkpoint_name(state.step), root / f".tmp-{checkpoint_name(state.step)}-{os.getpid()}"
    try:
        root.mkdir(parents=True, exist_ok=True)
        _check_space(root, state)
        shutil.rmtree(temporary, ignore_errors=True)
        temporary.mkdir()
        _write_files(temporary, state, attachments or [])
        if reason := verify(temporary):
            raise CheckpointError(f"{target} reads back differently from what was written: {reason}")
        _commit(temporary, target)
    except (OSError, SafetensorError) as error:
        raise CheckpointError(f"writing {target} failed: {error}") from error
    finally:
        shutil.rmtree(temporary, ignore_errors=True)
    return target


def _is_finite(tensor: Tensor) -> bool:
    return not tensor.is_floating_point() or bool(torch.isfinite(tensor).all())


def _check_space(root: Path, state: TrainingState) -> None:
    need = sum(t.numel() * t.element_size() for part in (state.model, state.optimizer) for t in part.values())
    free = shutil.disk_usage(root).free
    if free < need * 1.05:
        raise CheckpointError(f"{root} has {free / 2**30:.2f} GiB free, step {state.step} needs {need / 2**30:.2f} GiB")


def _write_files(folder: Path, state: TrainingState, attachments: list[Path]) -> None:
    parts = {"model": state.model, "optimizer": state.optimizer, "rng-00000": state.rng}
    for name, tensors in parts.items():
        save_file({k: t.detach().cpu().contiguous() for k, t in tensors.items()}, folder / f"{name}.safetensors")
    (folder / "state.json").write_text(
        json.dumps({"step": state.step, **state.info}, ensure_ascii=False, indent=1), encoding="utf-8"
    )
    for path in attachments:
        if path.exists():
            shutil.copyfile(path, folder / path.name)
    files = {path.name: {"bytes": path.stat().st_size, "sha256": _sha256(path)} for path in sorted(folder.iterdir())}
    for path in folder.iterdir():
        _fsync(path)
    manifest = {"format": FORMAT, "step": state.step, "files": files}
    (folder / MANIFEST).write_text(json.dumps(manifest, indent=1), encoding="utf-8")
    _fsync(folder / MANIFEST)
    _fsync(folder)


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
    _fsync(target.parent)


def _fsync(path: Path) -> None:
    descriptor = os.open(path, os.O_RDONLY)
    try:
        os.fsync(descriptor)
    finally:
        os.close(descriptor)


def _sha256(path: Path) -> str:
    with path.open("rb") as file:
        return hashlib.file_digest(file, "sha256").hexdigest()


def verify(folder: Path) -> str | None:
    """Why the folder is not a whole checkpoint, or None when it is: manifest present, every size and checksum right."""
    try:
        manifest = json.loads((folder / MANIFEST).read_text(encoding="utf-8"))
        files = manifest["files"]
        if manifest["format"] != FORMAT:
            return f"format {manifest['format']} is not the one this version reads ({FORMAT})"
        for name, expected in files.items():
            path = folder / name
            if path.stat().st_size != expected["bytes"]:
                return f"{name} has {path.stat().st_size} bytes, {expected['bytes']} were written"
            if _sha256(path) != expected["sha256"]:
                return f"the checksum of {name} is wrong"
    except FileNotFoundError as error:
        return f"{Path(str(error.filename)).name} is missing"
    except (OSError, ValueError, KeyError, TypeError) as error:
        return f"{MANIFEST} cannot be read: {error}"
    return None


def read_tensors(folder: Path, part: str) -> dict[str, Tensor]:
    """``model``, ``optimizer`` or ``rng-00000`` of a verified checkpoint, on the CPU."""
    return load_file(folder / f"{part}.safetensors")


def read_info(folder: Path) -> dict[str, Any]:
    """``state.json`` of a verified checkpoint."""
    return json.loads((folder / "state.json").read_text(encoding="utf-8"))


def read_checkpoint(folder: Path) -> TrainingState:
    """A whole checkpoint, on the CPU."""
    info = read_info(folder)
    step = info.pop("step")
    model, optimizer, rng = (read_tensors(folder, part) for part in ("model", "optimizer", "rng-00000"))
    return TrainingState(step, model, optimizer, rng, info)

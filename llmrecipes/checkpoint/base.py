"""Checkpoints that hold only what is trained, and the weights they lie over: named, and refused when they changed."""

from __future__ import annotations

import hashlib
import os
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path
from typing import TypedDict

from llmrecipes.checkpoint.files import MANIFEST, read_info, verify
from llmrecipes.checkpoint.retention import newest_whole
from llmrecipes.errors import UserError


class Base(TypedDict):
    """What a checkpoint says of the frozen weights beneath it."""

    folder: str
    sha256: str


def describe_base(path: Path) -> Base:
    """What to record of the weights that a run begins with.

    Raises:
        UserError: nothing whole there.
    """
    folder = _folder(path)
    return {"folder": str(folder), "sha256": _digest(weight_folders(folder))}


def base_of(checkpoint: Path) -> Base | None:
    """The weights that a verified checkpoint lies over; None where it holds all of its model."""
    return ((read_info(checkpoint).get("progress") or {}).get("trajectory") or {}).get("base")


def weight_folders(path: Path) -> list[Path]:
    """Folders of safetensors that together are the model at ``path``; later ones win.

    Args:
        path: a run, a checkpoint, or a folder of safetensors.

    Raises:
        UserError: nothing whole there, or the frozen weights are missing or others than those it was trained on.
    """
    folder = _folder(path)
    if not (folder / MANIFEST).exists():
        return [folder]
    base = base_of(folder)
    if base is None:
        return [folder / "model"]
    try:
        below = weight_folders(Path(base["folder"]))
    except UserError as error:
        raise UserError(
            f"{folder} holds what was trained only, the rest is that of {base['folder']}: {error}"
        ) from None
    if _digest(below) != base["sha256"]:
        raise UserError(
            f"{folder} was trained over the weights of {base['folder']}, which have changed since: put them back, or "
            "train again"
        )
    return [*below, folder / "model"]


def _folder(path: Path) -> Path:
    """A folder of safetensors, or a verified checkpoint."""
    if (path / MANIFEST).exists():
        if reason := verify(path):
            raise UserError(f"{path} is no whole checkpoint: {reason}")
        return path
    if any(path.glob("*.safetensors")):
        return path
    root = path / "checkpoints" if (path / "checkpoints").is_dir() else path
    found, broken = newest_whole(root)
    if found is None:
        advice = "".join(f"; {sentence}" for sentence in broken)
        raise UserError(f"{path} holds no weights of a model{advice}")
    return found


def _digest(folders: list[Path]) -> str:
    """SHA-256 over the files' names and contents."""
    files = [file for folder in folders for file in sorted(folder.glob("*.safetensors"))]
    with ThreadPoolExecutor(min(8, os.cpu_count() or 1)) as pool:  # checksums free the interpreter
        lines = [f"{file.name} {one}\n" for file, one in zip(files, pool.map(_file_digest, files), strict=True)]
    return hashlib.sha256("".join(lines).encode()).hexdigest()


def _file_digest(path: Path) -> str:
    with path.open("rb") as file:
        return hashlib.file_digest(file, "sha256").hexdigest()

"""Which checkpoints there are, which one to go on from, and which ones may go."""

from __future__ import annotations

import os
import shutil
from collections.abc import Iterable, Iterator
from itertools import count
from pathlib import Path

from llmrecipes.checkpoint.files import step_of, verify


def checkpoints(root: Path) -> list[Path]:
    """Folders named like checkpoints, oldest first; complete or not."""
    if not root.is_dir():
        return []
    found = [(step, path) for path in root.iterdir() if path.is_dir() and (step := step_of(path)) is not None]
    return [path for _, path in sorted(found)]


def whole_checkpoints(root: Path, before: int | None = None) -> Iterator[Path | str]:
    """Newest first: the path of a checkpoint that verifies, or a sentence about one that does not.

    Each is verified when it is asked for: whoever takes the first does not wait for the others.

    Args:
        root: the run's ``checkpoints`` folder.
        before: only those of earlier steps; None = all.
    """
    for path in reversed(checkpoints(root)):
        step = step_of(path)
        if before is None or (step is not None and step < before):
            reason = verify(path)
            yield path if reason is None else f"{path} is broken and passed over: {reason}"


def newest_whole(root: Path, before: int | None = None) -> tuple[Path | None, list[str]]:
    """The newest checkpoint (of a step earlier than ``before``) that verifies, and one sentence for each newer one
    that does not."""
    broken: list[str] = []
    for found in whole_checkpoints(root, before):
        if isinstance(found, Path):
            return found, broken
        broken.append(found)
    return None, broken


def set_aside_after(root: Path, step: int) -> None:
    """Rename checkpoints of later steps to ``broken-...``: a resumed run passed them over and must not count them."""
    for path in checkpoints(root):
        if (later := step_of(path)) is not None and later > step:
            aside = root / f"broken-{path.name}"
            shutil.rmtree(aside, ignore_errors=True)
            path.rename(aside)


def quarantine(root: Path, step: int) -> list[Path]:
    """Rename checkpoints of steps later than ``step`` to ``quarantined-...``: a rollback distrusts them.

    They no longer count, nothing deletes them, and a second one of the same step gets a number.

    Returns:
        The new paths, the oldest step first.
    """
    renamed = []
    for path in checkpoints(root):
        if (later := step_of(path)) is not None and later > step:
            names = (f"quarantined-{path.name}{f'.{n}' if n > 1 else ''}" for n in count(1))
            aside = next(root / name for name in names if not (root / name).exists())
            renamed.append(path.rename(aside))
    return renamed


def remove_leftovers(root: Path) -> None:
    """Delete what killed writers left: hidden folders and links. Only the owner of the run calls this."""
    if root.is_dir():
        for path in root.iterdir():
            if path.name.startswith((".tmp-", ".old-")):
                shutil.rmtree(path, ignore_errors=True)
            elif path.name.startswith(".latest-"):
                path.unlink(missing_ok=True)


def point_latest(root: Path, target: Path) -> None:
    """Move the ``latest`` link, for people; resuming looks at the manifests instead."""
    temporary = root / f".latest-{os.getpid()}"
    temporary.unlink(missing_ok=True)
    temporary.symlink_to(target.name)
    temporary.replace(root / "latest")


def purge(root: Path, keep_last: int, keep_every: int | None, protected: Iterable[int]) -> list[Path]:
    """Delete the checkpoints that no rule keeps; called only after the newest one verified.

    Args:
        root: the run's ``checkpoints`` folder.
        keep_last: how many of the newest stay.
        keep_every: steps that are multiples of it stay for good.
        protected: steps that stay whatever the rules say (the best one).

    Returns:
        The removed folders.
    """
    found, keep = checkpoints(root), set(protected)
    removed = []
    for path in found[: max(0, len(found) - keep_last)]:
        step = step_of(path)
        if step in keep or (keep_every and step is not None and step % keep_every == 0):
            continue
        # The manifest goes first: a folder whose removal is cut short is then no checkpoint any more.
        (path / "manifest.json").unlink(missing_ok=True)
        shutil.rmtree(path, ignore_errors=True)
        removed.append(path)
    return removed

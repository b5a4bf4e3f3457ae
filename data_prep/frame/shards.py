"""Work cut by input file: in processes, in the tasks of a Slurm array, and resumable file by file.

A file is finished when its mark `<output>/.done/<pass>/<name>.json` exists; the mark is written after the results, and
holds the counts and the hash of the input. Everything that is written is a function of the input file and the recipe,
and gets its name at the end by renaming: two processes that do the same file by mistake write the same bytes, and a
process that is killed leaves nothing that counts.
"""

from __future__ import annotations

import hashlib
import json
import os
import time
from collections.abc import Callable, Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import Any, Protocol

from data_prep.frame.config import StageConfig, content
from data_prep.frame.records import ENDINGS, READABLE, Format, remove_leftovers, write_json
from data_prep.jsonl import fingerprint
from llmrecipes.errors import UserError

FORMAT = 1  # counts up when the same recipe would give other bytes
Advance = Callable[[int], None]


@dataclass(frozen=True)
class Shard:
    """One input file: where it is, and its name in the results (without ending)."""

    path: Path
    name: str


class Work(Protocol):
    """What is done with one file: a module-level function, so that processes can be handed it."""

    def __call__(self, config: Any, shard: Shard, output: Path, advance: Advance) -> dict[str, Any]:
        """Writes results under `output`, reports consumed bytes to `advance`, returns counts as plain data."""


def find_shards(inputs: list[str]) -> list[Shard]:
    """The files to read, in order of their names.

    A file's name in the results is its path below the folder that all have in common, so that files of the same name in
    different folders stay apart.

    Raises:
        UserError: an input is missing, given twice, or holds no JSONL.
    """
    files, problems = list[Path](), list[str]()
    for name in inputs:
        path = Path(name)
        if path.is_dir():
            inside = sorted(p for p in path.rglob("*") if p.name.endswith(READABLE) and not _hidden(p, path))
            if not inside:
                problems.append(f"{name}: no .jsonl, .jsonl.gz or .jsonl.zst file in this folder")
            files += inside
        elif not path.exists():
            problems.append(f"{name}: no such file or folder")
        else:
            files.append(path)
    twice = sorted({str(p) for p in files if files.count(p) > 1})
    problems += [f"{name}: given twice: its documents would count double; name it once" for name in twice]
    if problems:
        raise UserError(*problems)
    absolute = [path.absolute() for path in files]
    common = Path(os.path.commonpath([path.parent for path in absolute])) if files else Path()
    shards = [Shard(path, _stem(str(full.relative_to(common)))) for path, full in zip(files, absolute, strict=True)]
    by_name: dict[str, Path] = {}
    for shard in shards:
        if shard.name in by_name:
            raise UserError(f"{by_name[shard.name]} and {shard.path}: both would become {shard.name}; rename one")
        by_name[shard.name] = shard.path
    return sorted(shards, key=lambda shard: shard.name)


def result_file(output: Path, shard: Shard, format: Format) -> Path:
    """Where the results of a file go."""
    return output / f"{shard.name}{ENDINGS[format]}"


def open_output(stage: str, config: StageConfig, inputs: list[Shard]) -> Path:
    """The folder of the results, begun by this recipe or new.

    Raises:
        UserError: it holds something else, is one of the inputs, or was begun with another recipe.
    """
    output = Path(config.output)
    for shard in inputs:
        if shard.path.absolute().is_relative_to(output.absolute()):
            raise UserError(f"{output}: the results would go where the input {shard.path} is; choose another output")
    # Looked at before the mark is: another task of an array may begin right now, and makes the mark before any result.
    used = output.is_dir() and any(path.name != ".done" for path in output.iterdir())
    job = output / ".done" / "job.json"
    key: dict[str, Any] = {"stage": stage, "format": FORMAT, "recipe": content(config)}
    if job.is_file() and (begun := json.loads(job.read_text())) != json.loads(json.dumps(key)):
        if not config.overwrite:
            old, new = begun.get("recipe", {}), key["recipe"]
            other = [k for k in new if old.get(k) != json.loads(json.dumps(new[k]))] if begun["stage"] == stage else []
            what = f"other values of {', '.join(other)}" if other else f"another stage ({begun['stage']})"
            raise UserError(f"{output}: was made by {what}; choose another output, or say --overwrite true")
        _clear(output)
    elif not job.is_file() and used:
        raise UserError(f"{output}: is not empty, and not made by this command; choose another output")
    if not job.is_file():
        write_json(job, key)
    return output


def run_shards(
    work: Work, name: str, config: StageConfig, shards: list[Shard], output: Path
) -> dict[str, dict[str, Any]] | None:
    """Does `work` with every file that is not done yet (of this task's share), and returns the counts of all files.

    Returns:
        Counts by file name, or None when files of other tasks are still to be done.

    Raises:
        UserError: a worker process died, or `task` makes no sense.
    """
    marks = {shard: output / ".done" / name / f"{shard.name}.json" for shard in shards}
    mine = _share(shards, _task(config.task))
    left = [shard for shard in mine if not _is_done(marks[shard], shard)]
    if len(left) < len(mine):
        print(f"{name}: {len(mine) - len(left)} of {len(mine)} files are done already", flush=True)
    for shard in left:
        for leftover_of in (marks[shard], output / shard.name):
            remove_leftovers(leftover_of)
    _run_all(work, name, config, left, output, marks)
    counts = {shard.name: _read_mark(marks[shard]) for shard in shards}
    missing = [shard for shard in shards if counts[shard.name] is None]
    if missing:
        print(f"{name}: {len(missing)} of {len(shards)} files belong to other tasks and are not done yet", flush=True)
        return None
    return {key: value for key, value in counts.items() if value is not None}


def _run_all(
    work: Work, name: str, config: StageConfig, left: list[Shard], output: Path, marks: dict[Shard, Path]
) -> None:
    from concurrent.futures.process import BrokenProcessPool

    from tqdm import tqdm

    total = sum(shard.path.stat().st_size for shard in left)
    with tqdm(total=total, unit="B", unit_scale=True, desc=name, leave=False, disable=None) as bar:
        if config.workers == 1 or len(left) < 2:
            for shard in left:
                _do(work, config, shard, output, marks[shard], bar.update)
            return
        import multiprocessing
        from concurrent.futures import ProcessPoolExecutor, as_completed

        from data_prep.tokenize import _start_worker

        spawn = multiprocessing.get_context("spawn")  # a fork of a process with threads may hang
        with ProcessPoolExecutor(min(config.workers, len(left)), spawn, initializer=_start_worker) as executor:
            by_size = sorted(left, key=lambda shard: -shard.path.stat().st_size)  # the longest first: none waits for it
            futures = {executor.submit(_do, work, config, s, output, marks[s], _ignore): s for s in by_size}
            try:
                for future in as_completed(futures):
                    future.result()
                    bar.update(futures[future].path.stat().st_size)
            except BrokenProcessPool:
                raise UserError(
                    f"{name}: a worker process died, perhaps for want of memory; run the same command again with fewer "
                    f"--workers than {config.workers}: finished files are kept"
                ) from None
            except BaseException:
                executor.shutdown(cancel_futures=True)
                raise


def _do(work: Work, config: Any, shard: Shard, output: Path, mark: Path, advance: Advance) -> None:
    """One file, whole: work, then its mark."""
    started = time.process_time()
    counts = work(config, shard, output, advance)
    sha = fingerprint(shard.path)
    write_json(mark, {"input_sha256": sha, "counts": counts, "cpu_seconds": round(time.process_time() - started, 3)})


def _ignore(_: int) -> None:
    """Progress of another process is counted file by file."""


def _is_done(mark: Path, shard: Shard) -> bool:
    """Whether the file was done, and is still the same."""
    if not mark.is_file():
        return False
    if json.loads(mark.read_text())["input_sha256"] == fingerprint(shard.path):
        return True
    mark.unlink()
    return False


def _read_mark(mark: Path) -> dict[str, Any] | None:
    return json.loads(mark.read_text())["counts"] if mark.is_file() else None


def cpu_seconds(output: Path) -> float:
    """CPU time of all finished passes over files, over all processes and runs."""
    marks = [json.loads(mark.read_text()) for mark in (output / ".done").rglob("*.json")]
    return sum(mark.get("cpu_seconds", 0) for mark in marks if isinstance(mark, dict))


def _task(task: str | None) -> tuple[int, int]:
    """(number, count) of this task: as the recipe says, or as Slurm says for a job array."""
    if task is None:
        if "SLURM_ARRAY_TASK_ID" not in os.environ:
            return 0, 1
        first, step = int(os.environ.get("SLURM_ARRAY_TASK_MIN", 0)), int(os.environ.get("SLURM_ARRAY_TASK_STEP", 1))
        number = (int(os.environ["SLURM_ARRAY_TASK_ID"]) - first) // step
        task = f"{number}/{os.environ.get('SLURM_ARRAY_TASK_COUNT', 1)}"
        print(f"task {task} of the Slurm array", flush=True)
    share, slash, count = task.partition("/")
    if not (slash and share.isdecimal() and count.isdecimal() and 0 <= int(share) < int(count)):
        raise UserError(f"task: {task!r} is not i/N with 0 <= i < N, such as 0/4, 1/4, 2/4 and 3/4")
    return int(share), int(count)


def _share(shards: list[Shard], task: tuple[int, int]) -> list[Shard]:
    """The files of one task: every N-th by size, so that the shares are alike."""
    number, count = task
    by_size = sorted(shards, key=lambda shard: (-shard.path.stat().st_size, shard.name))
    return sorted(by_size[number::count], key=lambda shard: shard.name)


def _hidden(path: Path, folder: Path) -> bool:
    return any(part.startswith(".") for part in path.relative_to(folder).parts)


def _stem(name: str) -> str:
    for ending in sorted(READABLE, key=len, reverse=True):
        name = name.removesuffix(ending)
    return name


def _clear(output: Path) -> None:
    """Removes the results of an earlier recipe: only what this frame writes."""
    import shutil

    shutil.rmtree(output / ".done")
    for file in [*_results(output), output / "manifest.json"]:
        file.unlink(missing_ok=True)


def _results(output: Path) -> Iterator[Path]:
    yield from (path for path in output.rglob("*") if path.name.endswith(READABLE))


def sha256_of_results(output: Path) -> dict[str, str]:
    """SHA-256 of every result file by its name, for the manifest."""
    return {
        str(file.relative_to(output)): hashlib.sha256(file.read_bytes()).hexdigest()
        for file in sorted(_results(output))
        if not _hidden(file, output)
    }

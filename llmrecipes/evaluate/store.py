"""The folder of one task: what it belongs to, answers as they come, the result at the end. Torch-free."""

from __future__ import annotations

import hashlib
import json
from collections.abc import Iterator
from dataclasses import asdict
from pathlib import Path
from typing import Any

from data_prep.jsonl import fingerprint as of_file
from llmrecipes.errors import UserError
from llmrecipes.evaluate.config import TaskConfig

ANSWERS, RESULT, TASK, SUMMARY = "answers.jsonl", "result.json", "task.json", "summary.json"
WRITTEN = "written.jsonl"  # of mt_bench: answers that may not have been judged yet
SMALL = 1 << 20
LATER: dict[str, Any] = {"mt_bench": None}  # keys newer than some folders: with these values they change no answer


class Store:
    """Keeps a task's answers, so that a stopped evaluation goes on with the next question.

    Args:
        folder: of the task.
        made_of: what its answers depend on.
        overwrite: remove answers that depend on something else.

    Raises:
        UserError: the folder holds answers that depend on something else.
    """

    def __init__(self, folder: Path, made_of: dict[str, Any], overwrite: bool) -> None:
        self.folder = folder
        known = read_json(folder / TASK)
        if known is not None and known != made_of:
            other = [key for key in made_of if known.get(key) != made_of[key]]
            if not overwrite:
                raise UserError(
                    f"{folder}: holds answers made with another {', '.join(other) or 'recipe'}; "
                    "give another --output, or say --overwrite true"
                )
            for name in (RESULT, ANSWERS, WRITTEN):
                (folder / name).unlink(missing_ok=True)
        folder.mkdir(parents=True, exist_ok=True)
        write_json(folder / TASK, made_of)

    @property
    def result(self) -> dict[str, Any] | None:
        """What a finished task measured."""
        return read_json(self.folder / RESULT)

    def rows(self, name: str = ANSWERS) -> dict[int, dict[str, Any]]:
        """Answers by the id of their question; a last line cut short by a kill is taken off."""
        path = self.folder / name
        found, good = {}, 0
        for line in path.read_bytes().splitlines(keepends=True) if path.exists() else ():
            try:
                row = json.loads(line) if line.endswith(b"\n") else None
            except ValueError:
                row = None
            if row is None:
                break
            found[row["id"]], good = row, good + len(line)
        if path.exists() and path.stat().st_size != good:
            with path.open("r+b") as file:
                file.truncate(good)
        return found

    def append(self, rows: list[dict[str, Any]], name: str = ANSWERS) -> None:
        """Add answers."""
        with (self.folder / name).open("a", encoding="utf-8") as file:
            file.write("".join(json.dumps(row, ensure_ascii=False) + "\n" for row in rows))

    def replace(self, rows: list[dict[str, Any]]) -> None:
        """These answers and no others."""
        (self.folder / ANSWERS).unlink(missing_ok=True)
        self.append(rows)

    def finish(self, result: dict[str, Any]) -> None:
        """The task is done."""
        write_json(self.folder / RESULT, result)


def made_of(task: TaskConfig, model: str, how: dict[str, Any]) -> dict[str, Any]:
    """What the answers to a task depend on: the model, the task, the contents of its files, how it is asked."""
    named = {key: Path(name) for key in ("file", "few_shot_file") if (name := getattr(task, key))}
    files = {key: of_file(path) for key, path in named.items() if path.exists()}  # else a task of lm_eval's own
    fields = {key: value for key, value in asdict(task).items() if key not in files}
    fields = {key: value for key, value in fields.items() if key not in LATER or value != LATER[key]}
    if task.mt_bench is not None:
        fields["mt_bench"] = task.mt_bench.content()
    return {"model": model, "task": fields, "files": files, "how": how}


def model_fingerprint(folder: Path) -> str:
    """Tells models apart: names and sizes of all files and contents of the small ones (a checkpoint's manifest holds
    the checksums of its weights)."""
    digest = hashlib.sha256()
    for path in sorted(p for p in folder.rglob("*") if p.is_file() and not any(x.startswith(".") for x in p.parts)):
        size = path.stat().st_size
        digest.update(f"{path.relative_to(folder)} {size}\n".encode())
        if size <= SMALL:
            digest.update(path.read_bytes())
    return digest.hexdigest()[:16]


def read_json(path: Path) -> Any:
    """What a file holds; None when it is not there or was cut short."""
    try:
        return json.loads(path.read_text(encoding="utf-8"))
    except (FileNotFoundError, ValueError):
        return None


def write_json(path: Path, value: Any) -> None:
    """All of it or nothing."""
    temporary = path.with_name(f".{path.name}")
    temporary.write_text(json.dumps(value, ensure_ascii=False, indent=1), encoding="utf-8")
    temporary.replace(path)


def at_step(output: Path, name: str) -> Path:
    """The folder of an evaluation along a training: ``demo@000200`` for checkpoint ``step=000200``."""
    return output.with_name(f"{output.name}@{name.removeprefix('step=')}")


def step_of(name: str) -> tuple[str, int] | None:
    """The recipe and the step in the name of such a folder."""
    stem, at, step = name.rpartition("@")
    return (stem, int(step)) if at and step.isdecimal() else None


def evaluations(folder: Path) -> Iterator[Path]:
    """Folders of finished evaluations in ``folder`` or in its ``evaluation``."""
    for place in (folder, *sorted((folder / "evaluation").glob("*"))):
        if (place / SUMMARY).is_file():
            yield place

"""What a report shows, read from run folders and evaluations. Torch-free."""

from __future__ import annotations

import hashlib
import json
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import yaml

from llmrecipes.callbacks.metrics_file import read_metrics
from llmrecipes.convert.origin import ORIGIN
from llmrecipes.errors import UserError
from llmrecipes.evaluate.store import ANSWERS, SUMMARY, evaluations, read_json, step_of
from llmrecipes.recipe import diff, read_recipe
from llmrecipes.recipe.yaml_file import read_yaml_file

MODEL_FILE = "model.yaml"


@dataclass
class Run:
    """A run folder, or a bare evaluation.

    Attributes:
        name: tells it from the others of the report.
        folder: where it is.
        recipe: resolved; {} where there is none.
        records: of metrics.jsonl.
        launches: of environment.json, newest last.
        summaries: of its evaluations, each with its rows of answers; of those along the training the newest.
        earlier: the others along the training, without answers.
    """

    name: str
    folder: Path
    recipe: dict[str, Any] = field(default_factory=dict)
    records: list[dict[str, Any]] = field(default_factory=list)
    launches: list[dict[str, Any]] = field(default_factory=list)
    summaries: list[dict[str, Any]] = field(default_factory=list)
    earlier: list[dict[str, Any]] = field(default_factory=list)

    @property
    def steps(self) -> list[dict[str, Any]]:
        """Records of training steps."""
        return [r for r in self.records if "loss" in r and "tokens" in r]

    @property
    def validations(self) -> list[dict[str, Any]]:
        """Records of validations."""
        return [r for r in self.records if "val_loss" in r]

    def setting(self, *path: str) -> Any:
        """A value of the recipe, None where there is none."""
        value: Any = self.recipe
        for key in path:
            value = value.get(key) if isinstance(value, dict) else None
        return value


def read_runs(folders: list[Path]) -> list[Run]:
    """The runs.

    Raises:
        UserError: folders that hold neither a run nor an evaluation.
    """
    problems, found = [], list[Run]()
    for folder in folders:
        if folder.resolve() in [run.folder.resolve() for run in found]:
            problems.append(f"{folder}: given twice")
        elif not folder.is_dir():
            problems.append(f"{folder}: no such folder")
        elif not (folder / "recipe.yaml").is_file() and not list(evaluations(folder)):
            problems.append(f"{folder}: neither a run folder (recipe.yaml) nor an evaluation ({SUMMARY})")
        else:
            found.append(_read_run(folder, [run.name for run in found]))
    if problems:
        raise UserError(*problems)
    return found


def _read_run(folder: Path, taken: list[str]) -> Run:
    name = folder.resolve().name
    run = Run(name if name not in taken else str(folder), folder)
    if (folder / "recipe.yaml").is_file():
        run.recipe = _recipe(folder / "recipe.yaml")
    run.records = list(read_metrics(folder / "metrics.jsonl"))
    run.launches = read_json(folder / "environment.json") or []
    places = list(evaluations(folder))
    newest = dict(sorted(filter(None, (step_of(place.name) for place in places))))
    for place in places:
        summary = read_json(place / SUMMARY)
        if summary is None:
            raise UserError(f"{place / SUMMARY}: cut short; repeat llmrecipes evaluate, which goes on where it stopped")
        summary["name"] = place.name
        along = step_of(place.name)
        if along is not None and along[1] != newest[along[0]]:
            run.earlier.append(summary)
            continue
        summary["rows"] = {task["task"]: _rows(place / task["task"] / ANSWERS) for task in summary["tasks"]}
        run.summaries.append(summary)
    return run


def _rows(path: Path) -> list[dict[str, Any]]:
    if not path.exists():
        return []
    return [json.loads(line) for line in path.read_bytes().splitlines()]


def _recipe(path: Path) -> dict[str, Any]:
    file = read_yaml_file(path)
    if file.problems:
        raise UserError(*map(str, file.problems))
    return dict(file.data)


def recipe_difference(a: Path, b: Path) -> list[str]:
    """``key: old -> new`` for recipes, then for the code and packages of the newest launches.

    Raises:
        UserError: a path is neither a run folder nor a recipe.
    """
    recipes, launches = [], []
    for path in (a, b):
        file = path / "recipe.yaml" if path.is_dir() else path
        if not file.is_file():
            raise UserError(f"{path}: neither a run folder (recipe.yaml in it) nor a recipe")
        recipes.append(read_recipe([file]).data if not path.is_dir() else _recipe(file))
        known = read_json(path / "environment.json") if path.is_dir() else None
        launches.append(_versions(known[-1]) if known else None)
    lines = diff(recipes[0], recipes[1])
    if None not in launches:
        lines += [f"environment.{line}" for line in diff(launches[0] or {}, launches[1] or {})]
    return lines


def _versions(launch: dict[str, Any]) -> dict[str, Any]:
    commit = (launch.get("git") or {}).get("commit")
    return {key: launch.get(key) for key in ("llmrecipes", "python", "packages", "gpus")} | {"commit": commit}


@dataclass(frozen=True)
class Ancestor:
    """One generation of a model.

    Attributes:
        name: of the run or folder.
        folder: where it was found, or as the recipe names it.
        facts: what is known of it, as pairs to show.
    """

    name: str
    folder: str
    facts: list[tuple[str, str]]


def lineage(run: Run) -> list[Ancestor]:
    """Where a model came from, oldest first: each run's ``init_from`` is followed while folders are found."""
    chain: list[Ancestor] = []
    folder: Path | None = run.folder
    seen = set[Path]()
    while folder is not None and folder.resolve() not in seen:
        seen.add(folder.resolve())
        recipe = _recipe(folder / "recipe.yaml") if (folder / "recipe.yaml").is_file() else {}
        one = Run(folder.name, folder, recipe)
        if (folder / "metrics.jsonl").is_file():
            one.records = list(read_metrics(folder / "metrics.jsonl"))
        one.launches = read_json(folder / "environment.json") or []
        chain.insert(0, Ancestor(recipe.get("name") or folder.name, str(folder), _facts(one)))
        start = one.setting("model", "init_args", "init_from") or (read_json(folder / ORIGIN) or {}).get("base")
        if not isinstance(start, str):
            break
        following = _find(start, folder)
        if following is None:
            chain.insert(0, Ancestor(Path(start).name, start, [("", "not found from here")]))
        folder = following
    return chain


def _part(name: str, folder: Path) -> str:
    """An expert of a merge, and how long it was trained, where its run is found."""
    found = _find(name, folder)
    steps = Run(name, found, records=list(read_metrics(found / "metrics.jsonl"))).steps if found is not None else []
    return f"{name} ({steps[-1]['step']:,} steps, {steps[-1]['tokens']:,} tokens)" if steps else name


def _find(name: str, run: Path) -> Path | None:
    """A folder that a recipe names from where it was started: here, or in a folder above the run."""
    places = [Path(name), *(parent / name for parent in run.resolve().parents)]
    found = next((place for place in places if place.is_dir()), None)
    if found is not None and found.parent.name == "checkpoints":  # a checkpoint stands for its run
        return found.parent.parent
    return found


def _facts(run: Run) -> list[tuple[str, str]]:
    facts = list[tuple[str, str]]()
    if run.recipe:
        stage = run.setting("model", "class_path")
        text = json.dumps(run.recipe, sort_keys=True, ensure_ascii=False)
        facts.append(("stage", str(stage or "").rpartition(".")[2]))
        facts.append(("recipe", hashlib.sha256(text.encode()).hexdigest()[:12]))
        mix = data_mix(run)
        facts.append(("data", ", ".join(f"{name} {share:.0%}" for name, share in mix) or "-"))
    elif (run.folder / MODEL_FILE).is_file():
        origin = read_json(run.folder / ORIGIN) or {}
        facts.append(("made by", f"llmrecipes {origin.get('command', 'convert')}"))
        facts += [("of", _part(name, run.folder)) for name in origin.get("parts", ())]
        facts += [(k, str(v)) for k, v in _recipe(run.folder / MODEL_FILE).items() if isinstance(v, str | int | float)]
    elif (run.folder / "config.json").is_file():
        config = read_json(run.folder / "config.json") or {}
        facts.append(("Hugging Face folder", str(config.get("model_type", ""))))
    if run.steps:
        last = run.steps[-1]
        facts.append(("trained", f"{last['step']:,} steps, {last['tokens']:,} tokens"))
    steps = sorted(p.name for p in (run.folder / "checkpoints").glob("step=*"))
    if steps:
        facts.append(("checkpoints", ", ".join(steps)))
    if run.launches:
        newest = run.launches[-1]
        commit = (newest.get("git") or {}).get("commit")
        code = commit[:12] if commit else "no repository"
        facts.append(("launches", f"{len(run.launches)}, the last {newest.get('time', '?')}"))
        facts.append(("code", f"llmrecipes {newest.get('llmrecipes', '?')}, {code}"))
    return facts


def data_mix(run: Run) -> list[tuple[str, float]]:
    """Sources of the training data and the share of each, as the recipe weighs them."""
    train = run.setting("data", "init_args", "train")
    if not isinstance(train, dict) or not all(isinstance(w, int | float) for w in train.values()):
        return []
    total = sum(train.values()) or 1
    return [(_short(name), weight / total) for name, weight in train.items()]


def _short(name: str) -> str:
    return Path(name).name.removesuffix(".gz").removesuffix(".zst").removesuffix(".jsonl")


def dump(value: Any) -> str:
    """A recipe as YAML."""
    return yaml.safe_dump(value, sort_keys=False, allow_unicode=True)

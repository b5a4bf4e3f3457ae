"""A recipe as it stands after several files and the command line: plain values, and where each came from."""

from __future__ import annotations

import copy
from collections.abc import Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

from llmrecipes.errors import UserError
from llmrecipes.recipe.problem import Path as Keys
from llmrecipes.recipe.problem import Problem, dotted
from llmrecipes.recipe.schema import free_mapping, type_below
from llmrecipes.recipe.signatures import Sources
from llmrecipes.recipe.types import Anything, Root, Type
from llmrecipes.recipe.yaml_file import parse_value, read_yaml_file

# Text, whatever YAML would make of it: ``--name 7b`` and ``--name 7`` alike.
_TEXT_KEYS = {("name",), ("run_root",), ("resume",)}


@dataclass
class Recipe:
    """The merged recipe.

    Args:
        data: plain dicts, lists and scalars.
        origins: path -> ``file:line`` or ``command line: --a.b.c``.
        problems: slips of reading (syntax, missing files); empty in what :func:`read_recipe` returns.
        notes: what merging decided on its own, one sentence each, for the log.
        texts: path -> the text as typed, for values from the command line.
    """

    data: dict[str, Any] = field(default_factory=dict)
    origins: dict[Keys, str] = field(default_factory=dict)
    problems: list[Problem] = field(default_factory=list)
    notes: list[str] = field(default_factory=list)
    texts: dict[Keys, str] = field(default_factory=dict)

    def where(self, path: Keys = ()) -> str:
        """Where the value at ``path``, or the nearest thing that holds it, was written."""
        for length in range(len(path), -1, -1):
            origin = self.origins.get(tuple(path[:length]))
            if origin is not None:
                return origin
        return "recipe"

    def get(self, path: Keys) -> Any:
        """The value at ``path``; None where there is none."""
        value: Any = self.data
        for key in path:
            if isinstance(value, dict) and isinstance(key, str):
                value = value.get(key)
            elif isinstance(value, list) and isinstance(key, int) and key < len(value):
                value = value[key]
            else:
                return None
        return value

    def rename(self, path: Keys, name: str) -> None:
        """Move the value at ``path`` to the key ``name`` beside it; it keeps its origin."""
        holder = self.get(path[:-1])
        holder[name] = holder.pop(path[-1])
        for table in (self.origins, self.texts):
            for key in [key for key in table if key[: len(path)] == path]:
                table[(*path[:-1], name, *key[len(path) :])] = table.pop(key)  # type: ignore[attr-defined]

    def copy(self) -> Recipe:
        """An independent copy."""
        return Recipe(
            copy.deepcopy(self.data), dict(self.origins), list(self.problems), list(self.notes), dict(self.texts)
        )


def read_recipe(paths: Sequence[Path], overrides: Sequence[str] = ()) -> Recipe:
    """Read and merge recipe files, later ones winning, then ``--a.b.c value`` or ``--a.b.c=value``.

    Mappings merge, lists and free mappings (such as ``data.init_args.train``) replace, and a ``class_path`` that
    differs keeps only the arguments that the new class knows: as jsonargparse does. ``--a.b+=value`` appends to a list.

    Raises:
        UserError: files or arguments that cannot be read, all of them at once. Whether the content makes sense is for
            :func:`llmrecipes.recipe.check` to say.
    """
    recipe = scan_recipe(paths, overrides)
    if recipe.problems:
        raise UserError(*map(str, recipe.problems))
    return recipe


def scan_recipe(paths: Sequence[Path], overrides: Sequence[str] = (), sources: Sources | None = None) -> Recipe:
    """As :func:`read_recipe`, but never raises: what went wrong is in ``problems``."""
    recipe = Recipe()
    merger = _Merger(recipe, sources or Sources())
    for path in paths:
        file = read_yaml_file(Path(path))
        recipe.problems += file.problems
        recipe.origins.setdefault((), f"{path}:1")
        merger.origins = file.origins
        recipe.data = merger.merge(recipe.data, file.data, (), Root())
    for key, text, append in _split_overrides(overrides, recipe.problems):
        merger.override(key, text, append)
    return recipe


def _split_overrides(arguments: Sequence[str], problems: list[Problem]) -> list[tuple[str, str, bool]]:
    """``(dotted key, text of the value, append?)`` of each override."""
    found = []
    rest = list(arguments)
    while rest:
        token = rest.pop(0)
        key, equals, text = token.removeprefix("--").partition("=")
        if not token.startswith("--") or not key.strip("+"):
            problems.append(Problem(f"command line: {token}", "expected --key value", "write --trainer.max_steps 100"))
            continue
        if not equals:
            if not rest or rest[0].startswith("--"):
                problems.append(Problem(f"command line: {token}", "the value is missing"))
                continue
            text = rest.pop(0)
        found.append((key.rstrip("+"), text, key.endswith("+")))
    return found


class _Merger:
    """Merging that follows the types, so that it decides as jsonargparse will."""

    def __init__(self, recipe: Recipe, sources: Sources) -> None:
        self.recipe = recipe
        self.sources = sources
        self.origins: dict[Keys, str] = {}

    def merge(self, old: Any, new: Any, path: Keys, kind: Type) -> Any:
        """``new`` over ``old``; the origins of what comes from ``new`` are taken over."""
        if not isinstance(new, dict) or not isinstance(old, dict) or (path and free_mapping(kind, new)):
            if isinstance(old, dict) and "class_path" in old and _is_class_path(new):
                self._take(path, deep=False)
                self.origins[(*path, "class_path")] = self.origins.get(path, "recipe")
                return self.merge(old, {"class_path": new}, path, kind)
            self._take(path, deep=True)
            return new
        if "class_path" in old and new.get("class_path", old["class_path"]) != old["class_path"]:
            old = self._change_class(old, new, path)
        result = dict(old)
        for key, value in new.items():
            below = (*path, key)
            self._take(below, deep=key not in old)
            if key not in old:
                result[key] = value
                continue
            inner = type_below({**old, **new} if key == "init_args" else old, key, kind, self.sources)
            result[key] = self.merge(old[key], value, below, inner)
        return result

    def _change_class(self, old: dict[str, Any], new: dict[str, Any], path: Keys) -> dict[str, Any]:
        symbol = self.sources.find(str(new["class_path"]))
        signature = self.sources.signature(symbol) if symbol else None
        arguments = old.get("init_args")
        if signature is None or signature.open or not isinstance(arguments, dict):
            return old
        dropped = [key for key in arguments if key not in signature.parameters]
        if dropped:
            names = ", ".join(map(str, dropped))
            self.recipe.notes.append(f"{dotted(path)}: {new['class_path']} does not know {names}, dropped")
        for key in dropped:
            self._forget((*path, "init_args", key))
        return {**old, "init_args": {k: v for k, v in arguments.items() if k not in dropped}}

    def _take(self, path: Keys, deep: bool) -> None:
        """Take over the origin of ``path`` from the newer file, and of all below it where that replaces the old."""
        if deep:
            self._forget(path)
            size = len(path)
            self.recipe.origins.update({k: v for k, v in self.origins.items() if k[:size] == path and k})
        elif path in self.origins:
            self.recipe.origins[path] = self.origins[path]

    def _forget(self, path: Keys) -> None:
        for table in (self.recipe.origins, self.recipe.texts):
            for key in [k for k in table if k[: len(path)] == path and k]:
                del table[key]  # type: ignore[attr-defined]

    def override(self, key: str, text: str, append: bool) -> None:
        """Set the value at a dotted key, as the command line does."""
        holder: Any = self.recipe.data
        where = f"command line: --{key}"
        kind: Type = Root()
        path: Keys = ()
        parts = key.split(".")
        for i, part in enumerate(parts):
            if _in_init_args(holder, part):  # --data.seq_len is short for --data.init_args.seq_len
                kind = type_below(holder, "init_args", kind, self.sources)
                holder, path = holder.setdefault("init_args", {}), (*path, "init_args")
                self.recipe.origins.setdefault(path, where)
            if not isinstance(holder, dict):
                self.recipe.problems.append(Problem(where, f"{dotted(path)} holds a value, not keys", path=path))
                return
            kind = type_below(holder, part, kind, self.sources)
            path = (*path, part)
            if i < len(parts) - 1:
                if holder.get(part) is None:
                    holder[part] = {}
                    self.recipe.origins[path] = where
                elif _is_class_path(holder[part]):
                    holder[part] = {"class_path": holder[part]}
                holder = holder[part]
        value = text if path in _TEXT_KEYS else parse_value(text)
        if append:
            present = holder.get(parts[-1])
            value = [*(present if isinstance(present, list) else [] if present is None else [present]), value]
        self.origins = {path: where}
        old = holder.get(parts[-1])
        holder[parts[-1]] = self.merge(old, value, path, kind if isinstance(value, dict) else Anything())
        if not append:
            self.recipe.texts[path] = text


def _in_init_args(holder: Any, key: str) -> bool:
    return (
        isinstance(holder, dict)
        and isinstance(holder.get("class_path"), str)
        and key not in ("class_path", "init_args", "dict_kwargs")
        and isinstance(holder.get("init_args", {}), dict)
    )


def _is_class_path(value: object) -> bool:
    return isinstance(value, str) and "." in value and all(part.isidentifier() for part in value.split("."))

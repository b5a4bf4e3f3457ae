"""Checking the values of a recipe against types, collecting every problem.

A misspelt key is repaired in the checker's own copy: its content is checked under the intended name, and rules that
look for that name find it.
"""

from __future__ import annotations

from collections.abc import Iterable
from typing import Any

from llmrecipes.recipe.duration import Duration
from llmrecipes.recipe.problem import Path, Problem, closest, did_you_mean, dotted
from llmrecipes.recipe.recipe import Recipe
from llmrecipes.recipe.schema import ADVICE, CLASS_KEYS, class_signature, parameter_type
from llmrecipes.recipe.signatures import Signature, Sources, Symbol
from llmrecipes.recipe.time_span import TimeSpan
from llmrecipes.recipe.types import (
    DictOf,
    Instance,
    Length,
    ListOf,
    OneOf,
    Scalar,
    Span,
    TupleOf,
    Type,
    Union,
    describe,
)


class Checker:
    """Walks ``recipe`` (repairing misspelt keys in it) and fills ``problems``."""

    def __init__(self, recipe: Recipe, sources: Sources) -> None:
        self.recipe = recipe
        self.sources = sources
        self.problems: list[Problem] = []

    def report(self, path: Path, what: str, hint: str = "") -> None:
        """Add a problem at ``path``."""
        self.problems.append(Problem(self.recipe.where(path), what, hint, path))

    def value(self, value: Any, kind: Type, path: Path) -> None:
        """Check one value."""
        if isinstance(kind, Union):
            self._union(value, kind, path)
        elif isinstance(kind, Instance):
            self._instance(value, kind, path)
        elif isinstance(kind, Length):
            self._length(value, path)
        elif isinstance(kind, Span):
            self._span(value, path)
        elif isinstance(kind, ListOf | TupleOf):
            self._list(value, kind, path)
        elif isinstance(kind, DictOf):
            self._dict(value, kind, path)
        elif isinstance(kind, Scalar | OneOf) and not self._is_scalar(value, kind, path):
            what = f"{dotted(path)}: expected {describe(kind)}, not {_shown(value)}"
            self.report(path, what, _near_literal(value, kind))

    def _is_scalar(self, value: Any, kind: Scalar | OneOf, path: Path) -> bool:
        if isinstance(kind, OneOf):
            return any(value == v and type(value) is type(v) for v in kind.values)
        if kind.name == "str":
            return isinstance(value, str) or path in self.recipe.texts
        if kind.name == "None":
            return value is None
        if isinstance(value, bool) or kind.name == "bool":
            return isinstance(value, bool) and kind.name == "bool"
        return isinstance(value, int) or (kind.name == "float" and isinstance(value, float))

    def _length(self, value: Any, path: Path) -> None:
        if isinstance(value, dict) and value.keys() == {"value", "unit"}:  # as --print_config may write it
            value = f"{value['value']} {value['unit']}"
        if isinstance(value, dict | list) or value is None:
            self.report(path, f"{dotted(path)}: expected {describe(Length())}, not {_shown(value)}")
            return
        try:
            Duration.parse(value)
        except (ValueError, OverflowError) as error:
            self.report(path, f"{dotted(path)}: {error}")

    def _span(self, value: Any, path: Path) -> None:
        if isinstance(value, dict | list) or value is None:
            self.report(path, f"{dotted(path)}: expected {describe(Span())}, not {_shown(value)}")
            return
        try:
            TimeSpan.parse(value)
        except ValueError as error:
            self.report(path, f"{dotted(path)}: {error}")

    def _list(self, value: Any, kind: ListOf | TupleOf, path: Path) -> None:
        if not isinstance(value, list):
            self.report(path, f"{dotted(path)}: expected {describe(kind)}, not {_shown(value)}")
            return
        if isinstance(kind, TupleOf) and len(value) != len(kind.items):
            self.report(path, f"{dotted(path)}: expected {describe(kind)}, not {len(value)}")
            return
        kinds = kind.items if isinstance(kind, TupleOf) else (kind.item,) * len(value)
        for i, (item, inner) in enumerate(zip(value, kinds, strict=True)):
            self.value(item, inner, (*path, i))

    def _dict(self, value: Any, kind: DictOf, path: Path) -> None:
        if not isinstance(value, dict):
            self.report(path, f"{dotted(path)}: expected a mapping, not {_shown(value)}")
            return
        for key, item in value.items():
            self.value(item, kind.value, (*path, key))

    def _union(self, value: Any, kind: Union, path: Path) -> None:
        """Silent when any option fits; else the complaints of the option that looks like the value."""
        first = len(self.problems)
        attempts: list[list[Problem]] = []
        options = [option for option in kind.options if option != Scalar("None") or value is None]
        for option in sorted(options, key=lambda option: not isinstance(option, Scalar | OneOf)):
            self.value(value, option, path)
            found, self.problems[first:] = self.problems[first:], []
            if not found:
                return
            attempts.append(found)
        deep = [found for found in attempts if any(len(p.path) > len(path) for p in found)]
        if deep or len(attempts) == 1:
            self.problems += sorted(deep or attempts, key=len)[0]
            return
        near = next((_near_literal(value, option) for option in options if isinstance(option, OneOf)), "")
        self.report(path, f"{dotted(path)}: expected {describe(kind)}, not {_shown(value)}", near)

    def _instance(self, value: Any, kind: Instance, path: Path) -> None:
        if isinstance(value, dict) and "class_path" not in value and kind.is_dataclass and kind.symbol:
            signature = self.sources.signature(kind.symbol)
            if signature:
                self.arguments(value, signature, path, kind.symbol.name)
        elif isinstance(value, dict):
            self._class(value, kind.symbol, path)
        elif isinstance(value, str) and not kind.is_dataclass and "." in value:
            self._class({"class_path": value}, kind.symbol, path)
        else:
            self.report(path, f"{dotted(path)}: expected {describe(kind)}, not {_shown(value)}")

    def _class(self, value: dict[str, Any], base: Symbol | None, path: Path) -> None:
        self.keys(value, CLASS_KEYS, path, "goes beside class_path", hint="arguments go under init_args")
        class_path = value.get("class_path")
        if "class_path" not in value:
            self.report(path, f"{dotted(path)}: class_path is missing", "name the class, such as package.module.Class")
            return
        if not isinstance(class_path, str):
            self.report((*path, "class_path"), f"{dotted(path)}.class_path: expected text, not {_shown(class_path)}")
            return
        symbol = self.sources.find(class_path)
        if symbol is None:
            near = self.sources.suggest(class_path)
            hint = did_you_mean(near) or "write the whole path, package.module.Class, of an installed package"
            self.report((*path, "class_path"), f"{dotted(path)}: there is no class '{class_path}'", hint)
            return
        if base is not None and self.sources.is_subclass(symbol, base) is False:
            self.report((*path, "class_path"), f"{dotted(path)}: {class_path} is no {base.name}")
            return
        signature = class_signature(class_path, self.sources)
        if signature:
            self.arguments(value.get("init_args"), signature, (*path, "init_args"), symbol.name)

    def arguments(self, values: Any, signature: Signature, path: Path, owner: str) -> None:
        """Check the arguments given to a class: unknown ones, missing ones, and each value."""
        if values is not None and not isinstance(values, dict):
            self.report(path, f"{dotted(path)}: expected a mapping of arguments, not {_shown(values)}")
            return
        values = {} if values is None else values
        excused = self.keys(values, signature.parameters, path, f"is not an argument of {owner}", signature.open)
        for name, parameter in signature.parameters.items():
            if name in values:
                self.value(values[name], parameter_type(parameter, self.sources), (*path, name))
            elif parameter.required and name not in excused:
                self.report(path, f"{dotted((*path, name))} is missing: {owner} needs it")

    def keys(
        self, values: dict[str, Any], known: Iterable[str], path: Path, what: str, any_key: bool = False, hint: str = ""
    ) -> set[str]:
        """Report keys that are not ``known`` and rename the misspelt ones; returns names that several keys missed."""
        known = list(known)
        excused: set[str] = set()
        for key in [key for key in values if key not in known]:
            near = None if key in ADVICE else closest(key, known, cutoff=0.85 if any_key else 0.6)
            if any_key and near is None:
                continue
            accepted = ", ".join(known) if 0 < len(known) <= 12 else ""
            advice = (
                ADVICE.get(key) or did_you_mean(near) or hint or (f"known: {accepted}" if accepted else "remove it")
            )
            self.report((*path, key), f"unknown key '{dotted((*path, key))}': it {what}", advice)
            if near is not None and near not in values:
                self.recipe.rename((*path, key), near)
            elif near is not None:
                excused.add(near)
        return excused


def _near_literal(value: object, kind: Scalar | OneOf) -> str:
    """The hint for a misspelt choice."""
    if not isinstance(kind, OneOf) or not isinstance(value, str):
        return ""
    return did_you_mean(closest(value, [str(v) for v in kind.values]))


def _shown(value: object) -> str:
    """The value as the user wrote it, short."""
    if isinstance(value, dict):
        return "a mapping"
    if isinstance(value, list):
        return "a list"
    if value is None:
        return "null"
    if isinstance(value, bool):
        return str(value).lower()
    text = f"'{value}'" if isinstance(value, str) else str(value)
    return text if len(text) <= 60 else f"{text[:57]}..."

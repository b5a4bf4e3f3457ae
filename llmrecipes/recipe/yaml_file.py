"""Strict YAML: plain values plus the line each came from, and every slip as a :class:`Problem`.

Scalars are read exactly as jsonargparse (which builds the objects) reads them: YAML 1.1 without dates, with ``1e-3`` a
float. What differs is only what is refused: duplicate keys, keys that are not text, files that hold no mapping.
"""

from __future__ import annotations

import re
from pathlib import Path
from typing import Any

import yaml

from llmrecipes.recipe.problem import Path as Keys
from llmrecipes.recipe.problem import Problem, dotted

_FLOAT = re.compile(
    r"""^(?:[-+]?[0-9][0-9_]*\.[0-9_]*(?:[eE][-+]?[0-9]+)?
    |[-+]?[0-9][0-9_]*[eE][-+]?[0-9]+
    |\.[0-9_]+(?:[eE][-+][0-9]+)?
    |[-+]?[0-9][0-9_]*(?::[0-5]?[0-9])+\.[0-9_]*
    |[-+]?\.(?:inf|Inf|INF)
    |\.(?:nan|NaN|NAN))$""",
    re.VERBOSE,
)
_MERGE = "tag:yaml.org,2002:merge"


class RecipeLoader(yaml.SafeLoader):
    """SafeLoader with jsonargparse's scalars: no dates, floats without a point."""


RecipeLoader.yaml_implicit_resolvers = {
    first: [(tag, regexp) for tag, regexp in resolvers if not tag.endswith((":timestamp", ":float"))]
    for first, resolvers in yaml.SafeLoader.yaml_implicit_resolvers.items()
}
RecipeLoader.add_implicit_resolver("tag:yaml.org,2002:float", _FLOAT, list("-+0123456789."))


class YamlFile:
    """One parsed text: ``data`` (plain values), ``origins`` (path -> ``file:line``) and ``problems``."""

    def __init__(self, text: str, name: str) -> None:
        self.name = name
        self.data: Any = None
        self.origins: dict[Keys, str] = {}
        self.problems: list[Problem] = []
        self._flattened: set[int] = set()
        self._open: set[int] = set()
        try:
            self._loader = RecipeLoader(text)
            node = self._loader.get_single_node()
            self.data = None if node is None else self._value(node, ())
        except yaml.MarkedYAMLError as error:
            mark = error.problem_mark or error.context_mark
            what = ", ".join(part for part in (error.context, error.problem) if part)
            self._problem(mark.line + 1 if mark else 1, f"this is not YAML: {what}")
        except yaml.reader.ReaderError as error:
            line = text.count("\n", 0, error.position) + 1
            self._problem(line, f"this is not text: it holds the control character #x{error.character:04x}")
        except RecursionError:
            self._problem(1, "values are nested too deeply")

    def _problem(self, line: int, what: str, hint: str = "", path: Keys = ()) -> None:
        self.problems.append(Problem(f"{self.name}:{line}", what, hint, path))

    def _value(self, node: yaml.Node, path: Keys) -> Any:
        self.origins.setdefault(path, self._line(node))
        if id(node) in self._open:
            self._problem(node.start_mark.line + 1, f"{dotted(path)}: an alias that holds itself", path=path)
            return None
        self._open.add(id(node))
        try:
            if isinstance(node, yaml.MappingNode):
                return self._mapping(node, path)
            if isinstance(node, yaml.SequenceNode):
                return [self._value(item, (*path, i)) for i, item in enumerate(node.value)]
            return self._scalar(node, path)
        finally:
            self._open.discard(id(node))

    def _scalar(self, node: yaml.Node, path: Keys) -> Any:
        try:
            return self._loader.construct_object(node)
        except (yaml.YAMLError, ValueError, KeyError, IndexError, OverflowError, AttributeError):
            what = f"{dotted(path)}: '{node.value}' cannot be read as {node.tag.rpartition(':')[2]}"
            self._problem(node.start_mark.line + 1, what, path=path)
            return None

    def _mapping(self, node: yaml.MappingNode, path: Keys) -> dict[str, Any]:
        if id(node) not in self._flattened:
            self._refuse_duplicates(node, path)
            self._loader.flatten_mapping(node)
            self._flattened.add(id(node))
        result: dict[str, Any] = {}
        for key_node, value_node in node.value:
            key = self._scalar(key_node, path) if isinstance(key_node, yaml.ScalarNode) else None
            if not isinstance(key, str):
                hint = "write it in quotes" if isinstance(key_node, yaml.ScalarNode) else ""
                what = (
                    f"the key '{key_node.value}' is not text but {type(key).__name__}" if hint else "a key is not text"
                )
                self._problem(key_node.start_mark.line + 1, what, hint, path)
                continue
            below = (*path, key)
            self.origins.pop(below, None)
            self.origins[below] = self._line(key_node)
            result[key] = self._value(value_node, below)
        return result

    def _refuse_duplicates(self, node: yaml.MappingNode, path: Keys) -> None:
        first: dict[str, int] = {}
        for key_node, _ in node.value:
            if not isinstance(key_node, yaml.ScalarNode) or key_node.tag == _MERGE:
                continue
            line = key_node.start_mark.line + 1
            if key_node.value in first:
                key = dotted((*path, key_node.value))
                hint = "keep one of the two"
                self._problem(line, f"{key} is given twice, first in line {first[key_node.value]}", hint, path)
            first.setdefault(key_node.value, line)

    def _line(self, node: yaml.Node) -> str:
        return f"{self.name}:{node.start_mark.line + 1}"


def read_yaml_file(path: Path) -> YamlFile:
    """Read a file that must hold a mapping; whatever is wrong with it is in ``problems``, never raised."""
    empty = YamlFile("", str(path))

    def refuse(what: str, hint: str = "") -> YamlFile:
        empty.data = {}
        empty.problems.append(Problem(str(path), what, hint))
        return empty

    try:
        text = path.read_bytes().decode("utf-8-sig")
    except FileNotFoundError:
        return refuse("no such file")
    except IsADirectoryError:
        return refuse("this is a folder, not a recipe", "name the YAML file in it")
    except UnicodeDecodeError:
        return refuse("this is not a text file in UTF-8")
    except (OSError, ValueError) as error:
        return refuse(f"cannot be read: {getattr(error, 'strerror', None) or error}")
    file = YamlFile(text, str(path))
    if not file.problems and file.data is None:
        return refuse("the file is empty", "a recipe needs the sections model, data and trainer")
    if not isinstance(file.data, dict):
        if not file.problems:
            return refuse(f"a recipe is a mapping of sections, not {_kind(file.data)}")
        file.data = {}
    return file


def _kind(value: object) -> str:
    return "a list" if isinstance(value, list) else f"'{str(value)[:40]}'"


def parse_value(text: str) -> Any:
    """The value of ``--key value``: YAML where it is YAML, else the text itself (as jsonargparse does)."""
    parsed = YamlFile(text, "command line")
    return text if parsed.problems else parsed.data

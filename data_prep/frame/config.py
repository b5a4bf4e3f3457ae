"""The recipe of a stage: YAML and command line, checked with line numbers, as a frozen dataclass."""

from __future__ import annotations

import dataclasses
import json
import types
import typing
from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any, Literal, TypeVar

from llmrecipes.errors import UserError
from llmrecipes.recipe.problem import Path as Keys
from llmrecipes.recipe.recipe import Recipe, scan_recipe
from llmrecipes.recipe.signatures import Sources
from llmrecipes.recipe.values import Checker

Config = TypeVar("Config")
Finding = tuple[Keys, str, str]  # where (keys), what is wrong, what to do
# Fields that decide how and where a stage runs, but not one byte of what it writes.
NOT_CONTENT = ("input", "output", "workers", "task", "overwrite")


@dataclass(frozen=True, kw_only=True)
class StageConfig:
    """Fields of every stage that reads documents and writes documents.

    Args:
        input: JSONL files (plain, .gz, .zst), or folders of them; each file is one shard of the work.
        output: folder for the results: one file for each input file, and manifest.json.
        field: name of the field that holds the text.
        format: how the results are compressed.
        max_document_mb: a longer line is skipped and counted.
        tokenizer: folder of a tokenizer; when given, the manifest counts tokens too.
        seed: decides, with a hash of the document, whatever a stage leaves to chance.
        samples: rejected documents shown in the manifest, for each reason.
        workers: processes, one core each.
        task: "i/N": do only the i-th (from 0) of N shares of the files; a Slurm array says it by itself.
        overwrite: replace results that were made by another recipe.
    """

    input: list[str]
    output: str
    field: str = "text"
    format: Literal["zst", "gz", "plain"] = "zst"
    max_document_mb: float = 50.0
    tokenizer: str | None = None
    seed: int = 0
    samples: int = 5
    workers: int = 1
    task: str | None = None
    overwrite: bool = False

    @property
    def reads_conversations(self) -> bool:
        """Whether the field holds a list of messages instead of a text."""
        return False

    def problems(self) -> Iterator[Finding]:
        """What is wrong beyond the types of the fields; stages add their own rules."""
        if self.workers < 1:
            yield ("workers",), f"workers: {self.workers} is no number of processes", "write 1 or more"
        if self.max_document_mb <= 0:
            yield ("max_document_mb",), f"max_document_mb: {self.max_document_mb} would skip everything", "write 50"
        if not self.input:
            yield ("input",), "input: the list is empty", "name one or more .jsonl, .jsonl.gz, .jsonl.zst files"

    def missing(self) -> Iterator[Finding]:
        """Models and lists that are named and not there."""
        if self.tokenizer is not None and not Path(self.tokenizer).is_dir():
            yield ("tokenizer",), f"tokenizer: {self.tokenizer}: no such folder", "make one with data tokenizer"


def content(config: Any) -> dict[str, Any]:
    """What of a recipe decides the bytes of the results."""
    return {key: value for key, value in dataclasses.asdict(config).items() if key not in NOT_CONTENT}


def read_config(kind: type[Config], words: Sequence[str], files: bool = True) -> Config:
    """The recipe of a stage from `--config FILE` and `--key value...`; later ones win.

    `files=False` does not look for the models and lists that it names.

    Raises:
        UserError: every mistake, each `file:line: what - hint`.
    """
    names, overrides = _words(kind, words)
    sources = Sources()
    recipe = scan_recipe([typing.cast(Any, name) for name in names], overrides, sources)
    checker = Checker(recipe.copy(), sources)
    symbol = sources.find(f"{kind.__module__}.{kind.__qualname__}")
    signature = sources.signature(symbol) if symbol else None
    assert signature is not None, kind
    if not recipe.problems:
        checker.arguments(checker.recipe.data, signature, (), kind.__name__.removesuffix("Config").lower())
    found = [*recipe.problems, *checker.problems]
    if found:
        raise UserError(*dict.fromkeys(map(str, found)))
    config = build(kind, _with_texts(recipe))
    wrong = [*getattr(config, "problems", tuple)(), *(getattr(config, "missing", tuple)() if files else ())]
    if wrong:
        raise UserError(*(f"{recipe.where(path)}: {what} - {hint}" for path, what, hint in wrong))
    return config


def _words(kind: type, words: Sequence[str]) -> tuple[list[str], list[str]]:
    """Files after --config, and the rest as `--key=value`; several values after one key become a list."""
    hints = typing.get_type_hints(kind)
    files, overrides, rest = list[str](), list[str](), list(words)
    while rest:
        token = rest.pop(0)
        if not token.startswith("--"):
            raise UserError(f"command line: {token}: expected --key value, such as --output data/clean")
        key, equals, value = token.removeprefix("--").partition("=")
        values = [value] if equals else []
        while not equals and rest and not rest[0].startswith("--"):
            values.append(rest.pop(0))
        if not values:
            raise UserError(f"command line: --{key}: the value is missing")
        is_list = typing.get_origin(hints.get(key)) is list and not values[0].startswith("[")
        if key == "config":
            files += values
        elif is_list or len(values) > 1:
            overrides.append(f"--{key}={json.dumps(values, ensure_ascii=False)}")
        else:
            overrides.append(f"--{key}={values[0]}")
    return files, overrides


def _with_texts(recipe: Recipe) -> dict[str, Any]:
    """The values, with what was typed on the command line as the text it is kept for text fields."""
    data = dict(recipe.data)
    for path, text in recipe.texts.items():
        key = str(path[0])
        is_text = isinstance(data[key], int | float) or (data[key] is None and text not in ("null", "~", ""))
        if len(path) == 1 and is_text and not isinstance(data[key], bool):
            data[key] = _Typed(text, data[key])
    return data


@dataclass(frozen=True)
class _Typed:
    """A number or comment on the command line, which a field of text takes as text: `--task 3`, `--template "# x"`."""

    text: str
    value: Any


def build(kind: Any, value: Any) -> Any:
    """`value` (plain data that was checked) as an instance of `kind`, nested dataclasses included."""
    if isinstance(value, _Typed):
        value = value.text if kind is str or str in typing.get_args(kind) else value.value
    if dataclasses.is_dataclass(kind):
        hints = typing.get_type_hints(kind)
        return typing.cast(type, kind)(**{key: build(hints[key], item) for key, item in (value or {}).items()})
    origin, inside = typing.get_origin(kind), typing.get_args(kind)
    if origin in (types.UnionType, typing.Union):
        if value is None:
            return None
        fitting = [option for option in inside if dataclasses.is_dataclass(option) == isinstance(value, dict)]
        return build(next((o for o in fitting if o is not type(None)), type(value)), value)
    if origin is list:
        return [build(inside[0], item) for item in value]
    if origin is dict:
        return {key: build(inside[1], item) for key, item in value.items()}
    return float(value) if kind is float else value


def help_text(kind: type, command: str, what: str) -> str:
    """All keys of a stage's recipe: type, default and meaning."""
    described = {name: text for base in reversed(kind.__mro__) for name, text in _descriptions(base).items()}
    hints = typing.get_type_hints(kind)
    lines = [f"usage: {command} --config RECIPE.yaml [--key value ...]", "", what, ""]
    for field in dataclasses.fields(typing.cast(Any, kind)):
        if field.default is not dataclasses.MISSING:
            default = f"default {json.dumps(field.default, ensure_ascii=False, default=str)}"
        elif field.default_factory is not dataclasses.MISSING:
            default = "has defaults"
        else:
            default = "required"
        name = getattr(hints[field.name], "__name__", "")
        shown = str(hints[field.name]) if not name or typing.get_origin(hints[field.name]) else name
        shown = shown.replace("typing.", "").replace(f"{kind.__module__}.", "")
        lines.append(f"  --{field.name} {described.get(field.name, '')} ({shown}; {default})")
    return "\n".join(lines)


def _descriptions(kind: type) -> dict[str, str]:
    """The `Args:` of a class's docstring."""
    import docstring_parser

    parsed = docstring_parser.parse(kind.__doc__ or "")
    return {p.arg_name: " ".join((p.description or "").split()) for p in parsed.params}

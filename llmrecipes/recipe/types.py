"""Annotations, read from source, as a small tree of types that values can be checked against."""

from __future__ import annotations

import ast
from collections.abc import Iterable
from dataclasses import dataclass

from llmrecipes.recipe.signatures import Module, Signature, Sources, Symbol


@dataclass(frozen=True)
class Anything:
    """No statement can be made: every value passes."""


@dataclass(frozen=True)
class Scalar:
    """``int``, ``float``, ``str``, ``bool`` or ``None``."""

    name: str


@dataclass(frozen=True)
class Length:
    """A :class:`Duration`: a number with its unit."""


@dataclass(frozen=True)
class Span:
    """A :class:`TimeSpan`: a time by the clock."""


@dataclass(frozen=True)
class OneOf:
    """A Literal."""

    values: tuple[object, ...]


@dataclass(frozen=True)
class ListOf:
    """A list or a sequence of any length."""

    item: Type


@dataclass(frozen=True)
class TupleOf:
    """A list of exactly these items."""

    items: tuple[Type, ...]


@dataclass(frozen=True)
class DictOf:
    """A mapping with free keys."""

    value: Type


@dataclass(frozen=True, eq=False)
class Instance:
    """An object: the fields of a dataclass, or ``class_path`` and ``init_args`` of a subclass of ``symbol``."""

    symbol: Symbol | None
    is_dataclass: bool = False


@dataclass(frozen=True, eq=False)
class Union:
    """Any of several."""

    options: tuple[Type, ...]


@dataclass(frozen=True)
class Root:
    """A whole recipe."""


@dataclass(frozen=True, eq=False)
class Arguments:
    """The arguments of one class, as in ``init_args``."""

    signature: Signature


Type = Root | Arguments | Anything | Scalar | Length | Span | OneOf | ListOf | TupleOf | DictOf | Instance | Union

_SCALARS = {"int", "float", "str", "bool", "None"}
_LISTS = {"list", "List", "Sequence", "Iterable", "Collection", "set", "Set", "frozenset", "MutableSequence"}
_DICTS = {"dict", "Dict", "Mapping", "MutableMapping"}
_TEXTS = {"pathlib.Path", "os.PathLike", "datetime.timedelta"}
_STANDARD = {"typing", "typing_extensions", "collections", "builtins"}


def type_of(annotation: ast.expr | None, module: Module, sources: Sources, depth: int = 0) -> Type:
    """The type an annotation in ``module`` stands for; aliases are followed, what is not understood is `Anything`."""
    if annotation is None or depth > 20:
        return Anything()
    if isinstance(annotation, ast.Constant):
        if annotation.value is None:
            return Scalar("None")
        if not isinstance(annotation.value, str):
            return Anything()
        try:
            inner = ast.parse(annotation.value, mode="eval").body
        except SyntaxError:
            return Anything()
        return type_of(inner, module, sources, depth + 1)
    if isinstance(annotation, ast.BinOp) and isinstance(annotation.op, ast.BitOr):
        return union(type_of(side, module, sources, depth + 1) for side in (annotation.left, annotation.right))
    if isinstance(annotation, ast.Subscript):
        return _subscript(annotation, module, sources, depth)
    if isinstance(annotation, ast.Name | ast.Attribute):
        return _name(annotation, module, sources, depth)
    return Anything()


def union(options: Iterable[Type]) -> Type:
    """A flat union; a length beside text is a length, since text alone would let any mistake pass."""
    flat: list[Type] = []
    for option in options:
        flat += option.options if isinstance(option, Union) else [option]
    if any(isinstance(option, Length | Span) for option in flat):
        flat = [option for option in flat if option not in (Scalar("str"), Scalar("int"))]
    if any(isinstance(option, Anything) for option in flat):
        return Anything()
    literals = [option for option in flat if isinstance(option, OneOf)]
    if len(literals) > 1:
        merged = OneOf(tuple(dict.fromkeys(value for option in literals for value in option.values)))
        flat = [merged, *(option for option in flat if option not in literals)]
    return flat[0] if len(flat) == 1 else Union(tuple(flat))


def _subscript(annotation: ast.Subscript, module: Module, sources: Sources, depth: int) -> Type:
    origin = _short(sources.qualify(annotation.value, module))
    inside = annotation.slice.elts if isinstance(annotation.slice, ast.Tuple) else [annotation.slice]

    def inner(expression: ast.expr) -> Type:
        return type_of(expression, module, sources, depth + 1)

    if origin == "Literal":
        return _literal(inside)
    if origin == "Optional":
        return union([inner(inside[0]), Scalar("None")])
    if origin == "Union":
        return union(inner(e) for e in inside)
    if origin in ("Annotated", "Final", "Required", "NotRequired"):
        return inner(inside[0])
    if origin in _LISTS:
        return ListOf(inner(inside[0]))
    if origin in _DICTS:
        return DictOf(inner(inside[-1]))
    if origin in ("tuple", "Tuple"):
        if len(inside) == 2 and isinstance(inside[1], ast.Constant) and inside[1].value is Ellipsis:
            return ListOf(inner(inside[0]))
        return TupleOf(tuple(inner(e) for e in inside))
    if origin == "Callable":
        return Instance(None)
    return Anything()


def _literal(inside: list[ast.expr]) -> Type:
    values = []
    for expression in inside:
        try:
            values.append(ast.literal_eval(expression))
        except ValueError:
            return Anything()
    return OneOf(tuple(values))


def _name(annotation: ast.Name | ast.Attribute, module: Module, sources: Sources, depth: int) -> Type:
    origin = sources.qualify(annotation, module)
    name = _short(origin)
    if name in _SCALARS:
        return Scalar(name)
    if name in _LISTS or name in ("tuple", "Tuple"):
        return ListOf(Anything())
    if name in _DICTS:
        return DictOf(Anything())
    if name == "Callable":
        return Instance(None)
    if origin in _TEXTS:
        return Scalar("str")
    if origin.rpartition(".")[2] == "Duration":
        return Length()
    if origin.rpartition(".")[2] == "TimeSpan":
        return Span()
    if origin.partition(".")[0] in _STANDARD:
        return Anything()
    symbol = sources.resolve(annotation, module)
    if symbol is None:
        return Anything()
    if isinstance(symbol.node, ast.ClassDef):
        return Instance(symbol, sources.is_dataclass(symbol))
    return _alias(symbol, sources, depth)


def _alias(symbol: Symbol, sources: Sources, depth: int) -> Type:
    """A module-level ``Norm = Literal[...]`` or ``type Norm = ...``."""
    value = getattr(symbol.node, "value", None)
    if not isinstance(value, ast.Name | ast.Attribute | ast.Subscript | ast.BinOp | ast.Constant):
        return Anything()
    return type_of(value, symbol.module, sources, depth + 1)


def _short(origin: str) -> str:
    """``typing.Optional`` and ``collections.abc.Sequence`` as their last part; other dotted names unchanged."""
    return origin.rpartition(".")[2] if origin.partition(".")[0] in _STANDARD else origin


def describe(kind: Type) -> str:
    """The type in words, for messages: ``an integer``, ``one of 'rms', 'layer'``."""
    words = {"int": "an integer", "float": "a number", "str": "text", "bool": "true or false", "None": "null"}
    if isinstance(kind, Scalar):
        return words[kind.name]
    if isinstance(kind, OneOf):
        listed = ", ".join(dict.fromkeys(f"'{v}'" for v in kind.values))
        return f"one of {listed}" if len(kind.values) > 1 else listed
    if isinstance(kind, Union):
        parts = list(dict.fromkeys(describe(option) for option in kind.options))
        return f"{', '.join(parts[:-1])} or {parts[-1]}" if len(parts) > 1 else parts[0]
    if isinstance(kind, TupleOf):
        return f"a list of {len(kind.items)} values"
    if isinstance(kind, Instance) and not kind.is_dataclass:
        return "class_path and init_args"
    return {
        ListOf: "a list", DictOf: "a mapping", Length: "a length such as '2000 steps'", Instance: "a mapping of fields",
        Span: "a time such as '3h50m'",
    }.get(type(kind), "a value")  # fmt: skip

"""What a class may be given, read from its source without importing it.

Importing Lightning takes seconds; ``check`` must answer before a finger leaves the key. So modules are found with
``importlib.util.find_spec`` on the top-level package only (which imports nothing), parsed with :mod:`ast`, and names
are followed through re-exports to the class and its ``__init__`` or dataclass fields.
"""

from __future__ import annotations

import ast
import importlib.util
import sys
from collections.abc import Iterator
from dataclasses import dataclass, field
from pathlib import Path

from llmrecipes.recipe.problem import closest

Definition = ast.ClassDef | ast.FunctionDef
_SPLIT_FIELDS = {"field", "dataclasses.field"}


@dataclass(eq=False)
class Module:
    """A parsed source file; ``symbols`` maps module-level names to the statement that defines them."""

    name: str
    path: Path | None  # None for a namespace package
    folders: tuple[Path, ...]  # where submodules live; empty for a plain module
    symbols: dict[str, ast.stmt] = field(default_factory=dict)
    stars: list[str] = field(default_factory=list)

    @property
    def package(self) -> str:
        """The package that relative imports start from."""
        return self.name if self.folders else self.name.rpartition(".")[0]


@dataclass(frozen=True, eq=False)
class Symbol:
    """A definition and the module whose names its annotations use."""

    module: Module
    node: ast.stmt

    @property
    def name(self) -> str:
        """The name it was defined under."""
        return getattr(self.node, "name", "")


@dataclass(frozen=True, eq=False)
class Parameter:
    """One argument: its annotation (None when absent) is to be read in ``module``."""

    name: str
    annotation: ast.expr | None
    required: bool
    module: Module


@dataclass(frozen=True, eq=False)
class Signature:
    """The arguments a class or function takes by name; ``open`` when it takes any other (``**kwargs``)."""

    parameters: dict[str, Parameter]
    open: bool = False


class Sources:
    """All source files looked at during one check, each parsed once."""

    def __init__(self) -> None:
        self._modules: dict[str, Module | None] = {}

    def module(self, name: str) -> Module | None:
        """The module of this dotted name, or None when it has no readable Python source."""
        if name not in self._modules:
            self._modules[name] = self._load(name)
        return self._modules[name]

    def _load(self, name: str) -> Module | None:
        parent, _, last = name.rpartition(".")
        if not name.replace(".", "_").isidentifier():
            return None
        if not parent:
            return self._top(name)
        package = self.module(parent)
        for folder in package.folders if package else ():
            if (folder / last / "__init__.py").is_file():
                return _parse(name, folder / last / "__init__.py", (folder / last,))
            if (folder / f"{last}.py").is_file():
                return _parse(name, folder / f"{last}.py", ())
            if (folder / last).is_dir():
                return Module(name, None, (folder / last,))
        return None

    def _top(self, name: str) -> Module | None:
        try:
            spec = importlib.util.find_spec(name)
        except (ImportError, ValueError, AttributeError):
            return None
        if spec is None or name in sys.builtin_module_names:
            return None
        folders = tuple(Path(p) for p in spec.submodule_search_locations or ())
        if spec.origin and spec.origin.endswith(".py"):
            return _parse(name, Path(spec.origin), folders)
        return Module(name, None, folders) if folders else None

    def find(self, dotted: str) -> Symbol | None:
        """The class, function or assignment of a dotted name, followed through re-exports."""
        parts = dotted.split(".")
        module = self.module(parts[0])
        taken = 1
        while module is not None and taken < len(parts) - 1 and self.module(".".join(parts[: taken + 1])):
            module = self.module(".".join(parts[: taken + 1]))
            taken += 1
        if module is None or taken == len(parts):
            return None
        symbol = self.lookup(module, parts[taken])
        for name in parts[taken + 1 :]:
            if symbol is None or not isinstance(symbol.node, ast.ClassDef):
                return None
            inner = [n for n in symbol.node.body if isinstance(n, ast.ClassDef) and n.name == name]
            symbol = Symbol(symbol.module, inner[0]) if inner else None
        return symbol

    def lookup(self, module: Module, name: str, depth: int = 0) -> Symbol | None:
        """What ``name`` means in ``module``; imports are followed to the definition."""
        if depth > 20:
            return None
        node = module.symbols.get(name)
        if isinstance(node, ast.ImportFrom):
            source = self.module(_absolute(module, node))
            original = next((a.name for a in node.names if (a.asname or a.name) == name), name)
            return self.lookup(source, original, depth + 1) if source else None
        if node is not None:
            return None if isinstance(node, ast.Import) else Symbol(module, node)
        for star in module.stars:
            source = self.module(star)
            found = self.lookup(source, name, depth + 1) if source else None
            if found is not None:
                return found
        return self._lazy(module, name) if "__getattr__" in module.symbols else None

    def _lazy(self, module: Module, name: str) -> Symbol | None:
        """A class that a package imports on first use (PEP 562): the submodule that defines it."""
        for last in sorted(_submodules(module)):
            submodule = self.module(f"{module.name}.{last}")
            node = submodule.symbols.get(name) if submodule else None
            if submodule is not None and isinstance(node, ast.ClassDef | ast.FunctionDef):
                return Symbol(submodule, node)
        return None

    def names(self, module: Module) -> list[str]:
        """Public names one can reach through the module."""
        names = [n for n in module.symbols if not n.startswith("_")]
        for star in module.stars:
            source = self.module(star)
            if source is not None and source is not module:
                names += [n for n in source.symbols if not n.startswith("_")]
        for last in _submodules(module) if "__getattr__" in module.symbols else ():
            submodule = self.module(f"{module.name}.{last}")
            defined = submodule.symbols.items() if submodule else ()
            names += [n for n, node in defined if isinstance(node, ast.ClassDef) and not n.startswith("_")]
        return names

    def suggest(self, dotted: str) -> str | None:
        """The class path most like one that was not found."""
        parent, _, last = dotted.rpartition(".")
        module = self.module(parent) if parent else None
        if module is None and parent:
            grandparent, _, middle = parent.rpartition(".")
            package = self.module(grandparent) if grandparent else None
            near = closest(middle, _submodules(package)) if package else None
            if near is None:
                return None
            parent = f"{grandparent}.{near}"
            module = self.module(parent)
            if module is not None and self.lookup(module, last):
                return f"{parent}.{last}"
        near = closest(last, self.names(module)) if module else None
        return f"{parent}.{near}" if near else None

    def bases(self, symbol: Symbol) -> Iterator[Symbol | None]:
        """The base classes in order; None for one that cannot be read, ``object`` and typing's own left out."""
        assert isinstance(symbol.node, ast.ClassDef)
        for expression in symbol.node.bases:
            plain = expression.value if isinstance(expression, ast.Subscript) else expression
            text = self.qualify(plain, symbol.module)
            if text.split(".")[-1] in ("object", "Generic", "Protocol", "ABC", "NamedTuple", "Enum"):
                continue
            base = self.resolve(plain, symbol.module)
            yield base if base is not None and isinstance(base.node, ast.ClassDef) else None

    def is_subclass(self, symbol: Symbol, base: Symbol) -> bool | None:
        """Whether the class derives from ``base``; None when that cannot be told (functions, protocols, C code)."""
        if not isinstance(symbol.node, ast.ClassDef) or not isinstance(base.node, ast.ClassDef):
            return None
        if any(self.qualify(b, base.module).endswith("Protocol") for b in base.node.bases):
            return None
        queue, seen, certain = [symbol], set[int](), True
        while queue:
            current = queue.pop()
            if current.node is base.node:
                return True
            if id(current.node) in seen:
                continue
            seen.add(id(current.node))
            for parent in self.bases(current):
                if parent is None:
                    certain = False
                else:
                    queue.append(parent)
        return False if certain else None

    def qualify(self, expression: ast.expr, module: Module) -> str:
        """The dotted origin of a name without opening its file, such as ``typing.Optional``."""
        text = ast.unparse(expression)
        head, _, rest = text.partition(".")
        node = module.symbols.get(head)
        if isinstance(node, ast.ImportFrom):
            original = next((a.name for a in node.names if (a.asname or a.name) == head), head)
            head = f"{_absolute(module, node)}.{original}"
        elif isinstance(node, ast.Import):
            head = next((a.name for a in node.names if a.asname == head), head)
        elif node is not None:
            head = f"{module.name}.{head}"
        return f"{head}.{rest}" if rest else head

    def resolve(self, expression: ast.expr, module: Module) -> Symbol | None:
        """The definition a name or dotted name in ``module`` stands for."""
        if isinstance(expression, ast.Name):
            return self.lookup(module, expression.id)
        if isinstance(expression, ast.Attribute):
            return self.find(self.qualify(expression, module))
        return None

    def signature(self, symbol: Symbol) -> Signature | None:
        """What the class or function takes; None when that cannot be known from source."""
        if isinstance(symbol.node, ast.FunctionDef):
            return _from_function(symbol.node, symbol.module, skip_first=False)
        if not isinstance(symbol.node, ast.ClassDef):
            return None
        return self._constructor(symbol, depth=0)

    def _constructor(self, symbol: Symbol, depth: int) -> Signature | None:
        assert isinstance(symbol.node, ast.ClassDef)
        for statement in symbol.node.body:
            if isinstance(statement, ast.FunctionDef) and statement.name == "__init__":
                return _from_function(statement, symbol.module, skip_first=True)
        if self.is_dataclass(symbol):
            return Signature(self._fields(symbol))
        for base in self.bases(symbol):
            if base is None or depth > 20:
                return None
            found = self._constructor(base, depth + 1)
            if found is None or found.parameters or found.open or _has_init(base):
                return found
        return Signature({})

    def is_dataclass(self, symbol: Symbol) -> bool:
        """Whether the class carries a ``@dataclass`` decorator."""
        return isinstance(symbol.node, ast.ClassDef) and any(
            self.qualify(d.func if isinstance(d, ast.Call) else d, symbol.module)
            in ("dataclass", "dataclasses.dataclass")
            for d in symbol.node.decorator_list
        )

    def _fields(self, symbol: Symbol) -> dict[str, Parameter]:
        """Dataclass fields: those of the bases first, an overridden one in its first place."""
        assert isinstance(symbol.node, ast.ClassDef)
        result: dict[str, Parameter] = {}
        for base in reversed(list(self.bases(symbol))):
            if base is not None and self.is_dataclass(base):
                result.update(self._fields(base))
        for statement in symbol.node.body:
            if not isinstance(statement, ast.AnnAssign) or not isinstance(statement.target, ast.Name):
                continue
            origin = (
                statement.annotation.value if isinstance(statement.annotation, ast.Subscript) else statement.annotation
            )
            if self.qualify(origin, symbol.module).endswith(("ClassVar", "KW_ONLY")):
                continue
            options = _field_options(statement.value)
            name = statement.target.id
            if isinstance(options.get("init"), ast.Constant) and getattr(options["init"], "value", True) is False:
                result.pop(name, None)
                continue
            required = statement.value is None or (
                bool(options) and not {"default", "default_factory"} & options.keys()
            )
            result[name] = Parameter(name, statement.annotation, required, symbol.module)
        return result


def _field_options(value: ast.expr | None) -> dict[str, ast.expr]:
    """The keywords of ``field(...)``; ``{"": ...}`` marks a call without any."""
    if isinstance(value, ast.Call) and ast.unparse(value.func) in _SPLIT_FIELDS:
        return {"": value, **{k.arg: k.value for k in value.keywords if k.arg}}
    return {}


def _has_init(symbol: Symbol) -> bool:
    return any(isinstance(n, ast.FunctionDef) and n.name == "__init__" for n in getattr(symbol.node, "body", ()))


def _from_function(node: ast.FunctionDef, module: Module, skip_first: bool) -> Signature:
    args = node.args
    positional = [*args.posonlyargs, *args.args]
    first_default = len(positional) - len(args.defaults)
    pairs = [(arg, i < first_default) for i, arg in enumerate(positional)][1 if skip_first else 0 :]
    pairs += [(arg, default is None) for arg, default in zip(args.kwonlyargs, args.kw_defaults, strict=True)]
    return Signature(
        {a.arg: Parameter(a.arg, a.annotation, req, module) for a, req in pairs}, open=args.kwarg is not None
    )


def _absolute(module: Module, node: ast.ImportFrom) -> str:
    """The module a ``from ... import`` names, dots resolved."""
    if not node.level:
        return node.module or ""
    parts = module.package.split(".")
    parts = parts[: len(parts) - (node.level - 1)]
    return ".".join([*parts, *([node.module] if node.module else [])])


def _submodules(module: Module) -> list[str]:
    entries = [entry for folder in module.folders if folder.is_dir() for entry in folder.iterdir()]
    return [entry.stem for entry in entries if entry.suffix == ".py" or entry.is_dir()]


def _parse(name: str, path: Path, folders: tuple[Path, ...]) -> Module | None:
    try:
        tree = ast.parse(path.read_bytes(), filename=str(path))
    except (OSError, SyntaxError, ValueError):
        return None
    module = Module(name, path, folders)
    _collect(tree.body, module, certain=True)
    return module


def _collect(body: list[ast.stmt], module: Module, certain: bool) -> None:
    """Fill ``symbols``; a definition in an ``else`` or ``except`` only counts where there is no other."""
    for node in body:
        if isinstance(node, ast.If):
            _collect(node.body, module, certain)
            _collect(node.orelse, module, certain=False)
        elif isinstance(node, ast.Try):
            _collect([*node.body, *node.orelse, *node.finalbody], module, certain)
            for handler in node.handlers:
                _collect(handler.body, module, certain=False)
        elif isinstance(node, ast.With):
            _collect(node.body, module, certain)
        else:
            for symbol in _defined(node, module):
                if certain:
                    module.symbols[symbol] = node
                else:
                    module.symbols.setdefault(symbol, node)


def _defined(node: ast.stmt, module: Module) -> list[str]:
    if isinstance(node, ast.ImportFrom) and any(a.name == "*" for a in node.names):
        module.stars.append(_absolute(module, node))
        return []
    if isinstance(node, ast.Import):
        return [a.asname or a.name.partition(".")[0] for a in node.names]
    if isinstance(node, ast.ImportFrom):
        return [a.asname or a.name for a in node.names]
    if isinstance(node, ast.ClassDef | ast.FunctionDef | ast.AsyncFunctionDef):
        return [node.name]
    if isinstance(node, ast.AnnAssign | ast.Assign):
        targets = node.targets if isinstance(node, ast.Assign) else [node.target]
        return [t.id for t in targets if isinstance(t, ast.Name)]
    if sys.version_info >= (3, 12) and isinstance(node, ast.TypeAlias):
        return [node.name.id]
    return []

"""Signatures read from source are those that Python itself reports."""

from __future__ import annotations

import importlib
import inspect

import pytest

from llmrecipes.recipe.schema import SECTION_CLASSES
from llmrecipes.recipe.signatures import Signature, Sources

CLASSES = (
    "lightning.pytorch.Trainer",
    "lightning.pytorch.loggers.WandbLogger",
    "lightning.pytorch.loggers.CSVLogger",
    "lightning.pytorch.callbacks.EarlyStopping",
    "lightning.pytorch.callbacks.LearningRateMonitor",
    "lightning.pytorch.strategies.ModelParallelStrategy",
    "lightning.pytorch.profilers.SimpleProfiler",
    "llmrecipes.modules.PretrainModule",
    "llmrecipes.optim.AdamW",
    "llmrecipes.optim.Constant",
    "llmrecipes.optim.WarmupCosine",
    "llmrecipes.optim.WarmupStableDecay",
    "llmrecipes.optim.CoolDown",
    "llmrecipes.data.PackedShards",
    "llmrecipes.data.Manifest",
    "llmrecipes.recipe.ModelConfig",
    "llmrecipes.recipe.MoEConfig",
    "llmrecipes.recipe.RopeScaling",
    "llmrecipes.recipe.Duration",
    *list(SECTION_CLASSES.values())[1:],
)


def _static(path: str) -> Signature:
    sources = Sources()
    symbol = sources.find(path)
    assert symbol is not None, path
    signature = sources.signature(symbol)
    assert signature is not None, path
    return signature


def test_signatures_equal_those_of_inspect():
    seen = 0
    for path in CLASSES:
        module, _, name = path.rpartition(".")
        real = inspect.signature(getattr(importlib.import_module(module), name)).parameters.values()
        expected = {p.name: p.default is p.empty for p in real if p.kind not in (p.VAR_KEYWORD, p.VAR_POSITIONAL)}
        found = _static(path)
        assert {p.name: p.required for p in found.parameters.values()} == expected, path
        assert found.open == any(p.kind is p.VAR_KEYWORD for p in real), path
        seen += 1
    assert seen == len(CLASSES) == 24


FILES = {
    "__init__.py": "from .deep import Renamed as Public\nfrom .stars import *\nfrom .lazy import __getattr__\n",
    "deep.py": """
        from __future__ import annotations
        from typing import TYPE_CHECKING
        import dataclasses
        from dataclasses import dataclass, field
        from typing import ClassVar
        if TYPE_CHECKING:
            from .stars import Starred
        try:
            from absent import Fallback
        except ImportError:
            Fallback = object
        class Root:
            def __init__(self, a: int, /, b: "Starred", *args, c: float = 1.0, d, **kwargs): ...
        class Middle(Root):
            pass
        class Renamed(Middle):
            class Inner:
                def __init__(self, x=1): ...
        @dataclass
        class Old:
            kind: ClassVar[int] = 3
            first: int
            second: list[int] = field(default_factory=list)
            hidden: int = field(init=False, default=1)
        @dataclasses.dataclass(kw_only=True)
        class New(Old):
            third: int
            fourth: int = field()
            second: int = 5
        class Unknown(Fallback):
            pass
        """,
    "stars.py": "class Starred:\n    def __init__(self, z): ...\ndef make(q: int = 1): ...\n",
    "lazy.py": "def __getattr__(name): ...\n",
    "lazily/__init__.py": "_HOME = {'Late': 'late'}\ndef __getattr__(name): ...\n",
    "lazily/late.py": "class Late:\n    def __init__(self, w: int): ...\n",
    "broken.py": "def (:\n",
}


@pytest.fixture
def fixture_package(tmp_path, monkeypatch):
    import textwrap

    for name, text in FILES.items():
        file = tmp_path / "fixturepkg" / name
        file.parent.mkdir(exist_ok=True, parents=True)
        file.write_text(textwrap.dedent(text))
    monkeypatch.syspath_prepend(str(tmp_path))


@pytest.mark.parametrize(
    ("path", "names", "required", "is_open"),
    [
        ("fixturepkg.Public", "a b c d", "a b d", True),
        ("fixturepkg.deep.Renamed.Inner", "x", "", False),
        ("fixturepkg.deep.Old", "first second", "first", False),
        ("fixturepkg.deep.New", "first fourth second third", "first fourth third", False),
        ("fixturepkg.Starred", "z", "z", False),
        ("fixturepkg.make", "q", "", False),
        ("fixturepkg.lazily.Late", "w", "w", False),
    ],
)
def test_source_is_followed(fixture_package, path, names, required, is_open):
    found = _static(path)
    assert sorted(found.parameters) == names.split()
    assert sorted(p.name for p in found.parameters.values() if p.required) == required.split()
    assert found.open is is_open


@pytest.mark.parametrize(
    "path", ["", ".", "a", "fixturepkg", "fixturepkg.Absent", "fixturepkg.broken.X", "sys.path", "1.x", "a..b"]
)
def test_what_is_not_there_is_not_found(fixture_package, path):
    sources = Sources()
    assert sources.find(path) is None
    sources.suggest(path)


def test_a_class_whose_base_has_no_source_accepts_anything(fixture_package):
    sources = Sources()
    symbol = sources.find("fixturepkg.deep.Unknown")
    assert symbol is not None
    assert sources.signature(symbol) is None

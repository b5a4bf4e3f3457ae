"""Reading and merging: the same values as jsonargparse, and where each came from."""

from __future__ import annotations

import textwrap
from pathlib import Path

import pytest
import yaml

from llmrecipes.errors import UserError
from llmrecipes.recipe import read_recipe
from llmrecipes.recipe.yaml_file import YamlFile

SCALARS = """
1e-3 1E5 1e+5 -2.5e-3 1. .5 1.0 .5e3 .5e-3 1_000 8_955_660_288 1_0.5 0 -0 +3 007 0x1F 0b11 010 1:30 1:30.5
.inf -.INF .nan yes no on off Yes NO true False TRUE y n null ~ Null NULL 2001-01-01 2001-01-01T00:00:00Z 2000steps
a 1e 1e3.5 e3 -- 1.2.3 '1' "yes" 0o17 +.5 1e-3x _1 1__0 .e3 12e03 -.5e-3
"""


def test_scalars_are_those_of_jsonargparse():
    from jsonargparse._loaders_dumpers import get_yaml_default_loader

    texts = SCALARS.split()

    def agree(read) -> int:
        return sum(
            repr(read(text)) == repr(yaml.load(f"k: {text}", Loader=get_yaml_default_loader())) for text in texts
        )

    assert agree(lambda text: YamlFile(f"k: {text}", "f").data) == len(texts) == 58
    # The mutant, plain YAML 1.1, reads 1e-3 as text and dates as dates.
    assert agree(lambda text: yaml.safe_load(f"k: {text}")) < len(texts) - 5


PACKAGE = """
from __future__ import annotations
from dataclasses import dataclass
@dataclass
class Sizes:
    dim: int = 1
    layers: int = 2
class Base:
    def __init__(self, train: dict[str, float], sizes: Sizes, names: list[str] | None = None) -> None: ...
class Other(Base):
    def __init__(self, train: dict[str, float], sizes: Sizes, extra: float = 0.5) -> None: ...
"""
START = "data: {class_path: merged.Base, init_args: {train: {a: 1.0, b: 2.0}, sizes: {dim: 5, layers: 2}, names: [x]}}"
MERGES = [
    ("{}", []),
    ("data: {init_args: {train: {c: 1.0}, sizes: {layers: 7}, names: [y, z]}}", []),
    ("data: {class_path: merged.Other}", []),
    ("data: {class_path: merged.Other, init_args: {extra: 1e-3, sizes: {dim: 3}}}", []),
    ("{}", ["--data.init_args.train.z=4.0"]),
    ("{}", ["--data.sizes.dim", "9"]),
    ("{}", ["--data.init_args.names=[q]"]),
    ("{}", ["--data.names+=q"]),
    ("{}", ["--data=merged.Other"]),
    ("data: {init_args: {train: {c: 1.0}}}", ["--data.train.d=2.0", "--data.init_args.sizes", "{dim: 8}"]),
]


@pytest.fixture
def merged(tmp_path, monkeypatch):
    (tmp_path / "merged.py").write_text(PACKAGE)
    monkeypatch.syspath_prepend(str(tmp_path))
    monkeypatch.chdir(tmp_path)
    Path("a.yaml").write_text(START)


def _by_jsonargparse(overrides: list[str]) -> dict:
    from jsonargparse import ArgumentParser
    from merged import Base

    parser = ArgumentParser(exit_on_error=False)
    parser.add_argument("--config", action="config")
    parser.add_subclass_arguments(Base, "data")
    return parser.parse_args(["--config=a.yaml", "--config=b.yaml", *overrides]).as_dict()["data"]


@pytest.mark.parametrize(("second", "overrides"), MERGES, ids=range(len(MERGES)))
def test_merging_agrees_with_jsonargparse(merged, second, overrides):
    Path("b.yaml").write_text(second)
    ours = read_recipe([Path("a.yaml"), Path("b.yaml")], overrides).data["data"]
    theirs = _by_jsonargparse(overrides)
    assert ours["class_path"] == theirs["class_path"]
    defaults = {"extra": 0.5, "names": None}  # jsonargparse fills in what no file gives
    given = {k: v for k, v in theirs["init_args"].items() if k in ours["init_args"] or defaults.get(k, "") != v}
    assert ours["init_args"] == given


def test_a_plain_deep_merge_would_differ(merged, monkeypatch):
    """The mutant of the test above: it merges free mappings, where jsonargparse replaces them."""
    Path("b.yaml").write_text(MERGES[1][0])
    monkeypatch.setattr("llmrecipes.recipe.recipe.free_mapping", lambda kind, value: False)
    mutant = read_recipe([Path("a.yaml"), Path("b.yaml")]).data["data"]["init_args"]
    assert mutant["train"] != _by_jsonargparse([])["init_args"]["train"]


def test_a_changed_class_says_what_it_dropped(merged):
    Path("b.yaml").write_text("data: {class_path: merged.Other}")
    recipe = read_recipe([Path("a.yaml"), Path("b.yaml")])
    assert recipe.notes == ["data: merged.Other does not know names, dropped"]


def test_every_value_knows_its_origin(tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    Path("a.yaml").write_text("seed: 1\ntrainer:\n  max_steps: 5\n  devices:\n    - 0\n    - 1\n")
    Path("b.yaml").write_text("# more\ntrainer:\n  max_steps: 6\n")
    recipe = read_recipe([Path("a.yaml"), Path("b.yaml")], ["--trainer.precision", "32", "--seed=7"])
    expected = {
        ("trainer", "max_steps"): "b.yaml:3",
        ("trainer", "devices", 1): "a.yaml:6",
        ("trainer", "precision"): "command line: --trainer.precision",
        ("seed",): "command line: --seed",
        ("trainer", "absent"): "b.yaml:2",
        (): "a.yaml:1",
    }
    assert {path: recipe.where(path) for path in expected} == expected
    assert recipe.data["seed"] == 7


def test_anchors_and_merge_keys(tmp_path):
    path = tmp_path / "a.yaml"
    path.write_text("a: &x {p: 1, q: 2}\nb: {<<: *x, q: 3}\nc: *x\nd: {<<: *x, q: 3}\n")
    assert read_recipe([path]).data == {
        "a": {"p": 1, "q": 2},
        "b": {"p": 1, "q": 3},
        "c": {"p": 1, "q": 2},
        "d": {"p": 1, "q": 3},
    }


@pytest.mark.parametrize(
    "text", ["a: &x [*x]", "a: &x {b: *x}", "a: [" * 3000, "a: b: c", "? [1]\n: 2", "a: !!int x", "a: 1\na: 2"]
)
def test_slips_are_problems_never_other_exceptions(tmp_path, text):
    path = tmp_path / "a.yaml"
    path.write_text(textwrap.dedent(text))
    with pytest.raises(UserError):
        read_recipe([path])


@pytest.mark.parametrize("overrides", [["--a"], ["a", "1"], ["--", "1"], ["--name.x", "1"], ["--a", "--b", "1"]])
def test_overrides_that_cannot_be_read(tmp_path, overrides):
    path = tmp_path / "a.yaml"
    path.write_text("name: x\n")
    with pytest.raises(UserError):
        read_recipe([path], overrides)


def test_names_stay_text(tmp_path):
    path = tmp_path / "a.yaml"
    path.write_text("name: x\n")
    assert read_recipe([path], ["--name", "7"]).data["name"] == "7"

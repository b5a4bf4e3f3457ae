"""A sound recipe with its shards, and how to break it."""

from __future__ import annotations

from pathlib import Path

import pytest
from good_recipe import GOOD, write_shard


@pytest.fixture
def folder(tmp_path, monkeypatch):
    """A current folder with two shards and ``good.yaml``; paths in messages are then short."""
    monkeypatch.chdir(tmp_path)
    for language in ("ja", "en"):
        write_shard(Path("data") / language)
    Path("good.yaml").write_text(GOOD)
    return tmp_path


@pytest.fixture
def problems_of(folder):
    """Problems of the sound recipe after ``old`` became ``new`` (each old text must be there), as printed."""
    from llmrecipes.recipe import check

    def run(*changes: tuple[str, str], overrides: tuple[str, ...] = (), text: str = GOOD) -> list[str]:
        for old, new in changes:
            assert old in text, old
            text = text.replace(old, new)
        Path("r.yaml").write_text(text)
        return [str(problem) for problem in check(Path("r.yaml"), overrides)]

    return run

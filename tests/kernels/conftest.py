"""The sources with a mistake planted in them, compiled beside the real ones."""

import shutil
from pathlib import Path

import pytest
import torch

from llmrecipes.kernels import build, library

SOURCES = Path(library.__file__).with_name("cpp")


def pytest_collection_modifyitems(items):
    if not library.has_kernels(torch.float32):
        skip = pytest.mark.skip(reason="no kernels on this machine: no AVX-512, or no C++ compiler")
        for item in items:
            if item.path.parent == Path(__file__).parent and item.path.name not in (
                "test_build.py",
                "test_products.py",
            ):
                item.add_marker(skip)


@pytest.fixture
def mutant(tmp_path, monkeypatch):
    """Replace a piece of a source, compile, and use that for the rest of the test."""

    def plant(file, right, wrong):
        folder = tmp_path / "cpp"
        shutil.copytree(SOURCES, folder)
        text = (folder / file).read_text(encoding="utf-8")
        assert text.count(right) == 1, f"{right!r} stands {text.count(right)} times in {file}"
        (folder / file).write_text(text.replace(right, wrong), encoding="utf-8")
        features = [*library._FP32, *(["avx512bf16"] if library.has_kernels(torch.bfloat16) else [])]
        with monkeypatch.context() as patch:
            patch.setenv("XDG_CACHE_HOME", str(tmp_path))
            found = build.load_library(folder, features)
        assert found is not None
        monkeypatch.setattr(library, "_library", lambda: found)

    return plant

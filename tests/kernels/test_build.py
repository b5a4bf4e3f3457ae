"""Kernels are compiled once, and training goes on where they cannot be."""

import logging
import multiprocessing
import os
import stat
import subprocess
import sys

import pytest

from llmrecipes.kernels.build import SWITCH, load_library

SOURCE = 'extern "C" int answer() { return 42; }\n'


@pytest.fixture
def sources(tmp_path, monkeypatch):
    monkeypatch.setenv("XDG_CACHE_HOME", str(tmp_path / "cache"))
    folder = tmp_path / "cpp"
    folder.mkdir()
    (folder / "answer.cpp").write_text(SOURCE)
    return folder


@pytest.fixture
def said(caplog, monkeypatch):
    monkeypatch.setattr(logging.getLogger("llmrecipes"), "propagate", True)
    caplog.set_level(logging.INFO)
    return caplog


@pytest.fixture
def fake_compiler(tmp_path, monkeypatch):
    """A compiler that does what is said, and counts."""

    def make(script):
        path = tmp_path / "compiler"
        path.write_text(f'#!/bin/sh\necho x >> "{tmp_path}/calls"\n{script}\n')
        path.chmod(0o755)
        monkeypatch.setenv("CXX", str(path))

    make.calls = lambda: (tmp_path / "calls").read_text().count("x")
    return make


def made(tmp_path):
    return sorted(path.name for path in (tmp_path / "cache" / "llmrecipes" / "kernels").iterdir())


def test_compiled_once_and_again_when_something_changes(sources, tmp_path, said):
    assert load_library(sources, []).answer() == 42
    assert load_library(sources, []).answer() == 42
    assert [record.message for record in said.records] == ["compiling kernels for this CPU, once: some seconds"]
    (sources / "answer.cpp").write_text(SOURCE.replace("42", "43"))
    assert load_library(sources, []).answer() == 43
    assert len([name for name in made(tmp_path) if name.endswith(".so")]) == 2
    assert load_library(sources, ["sse4.2"]).answer() == 43
    assert len([name for name in made(tmp_path) if name.endswith(".so")]) == 3
    assert len(made(tmp_path)) == 4, "something besides libraries and the lock is left"
    assert stat.S_IMODE(os.stat(tmp_path / "cache" / "llmrecipes" / "kernels").st_mode) == 0o700


def _load(folder, queue):
    queue.put(load_library(folder, []).answer())


def test_of_processes_that_begin_together_one_compiles(sources, fake_compiler):
    fake_compiler('sleep 0.5; exec g++ "$@"')
    context = multiprocessing.get_context("fork")
    queue = context.Queue()
    processes = [context.Process(target=_load, args=(sources, queue)) for _ in range(3)]
    for process in processes:
        process.start()
    assert [queue.get(timeout=60) for _ in processes] == [42] * 3
    for process in processes:
        process.join(60)
    assert fake_compiler.calls() == 1


def test_without_a_compiler_it_says_so_and_goes_on(sources, monkeypatch, said):
    monkeypatch.setenv("CXX", "no-such-compiler")
    assert load_library(sources, []) is None
    assert "no C++ compiler (no-such-compiler)" in said.text
    assert not [record for record in said.records if record.levelno >= logging.WARNING]


@pytest.mark.parametrize(
    ("script", "expected"),
    [
        ("echo note >&2; echo 'a.cpp:3: error: it is broken' >&2; exit 1", "a.cpp:3: error: it is broken"),
        ("exit 1", "no message"),
        ('while [ "$1" != -o ]; do shift; done; echo rubbish > "$2"', "file too short"),
        ("kill -9 $$", "no message"),
    ],
    ids=["fails", "fails silently", "writes rubbish", "is killed"],
)
def test_a_compiler_that_fails_is_named_and_leaves_nothing_half_done(
    sources, fake_compiler, said, tmp_path, script, expected, monkeypatch
):
    fake_compiler(script)
    assert load_library(sources, []) is None
    warnings = [record.message for record in said.records if record.levelno >= logging.WARNING]
    assert len(warnings) == 1
    assert expected in warnings[0] and f"{SWITCH}=0" in warnings[0]
    assert not [path for path in (tmp_path / "cache" / "llmrecipes" / "kernels").iterdir() if path.is_dir()]
    monkeypatch.delenv("CXX")
    assert load_library(sources, []).answer() == 42


def test_a_cache_that_cannot_be_written(sources, tmp_path, monkeypatch, said):
    (tmp_path / "file").write_text("")
    monkeypatch.setenv("XDG_CACHE_HOME", str(tmp_path / "file"))
    assert load_library(sources, []) is None
    assert "Not a directory" in said.text


def test_a_user_without_a_home(sources, monkeypatch, said):
    def nowhere():
        raise RuntimeError("Could not determine home directory.")

    monkeypatch.delenv("XDG_CACHE_HOME")
    monkeypatch.setattr("llmrecipes.kernels.build.Path.home", nowhere)
    assert load_library(sources, []) is None
    assert "home directory" in said.text


def test_switched_off(tmp_path):
    """Nothing is compiled, loaded or said."""
    code = (
        "import torch; from llmrecipes.kernels import library, products; print(library.kernel_types(), "
        "library.has_kernels(torch.float32), products.multiplies_faster(torch.zeros(1)), library._library.cache_info())"
    )
    environment = os.environ | {SWITCH: "0", "XDG_CACHE_HOME": str(tmp_path)}
    done = subprocess.run([sys.executable, "-c", code], env=environment, capture_output=True, text=True, timeout=120)
    assert done.stdout.startswith("[] False False CacheInfo(hits=0, misses=0"), done.stderr
    assert not done.stderr and not list(tmp_path.iterdir())

"""Which part may import which, and what the quick commands never import."""

from __future__ import annotations

import subprocess
import sys

import pytest
from helpers import REPOSITORY


def lint(monkeypatch, config):
    """Exit code of import-linter on this repository."""
    from importlinter.cli import lint_imports

    monkeypatch.chdir(REPOSITORY)
    # It sets up logging for the whole process, and would silence our logger in later tests.
    monkeypatch.setattr("logging.config.dictConfig", lambda settings: None)
    return lint_imports(config_filename=str(config), no_cache=True)


def test_contracts_hold(monkeypatch, capsys):
    assert lint(monkeypatch, REPOSITORY / "pyproject.toml") == 0, capsys.readouterr().out
    out = capsys.readouterr().out
    assert "Contracts: 3 kept, 0 broken." in out
    assert "layers KEPT" in out


def test_mutant_layers_upside_down_are_noticed(monkeypatch, tmp_path, capsys):
    text = (REPOSITORY / "pyproject.toml").read_text(encoding="utf-8")
    upper, lower = '    "llmrecipes.modules",\n', '    "llmrecipes.models | llmrecipes.losses",\n'
    assert upper in text and lower in text
    mutant = tmp_path / "pyproject.toml"
    mutant.write_text(text.replace(upper, "#\n").replace(lower, upper).replace("#\n", lower), encoding="utf-8")
    assert lint(monkeypatch, mutant) == 1
    assert "BROKEN" in capsys.readouterr().out


HEAVY = {"torch", "lightning", "transformers", "numpy", "jsonargparse", "matplotlib", "wandb"}


@pytest.mark.parametrize("words", [["--help"], ["--version"], ["check", "--help"], ["fti"]], ids=" ".join)
def test_quick_words_import_nothing_heavy(words):
    code = f"import sys; from llmrecipes.cli import main; main({words}); print(sorted({HEAVY} & set(sys.modules)))"
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True)
    assert done.stdout.splitlines()[-1] == "[]", done.stdout + done.stderr


def test_checking_a_recipe_imports_nothing_heavy():
    recipe = str(REPOSITORY / "recipes" / "moe_pretrain.yaml")
    code = (
        f"import sys; from llmrecipes.cli import main; code = main(['check', '--without_files', {recipe!r}]);"
        f"print(code, sorted({HEAVY} & set(sys.modules)))"
    )
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True)
    assert done.stdout.splitlines()[-1] == "0 []", done.stdout + done.stderr

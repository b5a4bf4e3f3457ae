"""Samples show what the model writes and leave no trace in the training."""

from __future__ import annotations

import re

from helpers import cli, saved_tensors, trajectory, write_recipe

from llmrecipes.callbacks import samples as samples_module
from llmrecipes.models import generate

SAMPLES = {"every": 2, "prompts": ["日本の", "w5 w6"], "max_new_tokens": 6}


def fit(folder, recipe, name, samples):
    path = write_recipe(folder, recipe | {"name": name, "samples": samples})
    assert cli("fit", "--config", path, "--run_root", folder) == 0
    return folder / name


def test_training_is_bit_identical_with_and_without(tmp_path, with_words, monkeypatch):
    recipe = with_words()
    assert recipe["model"]["init_args"]["config"]["dropout"] > 0  # the random generators matter
    without = fit(tmp_path, recipe, "without", {})
    with_them = fit(tmp_path, recipe, "with", SAMPLES)
    assert trajectory(with_them) == trajectory(without)
    assert saved_tensors(with_them, 6) == saved_tensors(without, 6)
    texts = sorted(path.name for path in (with_them / "samples").iterdir())
    assert texts == ["step=000002.txt", "step=000004.txt", "step=000006.txt"]
    assert not (without / "samples").exists()
    text = (with_them / "samples" / "step=000006.txt").read_text(encoding="utf-8")
    assert re.fullmatch(r"日本の│(\S+ ?)+\n\nw5 w6│(\S+ ?)+\n", text), text
    assert (with_them / "log.txt").read_text(encoding="utf-8").count("sample ") == 3

    # Mutant: a model left without dropout is noticed.
    def leaves_evaluating(model, *args, **kwargs):
        written = generate(model, *args, **kwargs)
        model.eval()
        return written

    monkeypatch.setattr(samples_module, "generate", leaves_evaluating)
    assert trajectory(fit(tmp_path, recipe, "mutant", SAMPLES)) != trajectory(without)


def test_without_a_tokenizer_it_is_said_before_the_first_step(tmp_path, recipe, capsys):
    path = write_recipe(tmp_path, recipe() | {"samples": {"every": 2}})
    assert cli("fit", "--config", path, "--run_root", tmp_path) == 2
    captured = capsys.readouterr()
    assert "tokenizer" in captured.err
    assert "Traceback" not in captured.err
    assert not (tmp_path / "dense" / "metrics.jsonl").exists() or trajectory(tmp_path / "dense") == []

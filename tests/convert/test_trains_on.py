"""Families with mechanisms of their own: checked, trained on for some steps, and written back for transformers."""

from __future__ import annotations

import copy
import json

import pytest
import torch
import yaml
from helpers import cli, trajectory, write_recipe
from published_configs import READ, shrunk

from llmrecipes.convert.folder import read_model

transformers = pytest.importorskip("transformers")
pytestmark = pytest.mark.oracle

NAMES = ("pythia-160m", "Phi-4-mini", "gemma-3-270m", "granite-3.1-2b", "Qwen2.5-7B (yarn)")


@pytest.mark.parametrize("name", NAMES)
def test_a_run_goes_on_from_it_and_is_exported(name, tmp_path, recipe, capsys):
    hf = shrunk(READ[name][0]) | {"vocab_size": 64, "torch_dtype": "float32"}
    torch.manual_seed(0)
    transformers.AutoModelForCausalLM.from_config(transformers.AutoConfig.for_model(**hf)).save_pretrained(
        tmp_path / "hf"
    )
    (tmp_path / "hf" / "config.json").write_text(json.dumps(hf))
    assert cli("convert", "from-hf", tmp_path / "hf", tmp_path / "ours") == 0
    plain = recipe(steps=3)
    path, folder = write_recipe(tmp_path, plain), tmp_path / "ours" / "model.yaml"
    whole = copy.deepcopy(plain)
    whole["model"]["init_args"] |= yaml.safe_load(folder.read_text())["model"]["init_args"]
    assert cli("check", write_recipe(tmp_path, whole, "whole.yaml")) == 0, capsys.readouterr()
    assert cli("fit", "--config", path, "--config", folder, "--run_root", tmp_path) == 0
    run = tmp_path / plain["name"]
    losses = [r["loss"] for r in trajectory(run) if "loss" in r]
    assert len(losses) == 3 and losses[-1] < losses[0]
    # The first loss is that of transformers' own weights: nothing was drawn anew.
    assert abs(losses[0] - 4.16) < 0.5
    assert cli("convert", "to-hf", run, tmp_path / "back") == 0
    assert json.loads((tmp_path / "back" / "config.json").read_text())["model_type"] == hf["model_type"]
    assert read_model(run).config == read_model(tmp_path / "ours").config


def test_texts_longer_than_the_angles_are_known_for_are_a_finding(tmp_path, recipe, capsys):
    whole = recipe(steps=3)
    scaling = {"kind": "dynamic", "factor": 2.0, "original_max_seq_len": 16}
    whole["model"]["init_args"]["config"]["rope_scaling"] = scaling
    assert cli("check", write_recipe(tmp_path, whole)) == 2
    told = capsys.readouterr()
    sentence = "data.init_args.seq_len 32: rope_scaling dynamic turns by other angles beyond 16 tokens"
    assert sentence in told.out + told.err
    scaling["original_max_seq_len"] = 32
    assert cli("check", write_recipe(tmp_path, whole)) == 0

"""Configurations as they were published: each is read right, with the right size, or refused in one sentence."""

from __future__ import annotations

import json

import pytest
import torch
from published_configs import READ, REFUSED, shrunk

from llmrecipes.cli import main
from llmrecipes.convert import config_from_hf, config_to_hf, hf_family
from llmrecipes.convert.config_in import read_config
from llmrecipes.models import Decoder

transformers = pytest.importorskip("transformers")
pytestmark = pytest.mark.oracle


def twin(hf, device="cpu"):
    with torch.device(device):
        return transformers.AutoModelForCausalLM.from_config(transformers.AutoConfig.for_model(**hf))


def folder_of(hf, path):
    """A folder with the file as it was published, and random weights."""
    torch.manual_seed(0)
    twin(hf).save_pretrained(path)
    (path / "config.json").write_text(json.dumps(hf))
    return path


def test_how_many():
    assert (len(READ), len(REFUSED)) == (40, 22)
    assert len({hf["model_type"] for hf, _ in READ.values()}) == 18


def test_parameters_are_counted_as_transformers_counts_them():
    """By arithmetic, of our module and of theirs, none of which has memory."""
    for name, (hf, published) in READ.items():
        config = config_from_hf(hf)
        with torch.device("meta"):
            ours = sum(p.numel() for p in Decoder(config).parameters())
        theirs = sum(p.numel() for p in twin(hf, "meta").parameters())
        assert config.num_params == ours == theirs == (published or theirs), name
        assert config.active_params == ours or config.moe is not None
        assert config_from_hf(config_to_hf(config)) == config, name


@pytest.mark.parametrize("name", READ)
def test_reads_with_equal_logits(name, tmp_path, capsys):
    hf = shrunk(READ[name][0])
    assert main(["convert", "from-hf", str(folder_of(hf, tmp_path / "hf")), str(tmp_path / "ours")]) == 0
    printed = capsys.readouterr().out
    assert "logits equal transformers' to" in printed
    assert main(["convert", "to-hf", str(tmp_path / "ours"), str(tmp_path / "back")]) == 0
    written = json.loads((tmp_path / "back" / "config.json").read_text())
    assert config_from_hf(written) == config_from_hf(hf)
    assert written["model_type"] == hf_family(config_from_hf(hf))


@pytest.mark.parametrize("name", REFUSED)
def test_refuses_in_one_sentence(name, tmp_path, capsys):
    hf, sentence = REFUSED[name]
    (tmp_path / "hf").mkdir()
    (tmp_path / "hf" / "config.json").write_text(json.dumps(hf))
    assert main(["convert", "from-hf", str(tmp_path / "hf"), str(tmp_path / "ours")]) == 2
    told = capsys.readouterr().err
    assert f"error: config.json: {sentence}" in told and "Traceback" not in told
    assert [p.name for p in tmp_path.iterdir()] == ["hf"]


def test_what_is_left_out_is_said_once(tmp_path, capsys):
    hf = shrunk(READ["SmolLM2-135M"][0])
    assert main(["convert", "from-hf", str(folder_of(hf, tmp_path / "hf")), str(tmp_path / "ours")]) == 0
    line = "config.json: left out, because it changes no logits: is_llama_config, transformers.js_config\n"
    assert capsys.readouterr().out.count(line) == 1
    assert read_config(READ["TinyLlama-1.1B"][0])[1] == []
    assert read_config(READ["Phi-3-mini-4k"][0])[1] == ["auto_map"]  # code, which is never run
    assert READ["SmolLM2-135M"][0]["rope_interleaved"] is False
    told = main(["convert", "from-hf", str(folder_of(hf | {"rope_interleaved": True}, tmp_path / "other")), "x"])
    assert told == 2 and "rope_interleaved True: not understood" in capsys.readouterr().err

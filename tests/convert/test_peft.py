"""Adapters in PEFT's format: theirs in, ours out, logits equal; what is not plain LoRA is refused."""

from __future__ import annotations

import json
import shutil
from dataclasses import replace
from pathlib import Path

import pytest
import torch
from helpers import REPOSITORY, cli
from peers import peer_packages, run_with_peer
from peft_peer import CASES, base_model, tokens
from safetensors.torch import load_file, save_file

from llmrecipes.convert.folder import read_model
from llmrecipes.convert.peft import PeftAdapter, peft_names
from llmrecipes.models import Decoder, LoraConfig, ModelConfig, init_weights

GOLDEN = REPOSITORY / "tests" / "golden" / "peft"
PEFT = ("peft==0.21.2", "accelerate==1.15.0")


@pytest.fixture(scope="module")
def base(tmp_path_factory) -> Path:
    """The Hugging Face model beneath all adapters."""
    folder = tmp_path_factory.mktemp("base") / "hf"
    base_model().save_pretrained(folder)
    return folder


def logits(folder):
    model = read_model(folder).model
    with torch.no_grad():
        return model.logits(model(tokens()).hidden)


@pytest.mark.parametrize("case", CASES)
def test_an_adapter_of_peft_gives_its_logits_and_comes_out_as_it_was(case, base, tmp_path, capsys):
    assert len(list(GOLDEN.iterdir())) == len(CASES)
    theirs = GOLDEN / case
    files = tmp_path / "adapter"
    files.mkdir()
    for name in ("adapter_config.json", "adapter_model.safetensors"):
        shutil.copy(theirs / name, files)
    assert cli("convert", "from-peft", files, base, tmp_path / "ours") == 0
    expected = load_file(theirs / "expected.safetensors")["logits"]
    assert (logits(tmp_path / "ours") - expected).abs().max() < 2e-5 * expected.abs().max()
    assert (logits(base) - expected).abs().max() > 0.1
    assert cli("convert", "to-peft", tmp_path / "ours", tmp_path / "out", "--base_model", "some/model") == 0
    again, original = (load_file(f / "adapter_model.safetensors") for f in (tmp_path / "out", theirs))
    assert again.keys() == original.keys()
    assert all(torch.equal(again[name], original[name]) for name in original)
    config, before = (json.loads((f / "adapter_config.json").read_text()) for f in (tmp_path / "out", theirs))
    for key in ("r", "lora_alpha", "lora_dropout", "use_rslora", "bias", "peft_type", "task_type"):
        assert config[key] == before[key], key
    assert config["base_model_name_or_path"] == "some/model"


def test_mutants_of_the_scale_and_of_the_parts(base, tmp_path):
    """The comparison has teeth: another scale, or gate and up exchanged, is noticed."""
    expected = load_file(GOLDEN / "ffn" / "expected.safetensors")["logits"]
    model = read_model(base)
    files = tmp_path / "adapter"
    shutil.copytree(GOLDEN / "ffn", files)
    (files / "expected.safetensors").unlink()
    adapter = PeftAdapter(files, model.config)
    state = model.model.state_dict() | {name: adapter.read(name) for name in adapter.names}

    def difference(config, state):
        decoder = Decoder(config).eval()
        decoder.load_state_dict(state)
        with torch.no_grad():
            return (decoder.logits(decoder(tokens()).hidden) - expected).abs().max() / expected.abs().max()

    assert difference(adapter.config, state) < 2e-5
    assert difference(replace(adapter.config, lora=replace(adapter.config.lora, rank_stabilized=True)), state) > 0.01
    exchanged = {
        n.replace(".gate.", ".x.").replace(".up.", ".gate.").replace(".x.", ".up."): t for n, t in state.items()
    }
    assert difference(adapter.config, exchanged) > 0.01


REFUSED = [
    ({"use_dora": True}, "use_dora: True is not supported"),
    ({"rank_pattern": {"up_proj": 3}}, "rank_pattern"),
    ({"modules_to_save": ["lm_head"]}, "modules_to_save"),
    ({"init_lora_weights": "pissa"}, "changes the base weights too"),
    ({"bias": "all"}, "only LORA without biases"),
    ({"peft_type": "LOHA"}, "only LORA"),
    ({"brand_new_option": 3}, "brand_new_option: 3 is not supported"),
    ({"r": 4}, "the model makes it [4, 32]"),
    ({"target_modules": ["up_proj"]}, "for which there is no place"),
    ({"target_modules": ["up_proj", "gate_proj", "down_proj", "q_proj"]}, "lacks base_model.model.model.layers.0.self"),
]


def test_what_is_not_plain_lora_is_refused(base, tmp_path, capsys):
    for n, (change, problem) in enumerate(REFUSED):
        files = tmp_path / f"adapter{n}"
        files.mkdir()
        shutil.copy(GOLDEN / "ffn" / "adapter_model.safetensors", files)
        config = json.loads((GOLDEN / "ffn" / "adapter_config.json").read_text()) | change
        (files / "adapter_config.json").write_text(json.dumps(config))
        assert cli("convert", "from-peft", files, base, tmp_path / "out") == 2, change
        assert problem in capsys.readouterr().err, change
    assert not (tmp_path / "out").exists()
    assert cli("convert", "from-peft", base, base, tmp_path / "out") == 2
    assert "adapter_config.json" in capsys.readouterr().err
    assert cli("convert", "to-peft", base, tmp_path / "out") == 2
    assert "has no adapter" in capsys.readouterr().err


def test_a_model_with_adapters_is_not_exported_as_a_plain_one(base, tmp_path, capsys):
    files = tmp_path / "adapter"
    shutil.copytree(GOLDEN / "ffn", files)
    (files / "expected.safetensors").unlink()
    assert cli("convert", "from-peft", files, base, tmp_path / "ours") == 0
    assert cli("convert", "to-hf", tmp_path / "ours", tmp_path / "hf", "--max_seq_len", "64") == 2
    assert "llmrecipes merge fold" in capsys.readouterr().err
    assert cli("convert", "from-peft", files, tmp_path / "ours", tmp_path / "twice") == 2
    assert "has an adapter already" in capsys.readouterr().err


@pytest.mark.oracle
@pytest.mark.slow
def test_peft_loads_what_is_written_here(base, tmp_path, tmp_path_factory):
    """PEFT itself, in an environment of its own, over the same Hugging Face folder."""
    packages = peer_packages(tmp_path_factory, *PEFT)
    script = Path(__file__).parent / "peft_peer.py"
    config, folders, adapters = read_model(base).config, [], []
    cases = [
        {"rank": 8, "alpha": 32, "dropout": 0.1},
        {"rank": 3, "alpha": 2, "targets": r".*self_attn\.[kv]_proj", "rank_stabilized": True},
        {"rank": 4, "alpha": 4, "targets": r"model\.layers\.0\..*_proj"},
    ]
    for n, lora in enumerate(cases):
        adapted = replace(config, lora=LoraConfig(**lora))
        folders.append(make_adapted(tmp_path / f"ours{n}", base, adapted))
        adapters.append(tmp_path / f"peft{n}")
        assert cli("convert", "to-peft", folders[n], adapters[n]) == 0
    run_with_peer(packages, script, "load", base, *adapters)
    for folder, adapter in zip(folders, adapters, strict=True):
        expected = load_file(adapter.with_name(f"{adapter.name}-logits.safetensors"))["logits"]
        assert (logits(folder) - expected).abs().max() < 2e-5 * expected.abs().max()
        assert (logits(base) - expected).abs().max() > 0.01


def make_adapted(folder: Path, base: Path, config: ModelConfig) -> Path:
    """A folder of ours with a drawn adapter over the base's weights."""
    from llmrecipes.convert.from_hf import recipe_part

    decoder = Decoder(config)
    init_weights(decoder, 1)
    decoder.load_state_dict(read_model(base).model.state_dict(), strict=False)
    with torch.no_grad():
        for name in peft_names(config):
            if name.endswith(".b"):
                decoder.get_parameter(name).normal_(0.0, 0.2, generator=torch.Generator().manual_seed(len(name)))
    folder.mkdir()
    save_file(decoder.state_dict(), folder / "model.safetensors")
    (folder / "model.yaml").write_text(recipe_part(config, folder, with_tokenizer=False))
    return folder

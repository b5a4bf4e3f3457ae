"""Folders in and out: from-hf, to-hf, and what is refused."""

from __future__ import annotations

import json
import shutil

import pytest
import torch
from safetensors.torch import load_file

from llmrecipes.convert.commands import main
from llmrecipes.convert.folder import read_model
from llmrecipes.errors import UserError

transformers = pytest.importorskip("transformers")
from hf_models import FAMILIES, peer, tokens_for  # noqa: E402

pytestmark = pytest.mark.oracle


def tensors(folder):
    return {name: t for path in sorted(folder.glob("*.safetensors")) for name, t in load_file(path).items()}


def logits(folder):
    model = read_model(folder).model
    with torch.no_grad():
        return model.logits(model(tokens_for(model.config)).hidden)


@pytest.mark.parametrize("family", FAMILIES)
def test_there_and_back_is_bit_exact(family, tmp_path, capsys):
    """Through files: sharded in, sharded out; transformers loads what we write, with nothing missing or left over."""
    index = {"qwen3_moe": 3, "mixtral": 1}.get(family, 2)
    model = peer(family, index)
    source, ours, back = tmp_path / "hf", tmp_path / "ours", tmp_path / "back"
    model.save_pretrained(source, max_shard_size="30KB")
    assert len(list(source.glob("*.safetensors"))) > 1
    assert main(["from-hf", str(source), str(ours), "--vocab_multiple", "64", "--max_shard_gb", "4e-5"]) == 0
    assert len(list(ours.glob("*.safetensors"))) > 1
    assert main(["to-hf", str(ours), str(back)]) == 0
    printed = capsys.readouterr().out
    assert printed.count("logits equal transformers' to") == 2
    theirs, again = tensors(source), tensors(back)
    if model.config.tie_word_embeddings:
        theirs.pop("lm_head.weight", None)
    assert again.keys() == theirs.keys()
    assert all(torch.equal(again[name], theirs[name]) for name in theirs)
    loaded, report = transformers.AutoModelForCausalLM.from_pretrained(back, output_loading_info=True)
    assert not any(report[kind] for kind in ("missing_keys", "unexpected_keys", "mismatched_keys"))
    with torch.no_grad():
        expected = model(tokens_for(model)).logits
        assert (logits(ours) - expected).abs().max() < 1e-5
        assert (loaded(tokens_for(model)).logits - expected).abs().max() < 1e-5
    generation = json.loads((back / "generation_config.json").read_text())
    assert (generation["bos_token_id"], generation["eos_token_id"]) == (1, 2)
    assert not [p for p in tmp_path.iterdir() if p.name.startswith(".tmp")]

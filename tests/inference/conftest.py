"""Two little models with tokenizers: a run of ours (SentencePiece, byte pieces), a Hugging Face folder (byte BPE)."""

from __future__ import annotations

import json

import pytest
import torch
import yaml
from model_folders import make_hf_folder


@pytest.fixture(scope="session")
def sentencepiece_folder(tmp_path_factory):
    """A tokenizer of ours that knows few characters: most Japanese ones come as bytes."""
    from data_prep.demo_corpus import demo
    from data_prep.tokenizer import train_tokenizer

    folder = tmp_path_factory.mktemp("tokenizers")
    demo(str(folder / "corpus"), documents=120, seed=3)
    names = [str(folder / "corpus" / f"{name}.jsonl") for name in ("en_towns", "en_people")]
    train_tokenizer(names, str(folder / "small"), vocab_size=400, num_threads=1)
    return folder / "small"


@pytest.fixture(scope="session")
def run_folder(sentencepiece_folder, tmp_path_factory):
    """A run folder with one checkpoint of random weights."""
    from llmrecipes.checkpoint import TrainingState, write_checkpoint
    from llmrecipes.models import Decoder, ModelConfig, init_weights

    folder = tmp_path_factory.mktemp("run")
    config = {"vocab_size": 416, "dim": 32, "num_layers": 2, "num_heads": 2, "ffn_dim": 48, "init_std": 0.3}
    model = Decoder(ModelConfig(**config))
    init_weights(model, 5)
    torch.nn.init.normal_(model.embed.weight, generator=torch.Generator().manual_seed(0))
    data = {"class_path": "llmrecipes.data.PackedShards", "init_args": {"seq_len": 64}}
    data["init_args"]["tokenizer"] = str(sentencepiece_folder)
    recipe = {
        "name": "small",
        "model": {"class_path": "llmrecipes.modules.PretrainModule", "init_args": {"config": config}},
        "data": data,
    }
    (folder / "recipe.yaml").write_text(yaml.safe_dump(recipe), encoding="utf-8")
    info = {"progress": {"trajectory": {"model": {"config": config}, "data": {"seq_len": 64}}}}
    write_checkpoint(folder / "checkpoints", TrainingState(3, model.state_dict(), {}, {"x": torch.zeros(1)}, info))
    return folder


@pytest.fixture(scope="session")
def hf_folder(tmp_path_factory):
    return make_hf_folder(tmp_path_factory.mktemp("hf") / "small")


@pytest.fixture(scope="session")
def hf_folder_with_begin(tmp_path_factory):
    return make_hf_folder(tmp_path_factory.mktemp("hf") / "begin", begin=True)


@pytest.fixture
def jsonl(tmp_path):
    """Writes records to a JSONL file."""

    def write(name, records):
        path = tmp_path / name
        path.write_text("".join(json.dumps(r, ensure_ascii=False) + "\n" for r in records), encoding="utf-8")
        return path

    return write

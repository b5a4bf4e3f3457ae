"""Small models and branches of them, as folders."""

from __future__ import annotations

from dataclasses import replace
from pathlib import Path

import torch
from safetensors.torch import save_file

from llmrecipes.convert.folder import read_model
from llmrecipes.convert.from_hf import recipe_part
from llmrecipes.models import Decoder, LoraConfig, ModelConfig, init_weights

SIZES = {"vocab_size": 64, "dim": 32, "num_layers": 2, "num_heads": 4, "num_kv_heads": 2, "max_seq_len": 64}
LORA = {"rank": 4, "alpha": 8, "dropout": 0.1}


def write(folder: Path, decoder: Decoder) -> Path:
    folder.mkdir(parents=True)
    save_file(decoder.state_dict(), folder / "model.safetensors")
    (folder / "model.yaml").write_text(recipe_part(decoder.config, folder, with_tokenizer=False))
    return folder


def seed_model(folder: Path, **options) -> Path:
    """Weights large enough that a difference shows."""
    decoder = Decoder(ModelConfig(**(SIZES | {"ffn_dim": 48, "init_std": 0.2} | options)))
    init_weights(decoder, 3)
    return write(folder, decoder)


def whole_branch(folder: Path, seed: Path, number: int) -> Path:
    """All weights somewhat moved."""
    loaded = read_model(seed)
    generator = torch.Generator().manual_seed(number)
    with torch.no_grad():
        for p in loaded.model.parameters():
            p.add_(torch.randn(p.shape, generator=generator) * 0.05)
    return write(folder, loaded.model)


def lora_branch(folder: Path, seed: Path, number: int, **lora) -> Path:
    """The seed with an adapter that does something."""
    loaded = read_model(seed)
    decoder = Decoder(replace(loaded.config, lora=LoraConfig(**(LORA | lora))))
    init_weights(decoder, number)
    decoder.load_state_dict(loaded.model.state_dict(), strict=False)
    generator = torch.Generator().manual_seed(number)
    with torch.no_grad():
        for name, p in decoder.named_parameters():
            if name.endswith(".b"):
                p.copy_(torch.randn(p.shape, generator=generator) * 0.3)
    return write(folder, decoder)


def logits(folder: Path, dtype=torch.float64, expert: int | None = None):
    """Of random tokens, the router held to one expert if asked."""
    from llmrecipes.convert.merge_check import forced

    model = read_model(folder, dtype).model
    tokens = torch.randint(0, 64, (2, 40), generator=torch.Generator().manual_seed(0))
    with torch.no_grad():
        if expert is None:
            return model.logits(model(tokens).hidden)
        with forced(model, expert):
            return model.logits(model(tokens).hidden)


def gap(a, b) -> float:
    return float((a - b).abs().max() / b.abs().max())

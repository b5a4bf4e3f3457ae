"""litgpt's model and loss in a bare loop, its ``torch.compile`` by ``--compile``."""

from __future__ import annotations

import json
from pathlib import Path

import torch
from litgpt.config import Config
from litgpt.model import GPT
from litgpt.scripts.convert_hf_checkpoint import copy_weights_hf_llama
from litgpt.utils import chunked_cross_entropy
from torch import Tensor

from benchmarks.workers.bare_loop import arguments, train, weights_of


def litgpt_config(folder: Path) -> Config:
    """The sizes of a transformers folder in litgpt's terms."""
    sizes = json.loads((folder / "config.json").read_text(encoding="utf-8"))
    experts = sizes.get("num_local_experts", 0)
    return Config(
        name=folder.stem,
        block_size=sizes["max_position_embeddings"],
        vocab_size=sizes["vocab_size"],
        padded_vocab_size=sizes["vocab_size"],
        n_layer=sizes["num_hidden_layers"],
        n_head=sizes["num_attention_heads"],
        n_query_groups=sizes["num_key_value_heads"],
        n_embd=sizes["hidden_size"],
        intermediate_size=sizes["intermediate_size"],
        moe_intermediate_size=sizes["intermediate_size"] if experts else None,
        n_expert=experts,
        n_expert_per_token=sizes.get("num_experts_per_tok", 0),
        mlp_class_name="LLaMAMoE" if experts else "LLaMAMLP",
        norm_class_name="RMSNorm",
        norm_eps=sizes["rms_norm_eps"],
        rotary_percentage=1.0,
        rope_base=10000,
        parallel_residual=False,
        bias=False,
    )


def converted(inputs: Path, name: str, config: Config) -> dict[str, Tensor]:
    """The shared weights under litgpt's names, by its own converter."""
    tensors: dict[str, Tensor] = {}
    copy_weights_hf_llama(config, {}, tensors, weights_of(inputs, name))
    return tensors


def main() -> None:
    """One record."""
    asked = arguments(__doc__)
    config = litgpt_config(asked.inputs / f"{asked.model}.hf")
    model = GPT(config)
    model.load_state_dict(converted(asked.inputs, asked.model, config))
    run = torch.compile(model) if asked.compile else model
    train(model, lambda tokens, labels: chunked_cross_entropy(run(tokens), labels), asked)


if __name__ == "__main__":
    main()

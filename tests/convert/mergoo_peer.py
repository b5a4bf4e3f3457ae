"""Small Llamas whose linear maps are mergoo's own layers; run in an environment that has mergoo.

``python mergoo_peer.py FOLDER`` writes, per case, the weights and the logits of the composed model as one safetensors
file. Only transformers, mergoo (without its dependencies) and safetensors are needed; of mergoo only
``compose_layers`` is used, because its composer does not import beside transformers 5.
"""

from __future__ import annotations

import sys
from pathlib import Path
from types import SimpleNamespace

import torch
from safetensors.torch import save_file

SIZES = {
    "vocab_size": 64, "hidden_size": 16, "num_hidden_layers": 2, "num_attention_heads": 2, "num_key_value_heads": 1,
    "max_position_embeddings": 64, "tie_word_embeddings": False,
}  # fmt: skip
ADAPTER = {
    "r": 4,
    "lora_alpha": 6,
    "lora_dropout": 0.1,
    "init_lora_weights": True,
    "use_rslora": False,
    "use_dora": False,
}
# mergoo's gate reads hidden_size features: a map with other inputs (down_proj, unless ffn = hidden) fails there.
CASES = {
    "lora_square": {"ffn": 16, "maps": ["gate_proj", "up_proj", "down_proj"], "top_k": 2},
    "lora_attention": {"ffn": 24, "maps": ["q_proj", "k_proj", "v_proj", "o_proj", "gate_proj", "up_proj"], "top_k": 2},
    "lora_top1": {"ffn": 24, "maps": ["gate_proj", "up_proj"], "top_k": 1},
    "full": {"ffn": 24, "maps": ["gate_proj", "up_proj", "down_proj"], "top_k": 2},
}
NUM_EXPERTS = 3


def tokens():
    return torch.randint(0, 64, (2, 24), generator=torch.Generator().manual_seed(0))


def composed(case: str) -> torch.nn.Module:
    """The Llama with mergoo's layers in place of its linear maps."""
    import transformers
    from mergoo.compose_layers import convert_linear_to_moe

    options = CASES[case]
    config = transformers.LlamaConfig(**SIZES, intermediate_size=options["ffn"])
    model = transformers.LlamaForCausalLM(config)
    composer = SimpleNamespace(
        router_layers_index=[0, 1],
        router_layers=options["maps"],
        num_experts=NUM_EXPERTS,
        num_experts_per_tok=options["top_k"],
        hidden_size=config.hidden_size,
    )
    if case != "full":
        composer.adapter_configs = [ADAPTER] * NUM_EXPERTS
    for index, layer in enumerate(model.model.layers):
        for parent in (layer.self_attn, layer.mlp):
            for name, linear in list(parent.named_children()):
                if name in options["maps"]:
                    made = convert_linear_to_moe(name, composer, index, linear.in_features, linear.out_features, False)
                    setattr(parent, name, made)
    with torch.no_grad():
        for i, (_, p) in enumerate(sorted(model.named_parameters())):
            p.copy_(torch.randn(p.shape, generator=torch.Generator().manual_seed(i)) * (0.3 if p.ndim > 1 else 1.0))
    return model.eval()


def main(folder: Path) -> None:
    for case in CASES:
        model = composed(case)
        with torch.no_grad():
            state = {name: p.detach().clone() for name, p in model.named_parameters()}
            save_file(state | {"logits": model(tokens()).logits.contiguous()}, folder / f"{case}.safetensors")


if __name__ == "__main__":
    main(Path(sys.argv[1]))

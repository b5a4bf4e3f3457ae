"""A small Llama with an adapter, computed by PEFT itself; run in an environment that has PEFT.

``python peft_peer.py golden FOLDER`` writes adapters, as PEFT saves them, and the logits with them;
``python peft_peer.py load BASE ADAPTER...`` writes the logits of adapters that PEFT loads from folders, beside each.
Needs transformers, peft and safetensors only.
"""

from __future__ import annotations

import json
import sys
from pathlib import Path

import torch
from safetensors.torch import save_file

SIZES = {
    "vocab_size": 64, "hidden_size": 32, "intermediate_size": 48, "num_hidden_layers": 2, "num_attention_heads": 4,
    "num_key_value_heads": 2, "max_position_embeddings": 64, "tie_word_embeddings": False,
}  # fmt: skip
CASES = {
    "ffn": {"r": 8, "lora_alpha": 20, "lora_dropout": 0.1, "target_modules": r".*\.(gate|up|down)_proj"},
    "attention": {"r": 4, "lora_alpha": 16, "target_modules": ["q_proj", "v_proj"], "use_rslora": True},
    "all": {"r": 6, "lora_alpha": 3, "target_modules": "all-linear"},
    "one_layer": {"r": 5, "lora_alpha": 7, "target_modules": r"model\.layers\.1\.(mlp\.up_proj|self_attn\.o_proj)"},
}


def tokens():
    return torch.randint(0, 64, (2, 24), generator=torch.Generator().manual_seed(0))


def fill(model):
    """Weights large enough that a difference shows, a function of names only."""
    with torch.no_grad():
        for i, (_, p) in enumerate(sorted(model.named_parameters())):
            p.copy_(torch.randn(p.shape, generator=torch.Generator().manual_seed(i)) * (0.3 if p.ndim > 1 else 1.0))
    return model


def base_model():
    import transformers

    return fill(transformers.LlamaForCausalLM(transformers.LlamaConfig(**SIZES))).eval()


def golden(folder: Path) -> None:
    import peft

    for name, options in CASES.items():
        model = peft.get_peft_model(base_model(), peft.LoraConfig(task_type="CAUSAL_LM", **options)).eval()
        with torch.no_grad():
            for i, (_, p) in enumerate(sorted((n, p) for n, p in model.named_parameters() if "lora_" in n)):
                p.copy_(torch.randn(p.shape, generator=torch.Generator().manual_seed(100 + i)) * 0.3)
            logits = model(tokens()).logits
        model.save_pretrained(folder / name)
        save_file({"logits": logits}, folder / name / "expected.safetensors")
        config = json.loads((folder / name / "adapter_config.json").read_text())
        config["target_modules"] = sorted(t) if isinstance(t := config["target_modules"], list) else t
        (folder / name / "adapter_config.json").write_text(json.dumps(config, indent=1) + "\n")
        (folder / name / "README.md").unlink(missing_ok=True)


def load(base: Path, *adapters: Path) -> None:
    import peft
    import transformers

    for adapter in adapters:
        model = transformers.AutoModelForCausalLM.from_pretrained(base, dtype=torch.float32)
        model = peft.PeftModel.from_pretrained(model, adapter).eval()
        with torch.no_grad():
            logits = model(tokens()).logits.contiguous()
        save_file({"logits": logits}, adapter.with_name(f"{adapter.name}-logits.safetensors"))


if __name__ == "__main__":
    {"golden": golden, "load": load}[sys.argv[1]](*map(Path, sys.argv[2:]))

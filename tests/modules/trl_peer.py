"""TRL's SFT and DPO on a tiny Llama; run in an environment that has TRL.

``python trl_peer.py FOLDER`` reads FOLDER/tokenizer, FOLDER/pairs.jsonl and FOLDER/talks.jsonl, and writes
FOLDER/policy and FOLDER/reference (Hugging Face folders of one model with other weights) and FOLDER/trl.safetensors:
losses and the gradients of every parameter.
"""

from __future__ import annotations

import json
import sys
from pathlib import Path

import torch
from safetensors.torch import save_file


def model_of(folder: Path, seed: int) -> torch.nn.Module:
    """A Llama whose weights are drawn by the order of their names."""
    import transformers

    sizes = {"hidden_size": 16, "intermediate_size": 24, "num_hidden_layers": 1, "num_attention_heads": 2}
    vocabulary = transformers.AutoTokenizer.from_pretrained(str(folder / "tokenizer"))
    config = transformers.LlamaConfig(
        vocab_size=len(vocabulary),
        num_key_value_heads=1,
        max_position_embeddings=512,
        tie_word_embeddings=True,
        **sizes,
    )
    model = transformers.LlamaForCausalLM(config)
    with torch.no_grad():
        for i, (_, p) in enumerate(sorted(model.named_parameters())):
            drawn = torch.randn(p.shape, generator=torch.Generator().manual_seed(100 * seed + i))
            p.copy_(drawn * 0.1 if p.ndim > 1 else 1 + 0.1 * drawn)
    return model


def gradients(model: torch.nn.Module, loss: torch.Tensor, name: str) -> dict[str, torch.Tensor]:
    model.zero_grad()
    loss.backward()
    found = {f"{name}/{key}": p.grad.clone() for key, p in model.named_parameters()}
    return found | {f"{name}/loss": loss.detach().reshape(1)}


def lines(path: Path) -> list[dict]:
    return [json.loads(line) for line in path.read_text(encoding="utf-8").splitlines()]


def said(role: str, text: str) -> list[dict]:
    return [{"role": role, "content": text}]


def main(folder: Path) -> None:
    import transformers
    from datasets import Dataset
    from trl import DPOConfig, DPOTrainer, SFTConfig, SFTTrainer

    tokenizer = transformers.AutoTokenizer.from_pretrained(str(folder / "tokenizer"))
    policy, reference = model_of(folder, 1), model_of(folder, 2)
    policy.save_pretrained(folder / "policy")
    reference.save_pretrained(folder / "reference")
    common = {
        "output_dir": str(folder / "out"), "report_to": "none", "use_cpu": True, "gradient_checkpointing": False,
        "max_length": None, "bf16": False,
    }  # fmt: skip
    pairs = [
        {"prompt": said("user", p["prompt"]), **{side: said("assistant", p[side]) for side in ("chosen", "rejected")}}
        for p in lines(folder / "pairs.jsonl")
    ]
    found: dict[str, torch.Tensor] = {}
    for loss in ("sigmoid", "hinge", "ipo"):
        trainer = DPOTrainer(
            model=policy, ref_model=reference, processing_class=tokenizer, train_dataset=Dataset.from_list(pairs),
            args=DPOConfig(beta=0.3, loss_type=loss, per_device_train_batch_size=len(pairs), **common),
        )  # fmt: skip
        inputs = next(iter(trainer.get_train_dataloader()))
        found |= gradients(policy, trainer.compute_loss(policy, inputs), f"dpo_{loss}")
    talks = [
        {"prompt": said("user", t["question"]), "completion": said("assistant", t["answer"])}
        for t in lines(folder / "talks.jsonl")
    ]
    sft = SFTTrainer(
        model=policy, processing_class=tokenizer, train_dataset=Dataset.from_list(talks),
        args=SFTConfig(completion_only_loss=True, per_device_train_batch_size=len(talks), **common),
    )  # fmt: skip
    inputs = next(iter(sft.get_train_dataloader()))
    found |= gradients(policy, sft.compute_loss(policy, inputs), "sft")
    save_file(found, folder / "trl.safetensors")


if __name__ == "__main__":
    main(Path(sys.argv[1]))

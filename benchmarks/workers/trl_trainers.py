"""TRL's trainers on the very conversations and pairs of our steps, already tokenized, with its own collators.

``packed``: SFTTrainer without padding, every conversation by itself (position ids, of which
transformers makes the mask).
``padded``: SFTTrainer as it comes, one conversation a row. ``dpo``, ``dpo-precomputed``: DPOTrainer with the reference
in the loop, or computed before training.
"""

from __future__ import annotations

import json
import statistics
import tempfile
from typing import Any

import torch
from datasets import Dataset
from transformers import AutoModelForCausalLM, AutoTokenizer
from trl import DPOConfig, DPOTrainer, SFTConfig, SFTTrainer
from trl.trainer.dpo_trainer import DataCollatorForPreference
from trl.trainer.sft_trainer import DataCollatorForLanguageModeling

from benchmarks.meter import Meter, matmul_rate, write_record
from benchmarks.workers.bare_loop import BETAS, CLIP_NORM, LR, WEIGHT_DECAY, arguments
from benchmarks.workers.transformers_trainer import Marks

IGNORE = -100
Conversation = list[list[int]]


class Steps:
    """A step's conversations are one item of the data set; TRL's collator gets them one by one."""

    def __init__(self, collator: Any) -> None:
        self._collator = collator

    def __call__(self, items: list[dict[str, Any]]) -> dict[str, torch.Tensor]:
        """The batch of one step."""
        found: dict[str, torch.Tensor] = self._collator([one for item in items for one in json.loads(item["step"])])
        return found


class Prepared(DPOTrainer):  # type: ignore[misc]
    """Its data is tokenized already."""

    def _prepare_dataset(self, dataset: Dataset, *_: object, **__: object) -> Dataset:
        return dataset

    def _set_signature_columns_if_needed(self) -> None:
        self._signature_columns = ["step"]


def talk(conversation: Conversation) -> dict[str, list[int]]:
    """As SFTTrainer prepares it."""
    ids, trained = conversation
    labels = [token if kept else IGNORE for token, kept in zip(ids, trained, strict=True)]
    return {"input_ids": ids, "labels": labels, "seq_lengths": [len(ids)]}


def pair(chosen: Conversation, rejected: Conversation) -> dict[str, list[int]]:
    """As DPOTrainer prepares it."""
    first = chosen[1].index(1)
    return {"prompt_ids": chosen[0][:first], "chosen_ids": chosen[0][first:], "rejected_ids": rejected[0][first:]}


def main() -> None:
    """One record."""
    asked = arguments(__doc__)
    kind, meter = asked.experts or "packed", Meter()
    dpo = kind.startswith("dpo")
    steps = json.loads((asked.inputs / ("pairs.json" if dpo else "talks.json")).read_text())[: asked.steps]
    if dpo:
        rows = [[pair(*both) for both in zip(step[::2], step[1::2], strict=True)] for step in steps]
        work = [len(row) for row in rows]
    else:
        rows = [[talk(one) for one in step] for step in steps]
        work = [sum(len(one["input_ids"]) - 1 for one in row) for row in rows]
    model = AutoModelForCausalLM.from_pretrained(asked.inputs / "dense.hf", dtype=torch.float32, local_files_only=True)
    tokenizer = AutoTokenizer.from_pretrained(asked.inputs / "unigram")
    tokenizer.pad_token = tokenizer.pad_token or tokenizer.eos_token
    with tempfile.TemporaryDirectory() as folder:
        common = {
            "output_dir": folder, "use_cpu": True, "bf16": asked.dtype == "bf16", "per_device_train_batch_size": 1,
            "max_steps": asked.steps, "learning_rate": LR, "lr_scheduler_type": "constant",
            "weight_decay": WEIGHT_DECAY, "adam_beta1": BETAS[0], "adam_beta2": BETAS[1], "max_grad_norm": CLIP_NORM,
            "logging_steps": 1, "save_strategy": "no", "report_to": "none", "disable_tqdm": True,
            "remove_unused_columns": False, "gradient_checkpointing": False, "max_length": None,
            "train_sampling_strategy": "sequential",
        }  # fmt: skip
        given = {
            "model": model,
            "processing_class": tokenizer,
            "train_dataset": Dataset.from_list([{"step": json.dumps(row)} for row in rows]),
            "callbacks": [Marks(meter)],
        }
        if dpo:
            settings = DPOConfig(beta=0.1, precompute_ref_log_probs=kind == "dpo-precomputed", **common)
            collator = Steps(DataCollatorForPreference(pad_token_id=tokenizer.pad_token_id))
            trainer = Prepared(args=settings, data_collator=collator, **given)
        else:
            packed = kind == "packed"
            collator = Steps(DataCollatorForLanguageModeling(tokenizer.pad_token_id, padding_free=packed))
            unprepared = {"dataset_kwargs": {"skip_prepare_dataset": True}}
            trainer = SFTTrainer(args=SFTConfig(**unprepared, **common), data_collator=collator, **given)
        trainer.train()
    meter.checks = [float(entry["loss"]) for entry in trainer.state.log_history if "loss" in entry]
    record = meter.record() | {"work": statistics.mean(work), "matmul_gflop_per_cpu_s": matmul_rate(asked.dtype)}
    write_record(record)


if __name__ == "__main__":
    main()

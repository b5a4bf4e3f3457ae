"""transformers' model in its Trainer, with its defaults (fused AdamW, SDPA), as a user runs it."""

from __future__ import annotations

import tempfile
from collections.abc import Iterator
from typing import Any

import torch
from torch import Tensor
from torch.utils.data import IterableDataset
from transformers import AutoModelForCausalLM, Trainer, TrainerCallback, TrainingArguments

from benchmarks.meter import Meter, matmul_rate, write_record
from benchmarks.workers.bare_loop import BETAS, CLIP_NORM, LR, WEIGHT_DECAY, arguments, load_batches


class Rows(IterableDataset):
    """The rows of the shared batches in their order; ``shift_labels`` tells the loss that labels are next ids."""

    def __init__(self, batches: Tensor) -> None:
        self._batches = batches

    def __iter__(self) -> Iterator[dict[str, Tensor]]:
        for tokens, labels in self._batches:
            for row in range(len(tokens)):
                yield {"input_ids": tokens[row], "labels": labels[row], "shift_labels": labels[row]}


class Marks(TrainerCallback):
    """The end of each optimizer step."""

    def __init__(self, meter: Meter) -> None:
        self._meter = meter

    def on_step_end(self, *_: Any, **__: Any) -> None:
        """The Trainer calls it after the update."""
        self._meter.mark()


def main() -> None:
    """One record."""
    asked = arguments(__doc__)
    meter, batches = Meter(), load_batches(asked)
    chosen = {"experts_implementation": asked.experts} if asked.experts else {}
    model = AutoModelForCausalLM.from_pretrained(
        asked.inputs / f"{asked.model}.hf", dtype=torch.float32, local_files_only=True, **chosen
    )
    with tempfile.TemporaryDirectory() as folder:
        settings = TrainingArguments(
            output_dir=folder,
            use_cpu=True,
            bf16=asked.dtype == "bf16",
            per_device_train_batch_size=batches.shape[2],
            max_steps=asked.steps,
            learning_rate=LR,
            lr_scheduler_type="constant",
            weight_decay=WEIGHT_DECAY,
            adam_beta1=BETAS[0],
            adam_beta2=BETAS[1],
            max_grad_norm=CLIP_NORM,
            torch_compile=asked.compile,
            logging_steps=1,
            save_strategy="no",
            report_to="none",
            disable_tqdm=True,
            remove_unused_columns=False,
        )
        trainer = Trainer(model, settings, train_dataset=Rows(batches), callbacks=[Marks(meter)])
        trainer.train()
    meter.checks = [float(entry["loss"]) for entry in trainer.state.log_history if "loss" in entry]
    write_record(meter.record() | {"matmul_gflop_per_cpu_s": matmul_rate(asked.dtype)})


if __name__ == "__main__":
    main()

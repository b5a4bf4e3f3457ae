"""litgpt's own ``pretrain``, with its sanity validation, for the time from the start to the first step."""

from __future__ import annotations

import csv
import sys
import tempfile
from collections.abc import Iterator
from pathlib import Path

import torch
from litgpt.args import EvalArgs, LogArgs, TrainArgs
from litgpt.data import DataModule
from litgpt.pretrain import setup
from torch import Tensor
from torch.utils.data import DataLoader, IterableDataset

from benchmarks.meter import Meter, matmul_rate, write_record
from benchmarks.workers.bare_loop import BETAS, CLIP_NORM, LR, WEIGHT_DECAY, arguments, load_batches
from benchmarks.workers.litgpt_bare import litgpt_config

PRECISION = {"bf16": "bf16-mixed", "fp32": "32-true"}


class Rows(IterableDataset):
    """Rows of T + 1 ids; marks the end of a step when the next one's batch is asked for."""

    def __init__(self, batches: Tensor, meter: Meter | None) -> None:
        self._rows, self._meter = torch.cat([batches[:, 0], batches[:, 1, :, -1:]], dim=-1), meter

    def __iter__(self) -> Iterator[Tensor]:
        for number, rows in enumerate(self._rows):
            if number and self._meter:
                self._meter.mark()
            yield from rows


class Batches(DataModule):
    """The shared batches."""

    def __init__(self, batches: Tensor, meter: Meter) -> None:
        super().__init__()
        self._batches, self._meter = batches, meter

    def connect(self, tokenizer: object = None, batch_size: int = 1, max_seq_length: int | None = None) -> None:
        """Everything is known."""

    def train_dataloader(self) -> DataLoader:
        """In their order."""
        return DataLoader(Rows(self._batches, self._meter), batch_size=self._batches.shape[2])

    def val_dataloader(self) -> DataLoader:
        """litgpt validates two batches before it starts."""
        return DataLoader(Rows(self._batches, None), batch_size=self._batches.shape[2])


def main() -> None:
    """One record; the last step of the run has no mark."""
    asked = arguments(__doc__)
    asked.steps += 2
    batches, meter = load_batches(asked), Meter()
    rows, length = batches.shape[2:]
    config = litgpt_config(asked.inputs / f"{asked.model}.hf")
    source = asked.inputs / f"{asked.model}.litgpt"
    sys.argv = ["pretrain.py", config.name]  # litgpt reads it again, to write down how it was called
    with tempfile.TemporaryDirectory() as folder:
        setup(
            model_name=config.name,
            model_config=config,
            out_dir=Path(folder),
            precision=PRECISION[asked.dtype],
            initial_checkpoint_dir=source,
            data=Batches(batches, meter),
            train=TrainArgs(
                save_interval=None,
                global_batch_size=rows,
                micro_batch_size=rows,
                max_tokens=(asked.steps - 1) * rows * length,
                max_norm=CLIP_NORM,
                lr_warmup_steps=0,
                min_lr=LR,
                tie_embeddings=False,
            ),
            eval=EvalArgs(interval=1000, max_iters=2, final_validation=False),
            log=LogArgs(),
            optimizer={
                "class_path": "torch.optim.AdamW",
                "init_args": {"lr": LR, "betas": list(BETAS), "weight_decay": WEIGHT_DECAY},
            },
            devices=1,
            logger_name="csv",
        )
        (log,) = Path(folder).rglob("metrics.csv")
        with log.open(encoding="utf-8") as file:
            meter.checks = [float(line["loss"]) for line in csv.DictReader(file) if line["loss"]]
    write_record(meter.record() | {"matmul_gflop_per_cpu_s": matmul_rate(asked.dtype)})


if __name__ == "__main__":
    main()

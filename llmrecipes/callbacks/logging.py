"""One line per logged step for people, one JSON object for programs, and a bar on a terminal."""

from __future__ import annotations

import logging
import math
import sys
from pathlib import Path
from typing import Any

import lightning.pytorch as L
from tqdm import tqdm

from llmrecipes.callbacks.metrics_file import MetricsFile, read_metrics, rewind_metrics
from llmrecipes.callbacks.throughput import Throughput, clock, known_peak, peak_memory

log = logging.getLogger("llmrecipes")


class Logging(L.Callback):
    """Writes ``metrics.jsonl``, the console line and the progress bar, and feeds the Trainer's loggers (wandb, CSV).

    Args:
        every: log each step that is a multiple of this, and the first and the last.
        peak_flops: of one device in FLOP/s, for the MFU; ``null`` = looked up by the GPU's name, unknown on CPUs.
        progress_bar: show a bar when standard error is a terminal.
    """

    def __init__(self, every: int = 10, peak_flops: float | None = None, progress_bar: bool = True) -> None:
        self.every = every
        self.peak_flops = peak_flops
        self.progress_bar = progress_bar
        self.validated_step: int | None = None
        self._bar: tqdm | None = None
        self._file: MetricsFile | None = None
        self._throughput: Throughput | None = None
        self._validated = -1

    def on_train_start(self, trainer: L.Trainer, pl_module: L.LightningModule) -> None:
        step = trainer.global_step
        self._throughput = Throughput()
        if trainer.is_global_zero:
            path = Path(trainer.default_root_dir) / "metrics.jsonl"
            self._validated = max((r["step"] for r in read_metrics(path) if "val_loss" in r), default=-1)
            self._file = MetricsFile(path)
            if self.progress_bar and sys.stderr.isatty():
                self._bar = tqdm(total=trainer.max_steps, initial=step, unit="step", dynamic_ncols=True, leave=False)

    def on_train_batch_start(self, trainer: L.Trainer, pl_module: Any, batch: Any, batch_idx: int) -> None:
        assert self._throughput is not None
        self._throughput.start_step()

    def on_train_batch_end(self, trainer: L.Trainer, pl_module: Any, outputs: Any, batch: Any, batch_idx: int) -> None:
        assert self._throughput is not None
        if not pl_module.passed_over:
            self._throughput.end_step(pl_module.tokens_per_step)
        if self._bar is not None:
            self._bar.update(1)
        if self.is_due(trainer.global_step, trainer):
            pl_module.settle()
            self._log_step(trainer, pl_module)

    def is_due(self, step: int, trainer: L.Trainer) -> bool:
        """Whether the step is one to log."""
        return step % self.every == 0 or step in (1, trainer.max_steps)

    def rewind(self, step: int, then: list[dict[str, Any]], saved: Path | None) -> None:
        """Cut the metrics file back to ``step`` and add records; on the rank that writes it.

        Args:
            then: records to add. saved: a copy of the file as of that step.
        """
        assert self._file is not None
        self._file.close()
        rewind_metrics(self._file.path, step, saved, then)
        self._file = MetricsFile(self._file.path)

    def _log_step(self, trainer: L.Trainer, pl_module: Any) -> None:
        assert self._throughput is not None
        record = pl_module.last_step.as_json()
        if pl_module.passed_over:
            self._write(trainer, record, console_line(record, trainer.max_steps, None))
            return
        rate = self._throughput.rate()
        record["tokens_per_second"] = rate
        peak = self.peak_flops or known_peak(pl_module.device)
        if peak:
            flops = pl_module.flops_per_token(trainer.datamodule.seq_len)  # type: ignore[attr-defined]
            record["mfu"] = rate * flops / (peak * trainer.world_size)
        record["memory_gib"] = peak_memory(pl_module.device)
        left = self._throughput.seconds_left(record["step"], trainer.max_steps)
        self._write(trainer, record, console_line(record, trainer.max_steps, left))

    def on_validation_end(self, trainer: L.Trainer, pl_module: Any) -> None:
        metrics = pl_module.validation_metrics
        if not metrics:
            return
        step = trainer.global_step if self.validated_step is None else self.validated_step
        line = validation_line(step, metrics, pl_module.measured)
        if trainer.state.fn == "fit":
            if trainer.global_step == self._validated:
                return  # a resumed run repeated a validation that was written down before it was killed
            self._write(trainer, {"step": trainer.global_step, **metrics}, line)
        else:
            log.info(line)

    def _write(self, trainer: L.Trainer, record: dict[str, Any], line: str) -> None:
        if self._file is None:
            return
        self._file.append(record)
        log.info(line)
        for logger in trainer.loggers:
            logger.log_metrics(flatten(record), step=record["step"])

    def note(self, trainer: L.Trainer, record: dict[str, Any], line: str) -> None:
        """Write down what another callback measured at a step: to the file, the console and the loggers."""
        self._write(trainer, record, line)

    def teardown(self, trainer: L.Trainer, pl_module: L.LightningModule, stage: str) -> None:
        if self._bar is not None:
            self._bar.close()
            self._bar = None
        if self._file is not None:
            self._file.close()
            self._file = None


def validation_line(step: int, metrics: dict[str, float], measured: tuple[str, ...]) -> str:
    """The one line of a validation: the loss, what the stage measures beside it, and the loss of each set.

    The loss is the log of a perplexity where nothing else is measured; a preference loss is none.
    """
    loss = metrics["val_loss"]
    parts = [f"valid {step:>6}", f"val_loss {loss:.4f}"]
    parts += [
        f"{name.removeprefix('rewards/')} {metrics[f'val_{name}']:.4f}" for name in measured if f"val_{name}" in metrics
    ]
    parts += [] if measured else [f"ppl {math.exp(loss):.2f}"]
    prefix = "val_loss/"
    parts += [f"{name.removeprefix(prefix)} {value:.4f}" for name, value in metrics.items() if name.startswith(prefix)]
    return "  ".join(parts)


def console_line(record: dict[str, Any], max_steps: int, seconds_left: float | None) -> str:
    """The one line a person reads."""
    step = record["step"]
    width = len(str(max_steps))
    parts = [f"step {step:>{width}}/{max_steps} {100 * step / max_steps:5.1f}%"]
    if "skipped" in record:
        return "  ".join([*parts, f"passed over: {record['skipped']}"])
    parts += [
        f"loss {record['loss']:.4f}",
        f"grad {record['grad_norm']:.3f}",
        f"lr {record['lr']:.2e}",
        f"{record['tokens_per_second']:,.0f} tok/s",
    ]
    parts += [f"{name[8:]} {record[name]:.3f}" for name in ("rewards/margins", "rewards/accuracies") if name in record]
    if record.get("refused"):
        parts.append("update left out")
    if "mfu" in record:
        parts.append(f"MFU {100 * record['mfu']:.1f}%")
    parts.append(f"{record['memory_gib']:.2f} GiB")
    if "max_violation" in record:
        dead = sum(load == 0 for layer in record["expert_load"] for load in layer)
        parts.append(
            f"balance {record['aux_loss']:.3f} maxvio {max(record['max_violation']):.2f}"
            + (f" dead {dead}" if dead else "")
        )
    if "dropped_fraction" in record:
        parts.append(f"dropped {100 * max(record['dropped_fraction']):.1f}%")
    if seconds_left is not None:
        parts.append(f"ETA {clock(seconds_left)}")
    return "  ".join(parts)


def flatten(record: dict[str, Any]) -> dict[str, float]:
    """Numbers only, lists per layer (and expert) spread to ``name/layer`` (``/expert``), for loggers."""
    flat: dict[str, float] = {}
    for name, value in record.items():
        if isinstance(value, list):
            for i, item in enumerate(value):
                flat |= flatten({f"{name}/{i}": item})
        elif isinstance(value, (int, float)):
            flat[name] = value
    return flat

"""Evaluation while a model trains: a callback for ``trainer.callbacks`` of a recipe."""

from __future__ import annotations

import io
import json
import logging
import shutil
import tempfile
from contextlib import redirect_stderr, redirect_stdout
from pathlib import Path
from typing import Any

import lightning.pytorch as L

from data_prep.frame.config import read_config
from llmrecipes.callbacks.graceful_stop import GracefulStop
from llmrecipes.callbacks.logging import Logging
from llmrecipes.callbacks.media import show_table
from llmrecipes.errors import UserError
from llmrecipes.evaluate.config import EvaluateConfig
from llmrecipes.evaluate.run import check_tasks, measure
from llmrecipes.evaluate.store import ANSWERS, SUMMARY, at_step, write_json
from llmrecipes.inference.codec import PlainCodec
from llmrecipes.inference.opened import Opened

log = logging.getLogger("llmrecipes")
SHOWN = 50  # answers of a task in the tables of a logger


class EvaluateWhileTraining(L.Callback):
    """Measures the model every so often and at the end, into ``evaluation/RECIPE@STEP`` of the run folder.

    Training is bit-identical with and without it. It comes after the checkpoint of the step, and what goes wrong in it
    is a warning. Each task's figure goes to ``metrics.jsonl`` and the loggers as ``eval/TASK``.

    Args:
        recipe: of an evaluation; its ``model``, ``output``, ``dtype`` and ``device`` have no effect here.
        every: distance in optimizer steps.
    """

    def __init__(self, recipe: str, every: int) -> None:
        self.recipe = recipe
        self.every = every
        self.name = Path(recipe).stem
        self._due: int | None = None

    def on_fit_start(self, trainer: L.Trainer, pl_module: Any) -> None:
        """Mistakes before the first step."""
        if self.every < 1:
            raise UserError(f"EvaluateWhileTraining: every: {self.every}: must be 1 or more")
        self.config = read_config(EvaluateConfig, ["--config", self.recipe], files=False)
        missing = [f"{self.recipe}: {what} - {hint}" for _, what, hint in self.config.missing_of_tasks()]
        if missing:
            raise UserError(*missing)
        _ = trainer.datamodule.tokenizer  # type: ignore[attr-defined]
        judged = [task.title for task in self.config.tasks if task.kind == "mt_bench"]
        if judged and trainer.world_size > 1:
            raise UserError(
                f"EvaluateWhileTraining: {', '.join(judged)}: every process would ask the judge; measure checkpoints "
                "beside the training instead: llmrecipes evaluate --checkpoints each"
            )
        check_tasks(self.config)

    def on_train_start(self, trainer: L.Trainer, pl_module: Any) -> None:
        """A run that was killed between a checkpoint and its evaluation makes up for it."""
        step = trainer.global_step
        if step and step % self.every == 0 and not trainer.strategy.broadcast(self._is_done(trainer, step)):
            self._due = step

    def on_train_batch_end(self, trainer: L.Trainer, pl_module: Any, outputs: Any, batch: Any, batch_idx: int) -> None:
        """Due now, measured at the beginning of the next step: the checkpoint and the validation come first."""
        if trainer.global_step % self.every == 0:
            self._due = trainer.global_step

    def on_train_batch_start(self, trainer: L.Trainer, pl_module: Any, batch: Any, batch_idx: int) -> None:
        """See above."""
        self._measure_if_due(trainer, pl_module)

    def on_fit_end(self, trainer: L.Trainer, pl_module: Any) -> None:
        """The last step counts, wherever it falls; after the last checkpoint. A run that was told to stop has no time:
        what is due is measured when it goes on."""
        if any(isinstance(one, GracefulStop) and one.stopped for one in trainer.callbacks):  # type: ignore[attr-defined]
            return
        if not trainer.strategy.broadcast(self._is_done(trainer, trainer.global_step)):
            self._due = trainer.global_step
        self._measure_if_due(trainer, pl_module)

    def _folder(self, trainer: L.Trainer, step: int) -> Path:
        return at_step(Path(trainer.default_root_dir) / "evaluation" / self.name, f"{step:06d}")

    def _is_done(self, trainer: L.Trainer, step: int) -> bool:
        return (self._folder(trainer, step) / SUMMARY).exists()

    def _measure_if_due(self, trainer: L.Trainer, pl_module: Any) -> None:
        step, self._due = self._due, None
        if step is None:
            return
        # All ranks compute the same, because each holds a part of the parameters; one keeps it.
        with tempfile.TemporaryDirectory(prefix="llmrecipes-evaluate-") as elsewhere:
            folder = self._folder(trainer, step) if trainer.is_global_zero else Path(elsewhere)
            try:
                self._measure(trainer, pl_module, step, folder)
            except Exception as error:
                log.warning(f"step {step}: no evaluation, {type(error).__name__}: {error}")

    def _measure(self, trainer: L.Trainer, pl_module: Any, step: int, folder: Path) -> None:
        shutil.rmtree(folder, ignore_errors=True)  # of an evaluation that was killed
        folder.mkdir(parents=True, exist_ok=True)
        was_training = pl_module.model.training
        pl_module.model.eval()
        opened = opened_of(trainer, pl_module, self.config.template)
        watchdog = getattr(trainer.strategy, "watchdog", None)
        hook = pl_module.model.register_forward_hook(lambda *_: watchdog and watchdog.tick())
        nowhere = io.StringIO()  # the figures come as one line of the log
        try:
            with trainer.precision_plugin.forward_context(), redirect_stdout(nowhere), redirect_stderr(nowhere):
                summary = measure(self.config, folder, lambda: opened, f"step {step}", f"{self.name} while training")
        finally:
            hook.remove()
            pl_module.model.train(was_training)
            pl_module.reshard()
        if trainer.is_global_zero:
            write_json(folder / SUMMARY, summary | {"model": str(trainer.default_root_dir), "while_training": True})
            self._tell(trainer, step, folder, summary)

    def _tell(self, trainer: L.Trainer, step: int, folder: Path, summary: dict[str, Any]) -> None:
        found = {task["task"]: task["figures"][task["metric"]]["value"] for task in summary["tasks"]}
        figures = {f"eval/{name}": value for name, value in found.items() if value is not None}
        line = "  ".join(f"{name} {value:.4f}" for name, value in found.items() if value is not None)
        loggers = [one for one in trainer.callbacks if isinstance(one, Logging)]  # type: ignore[attr-defined]
        loggers[0].note(trainer, {"step": step, **figures}, f"eval  {step:>6}  {line}")
        for task in found:
            path = folder / task / ANSWERS
            rows = path.read_text(encoding="utf-8").splitlines()[:SHOWN] if path.exists() else []
            show_table(trainer.loggers, f"eval/{task}/answers", [_row(json.loads(row)) for row in rows], step)


def _row(row: dict[str, Any]) -> dict[str, Any]:
    score = next(iter(row["scores"].values()))
    return {"question": row["question"], "reference": row["reference"], "answer": row["answer"], "score": score}


def opened_of(trainer: L.Trainer, pl_module: Any, template: str | None) -> Opened:
    """The model in training, as what evaluation asks."""
    data: Any = trainer.datamodule  # type: ignore[attr-defined]
    config = pl_module.config
    codec = PlainCodec(data.tokenizer.folder, template or getattr(data, "template_name", None))
    hard = config.longest_text
    limit = hard or config.max_seq_len or data.seq_len
    size = min(config.vocab_size, codec.vocab_size)
    return Opened(str(trainer.default_root_dir), pl_module.model, codec, size, limit, hard is not None)

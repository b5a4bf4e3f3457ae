"""Text written by the model while it learns: the quickest way to see that something is wrong."""

from __future__ import annotations

import logging
from pathlib import Path
from typing import Any

import lightning.pytorch as L
import torch

from llmrecipes.callbacks.media import show_table
from llmrecipes.models import generate

log = logging.getLogger("llmrecipes")


class Samples(L.Callback):
    """Continues a few prompts every so often and at the end, into ``samples/step=NNNNNN.txt``.

    Has its own random generator: training is bit-identical with and without it. Needs the data's tokenizer folder.

    Args:
        every: distance in optimizer steps; ``null`` = never.
        prompts: texts to continue.
        max_new_tokens: length of a continuation; it ends earlier at the end of the document.
        temperature: 0 takes the likeliest token.
        top_k: choose among the k likeliest; ``null`` = all.
    """

    def __init__(
        self,
        every: int | None = None,
        prompts: list[str] | None = None,
        max_new_tokens: int = 48,
        temperature: float = 0.7,
        top_k: int | None = 50,
    ) -> None:
        self.every = every
        self.prompts = prompts or ["日本の", "The "]
        self.max_new_tokens = max_new_tokens
        self.temperature = temperature
        self.top_k = top_k
        self._due: int | None = None

    def on_fit_start(self, trainer: L.Trainer, pl_module: Any) -> None:
        if self.every:
            # Raises when the recipe names none: before the first step, not at the first sample.
            _ = trainer.datamodule.tokenizer  # type: ignore[attr-defined]

    def on_train_batch_end(self, trainer: L.Trainer, pl_module: Any, outputs: Any, batch: Any, batch_idx: int) -> None:
        if self.every and trainer.global_step % self.every == 0:
            self._due = trainer.global_step

    def on_train_batch_start(self, trainer: L.Trainer, pl_module: Any, batch: Any, batch_idx: int) -> None:
        # At the next step's start, so that the checkpoint and the evaluation of the boundary come first.
        self._write_if_due(trainer, pl_module)

    def on_train_end(self, trainer: L.Trainer, pl_module: Any) -> None:
        if self.every:
            self._due = trainer.global_step
        self._write_if_due(trainer, pl_module)

    def _write_if_due(self, trainer: L.Trainer, pl_module: Any) -> None:
        step, self._due = self._due, None
        if step is None:
            return
        data: Any = trainer.datamodule  # type: ignore[attr-defined]
        # All ranks write the same texts, because each holds a part of the parameters; one keeps them.
        try:
            with trainer.precision_plugin.forward_context():
                texts = [
                    self._continue(pl_module, data.tokenizer, data.eos_id, prompt, index)
                    for index, prompt in enumerate(self.prompts)
                ]
        except Exception as error:
            log.warning(f"step {step}: no samples, {type(error).__name__}: {error}")
            return
        finally:
            pl_module.reshard()
        if not trainer.is_global_zero:
            return
        path = Path(trainer.default_root_dir) / "samples" / f"step={step:06d}.txt"
        path.parent.mkdir(parents=True, exist_ok=True)
        path.write_text("\n\n".join(texts) + "\n", encoding="utf-8")
        rows = [dict(zip(("prompt", "text"), text.split("│", 1), strict=True)) for text in texts]
        show_table(trainer.loggers, "samples", rows, step)
        log.info(f"sample {step:>5}  " + texts[step // max(1, self.every or 1) % len(texts)].replace("\n", "⏎")[:100])

    def _continue(self, pl_module: Any, tokenizer: Any, eos_id: int, prompt: str, index: int) -> str:
        generator = torch.Generator(device=pl_module.device).manual_seed(index)
        written = generate(
            pl_module.model,
            tokenizer.encode(prompt),
            self.max_new_tokens,
            temperature=self.temperature,
            top_k=self.top_k,
            generator=generator,
            eos_id=eos_id,
            device=pl_module.device,
        )
        return f"{prompt}│{tokenizer.decode(written)}"

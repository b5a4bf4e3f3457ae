"""Supervised fine-tuning: the pretraining step on conversations, with noise on the embeddings if wanted."""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor, nn

from llmrecipes.data.batch import Batch
from llmrecipes.models import DecoderOutput, ModelConfig
from llmrecipes.modules.pretrain import PretrainModule
from llmrecipes.optim import AdamW, Schedule


class SFTModule(PretrainModule):
    """Fine-tunes a decoder on conversations (`llmrecipes.data.ChatExamples`).

    Args:
        config: the decoder's sizes.
        optimizer: how parameters are updated.
        schedule: the learning rate over the run.
        init_from: folder or checkpoint whose weights the run begins with.
        neftune_alpha: uniform noise in [-a, a] on the embeddings while training, a = ``neftune_alpha`` /
            sqrt(conversation's tokens x dim) (NEFTune, 2310.05914); 0 = none.
        clip_norm: largest global gradient norm; ``null`` measures without clipping.
        expected_params: refuse to start when the model has another number of parameters.
        loss_chunk: rows of the logits that exist at a time.
        compile: fuse what lies between the matrix products of each block (torch.compile).
        trainable, frozen: what is trained and what is not, as in `PretrainModule`: ``frozen: [experts]``.
        seed: of dropout and noise; linked to the recipe's ``seed``.
    """

    def __init__(
        self,
        config: ModelConfig,
        optimizer: AdamW,
        schedule: Schedule,
        init_from: str,
        neftune_alpha: float = 0.0,
        clip_norm: float | None = 1.0,
        expected_params: int | None = None,
        loss_chunk: int = 1024,
        compile: bool = False,
        seed: int = 0,
        trainable: list[str] | None = None,
        frozen: list[str] | None = None,
    ) -> None:
        super().__init__(
            config,
            optimizer,
            schedule,
            clip_norm,
            expected_params,
            loss_chunk,
            init_from,
            compile,
            seed,
            trainable,
            frozen,
        )
        self.neftune_alpha = neftune_alpha
        self._noise_width: Tensor | None = None

    def configure_model(self) -> None:
        fresh = not hasattr(self, "model")
        super().configure_model()
        if fresh and self.neftune_alpha:
            self.model.embed.register_forward_hook(self._add_noise)

    def _add_noise(self, module: nn.Module, args: Any, embedded: Tensor) -> Tensor:
        width = self._noise_width
        if width is None:
            return embedded
        return embedded + torch.empty_like(embedded).uniform_(-1, 1) * width.to(embedded.dtype)[..., None]

    def _forward(self, batch: Batch) -> DecoderOutput:
        if not (self.neftune_alpha and self.training):
            return super()._forward(batch)
        self._noise_width = noise_width(batch, self.neftune_alpha, self.config.dim).to(batch.tokens.device)
        try:
            return super()._forward(batch)
        finally:
            self._noise_width = None


def noise_width(batch: Batch, alpha: float, dim: int) -> Tensor:
    """Half the range of NEFTune's noise at each position, [B, T], fp32."""
    rows, length = batch.tokens.shape
    documents = batch.document_lengths or [[length]] * rows
    sizes = torch.tensor([n for row in documents for n in row])
    return (alpha / (sizes * dim).sqrt()).repeat_interleave(sizes).view(rows, length)

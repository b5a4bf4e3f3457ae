"""Parameters of a model, part by part, counted on the meta device."""

from __future__ import annotations

from dataclasses import dataclass

import torch

from llmrecipes.models import Decoder
from llmrecipes.models.moe import Experts
from llmrecipes.modules.trainable import set_trainable
from llmrecipes.recipe import ModelConfig


@dataclass(frozen=True)
class Trained:
    """Which parameters have a gradient: the recipe's ``trainable`` and ``frozen``."""

    trainable: tuple[str, ...] = ("all",)
    frozen: tuple[str, ...] = ()

    def apply(self, model: Decoder) -> None:
        """Leave a gradient to those alone."""
        if self != ALL:
            set_trainable(model, list(self.trainable), list(self.frozen))


ALL = Trained()


@dataclass(frozen=True)
class Sizes:
    """Numbers of parameters.

    Attributes:
        blocks: of each block. block_experts: of these, in its experts. rest: embedding, last norm, head.
        trainable: of all, those with a gradient.
    """

    blocks: list[int]
    block_experts: list[int]
    rest: int
    trainable: int

    @property
    def total(self) -> int:
        """All of them."""
        return sum(self.blocks) + self.rest

    @property
    def experts(self) -> int:
        """Those that expert parallelism divides."""
        return sum(self.block_experts)


def model_sizes(config: ModelConfig, trained: Trained = ALL) -> Sizes:
    """Build the model without storage and count; a tied embedding counts once."""
    with torch.device("meta"):
        model = Decoder(config)
    trained.apply(model)
    blocks = [sum(p.numel() for p in block.parameters()) for block in model.layers]
    experts = [
        sum(p.numel() for module in block.modules() if isinstance(module, Experts) for p in module.parameters())
        for block in model.layers
    ]
    everything = list(model.parameters())
    total = sum(p.numel() for p in everything)
    return Sizes(blocks, experts, total - sum(blocks), sum(p.numel() for p in everything if p.requires_grad))

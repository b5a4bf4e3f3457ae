"""A model whose loss goes wrong at chosen steps, whatever its state: bad data."""

from __future__ import annotations

from llmrecipes.models import ModelConfig
from llmrecipes.modules import PretrainModule
from llmrecipes.optim import AdamW, Schedule


class Poisoned(PretrainModule):
    """Multiplies the loss of ``steps`` (from 1) by ``factor``.

    Args:
        late: figures arrive when the next step is under way, as on a GPU.
    """

    def __init__(
        self,
        config: ModelConfig,
        optimizer: AdamW,
        schedule: Schedule,
        clip_norm: float | None = 1.0,
        seed: int = 0,
        steps: list[int] | None = None,
        factor: float = 8.0,
        late: bool = False,
    ) -> None:
        super().__init__(config, optimizer, schedule, clip_norm, seed=seed)
        self.poisoned_steps = steps or []
        self.factor = factor
        self.late = late

    @property
    def settles_at_once(self):
        return not self.late

    def loss_terms(self, batch):
        terms = super().loss_terms(batch)
        if self.training and self.trainer.global_step + 1 in self.poisoned_steps:
            terms["loss"] = terms["loss"]._replace(sum=terms["loss"].sum * self.factor)
        return terms

"""What one optimizer step leaves behind for whoever wants to log it."""

from __future__ import annotations

from dataclasses import dataclass, field
from typing import Any

from torch import Tensor

from llmrecipes.data.batch import Batch


@dataclass
class StepRecord:
    """Tensors stay on the device until somebody asks: steps that are not logged cost no synchronisation.

    Args:
        step: optimizer steps done, this one included.
        tokens: token slots consumed, this step included.
        losses: mean of every loss term over the step, unweighted.
        grad_norm: global norm before clipping.
        lr: the learning rate used.
        batch: this rank's share, for its digest.
        extra: the stage's own figures, such as expert loads per layer.
    """

    step: int
    tokens: int
    losses: dict[str, Tensor]
    grad_norm: Tensor
    lr: float
    batch: Batch
    extra: dict[str, Any] = field(default_factory=dict)

    def as_json(self) -> dict[str, Any]:
        """Plain values at full precision."""
        record: dict[str, Any] = {"step": self.step, "tokens": self.tokens}
        record |= {name: float(value) for name, value in self.losses.items()}
        record |= {"grad_norm": float(self.grad_norm), "lr": self.lr, "batch": self.batch.digest()}
        return record | {
            name: value.tolist() if isinstance(value, Tensor) else value for name, value in self.extra.items()
        }

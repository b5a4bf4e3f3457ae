"""What one optimizer step leaves behind for whoever wants to log it."""

from __future__ import annotations

from dataclasses import dataclass, field
from typing import Any

import torch
from torch import Tensor

from llmrecipes.data.batch import Batch
from llmrecipes.distributed import all_reduce_sum


@dataclass
class StepRecord:
    """Figures of the whole step, over all ranks. Tensors stay on the device until somebody asks.

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
        """Plain values at full precision. All ranks call it together: the digest is of all their shares."""
        record: dict[str, Any] = {"step": self.step, "tokens": self.tokens}
        record |= {name: float(value) for name, value in self.losses.items()}
        record |= {"grad_norm": float(self.grad_norm), "lr": self.lr, "batch": self.digest()}
        return record | {name: _plain(value) for name, value in self.extra.items()}

    def digest(self) -> str:
        """Eight hex digits that tell two global batches apart, however many ranks share them."""
        total = torch.tensor(self.batch.digest(), dtype=torch.int64, device=self.grad_norm.device)
        return f"{int(all_reduce_sum(total)) % 2**32:08x}"


def _plain(value: Any) -> Any:
    """A tensor, or one per layer, as numbers."""
    if isinstance(value, list):
        return [_plain(item) for item in value]
    return value.tolist() if isinstance(value, Tensor) else value


@dataclass
class SkippedStep:
    """A step whose data was passed over: no gradient, no update.

    Args:
        step, tokens: as in `StepRecord`; its tokens count as consumed.
        reason: why.
    """

    step: int
    tokens: int
    reason: str

    def as_json(self) -> dict[str, Any]:
        """Plain values."""
        return {"step": self.step, "tokens": self.tokens, "skipped": self.reason}

"""Routing of one whole optimizer step, over its micro-batches."""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor

from llmrecipes.losses import load_entropy, max_violation
from llmrecipes.models import Routing


class StepRouting:
    """Counts of the step so far and, when a counting pass was made, of the whole step.

    Args:
        tokens: real tokens of the whole step.
    """

    def __init__(self, tokens: int) -> None:
        self.tokens = tokens
        self.known: Tensor | None = None
        self._counts: Tensor | None = None
        self._entropy: Tensor | None = None
        self._seen: Tensor | int = 0

    def add(self, routing: list[Routing]) -> None:
        """Take in one micro-batch, one entry per MoE layer."""
        counts = torch.stack([r.counts for r in routing])
        entropy = torch.stack([r.entropy_sum for r in routing])
        self._counts = counts if self._counts is None else self._counts + counts
        self._entropy = entropy if self._entropy is None else self._entropy + entropy
        self._seen += routing[0].num_tokens

    @property
    def counts(self) -> Tensor:
        """Tokens per expert so far, [layers, E]."""
        assert self._counts is not None
        return self._counts

    @property
    def counts_for_loss(self) -> Tensor:
        """The f of the balance loss comes from these: the whole step's when known, else what the step has seen."""
        return self.counts if self.known is None else self.known

    @property
    def tokens_for_loss(self) -> Tensor | int:
        return self._seen if self.known is None else self.tokens

    def figures(self, top_k: int) -> dict[str, Any]:
        """What is logged of each layer.

        The load of each expert (1/E at balance) and its worst excess; the entropy of the load (1 at balance) and of
        a token's probabilities (nats).
        """
        assert self._entropy is not None
        seen = torch.as_tensor(self._seen).clamp_min(1)
        load = self.counts / (top_k * seen)
        return {
            "expert_load": load,
            "max_violation": max_violation(self.counts),
            "load_entropy": load_entropy(self.counts),
            "router_entropy": self._entropy / seen,
        }

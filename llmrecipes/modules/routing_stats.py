"""Routing of one whole optimizer step, over its micro-batches."""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor

from llmrecipes.losses import balance_loss, load_entropy, max_violation
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
        self._prob_sum: Tensor | None = None
        self._entropy: Tensor | None = None
        self._seen: Tensor | int = 0

    def add(self, routing: list[Routing]) -> None:
        """Take in one micro-batch, one entry per MoE layer."""
        counts = torch.stack([r.counts for r in routing])
        entropy = torch.stack([r.entropy_sum for r in routing])
        prob_sum = torch.stack([r.prob_sum.detach() for r in routing])
        self._prob_sum = prob_sum if self._prob_sum is None else self._prob_sum + prob_sum
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
        """What is logged of the routing, by layer unless said otherwise.

        The balance loss over the whole step, mean over layers (1.0 at balance, logged even when it is not trained on);
        the load of each expert (1/E at balance) and its worst excess; the entropy of the load (1 at balance) and of
        a token's probabilities (nats).
        """
        assert self._entropy is not None
        assert self._prob_sum is not None
        balance = [balance_loss(p, c, self._seen, top_k) for p, c in zip(self._prob_sum, self.counts, strict=True)]
        seen = torch.as_tensor(self._seen).clamp_min(1)
        load = self.counts / (top_k * seen)
        return {
            "aux_loss": torch.stack(balance).mean(),
            "expert_load": load,
            "max_violation": max_violation(self.counts),
            "load_entropy": load_entropy(self.counts),
            "router_entropy": self._entropy / seen,
        }

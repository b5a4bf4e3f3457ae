"""Routing of one whole optimizer step, over its micro-batches and ranks."""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor

from llmrecipes.distributed import all_reduce_sum, num_ranks
from llmrecipes.losses import balance_loss, load_entropy, max_violation
from llmrecipes.models import Routing


class StepRouting:
    """This rank's sums over the step so far and, when a counting pass was made, the counts of the whole step.

    Args:
        tokens: real tokens of the whole step, over all ranks.
    """

    def __init__(self, tokens: Tensor) -> None:
        self.tokens = tokens
        self.known: Tensor | None = None
        self._sums: dict[str, Tensor] = {}

    def add(self, routing: list[Routing]) -> None:
        """Take in one micro-batch, one entry per MoE layer."""
        new = {
            "counts": torch.stack([r.counts for r in routing]),
            "prob_sum": torch.stack([r.prob_sum.detach() for r in routing]),
            "entropy": torch.stack([r.entropy_sum for r in routing]),
            "seen": routing[0].num_tokens,
        }
        self._sums = {name: self._sums[name] + value if self._sums else value for name, value in new.items()}

    def counts_for_loss(self) -> tuple[Tensor, Tensor]:
        """The counts [layers, E] that the balance loss takes its f from, and the tokens they were counted over.

        The whole step's when they are known, else what all ranks have seen of it so far.
        """
        if self.known is not None:
            return self.known, self.tokens
        counts, seen = self._sums["counts"], self._sums["seen"]
        if num_ranks() == 1:
            return counts, seen
        both = all_reduce_sum(torch.cat([counts.reshape(-1), seen.reshape(1)]))
        return both[:-1].view_as(counts), both[-1]

    def sums(self) -> dict[str, Tensor]:
        """This rank's ``counts`` [layers, E], ``prob_sum`` [layers, E], ``entropy`` [layers] and ``seen`` tokens."""
        return self._sums


def routing_figures(sums: dict[str, Tensor], top_k: int) -> dict[str, Any]:
    """What is logged of the routing, by layer unless said otherwise.

    The balance loss over the whole step, mean over layers (1.0 at balance, logged even when it is not trained on);
    the load of each expert (1/E at balance) and its worst excess; the entropy of the load (1 at balance) and of
    a token's probabilities (nats).

    Args:
        sums: those of `StepRouting`, over all ranks.
        top_k: experts per token.
    """
    counts, seen = sums["counts"], sums["seen"].clamp_min(1)
    balance = [balance_loss(p, c, seen, top_k) for p, c in zip(sums["prob_sum"], counts, strict=True)]
    return {
        "aux_loss": torch.stack(balance).mean(),
        "expert_load": counts / (top_k * seen),
        "max_violation": max_violation(counts),
        "load_entropy": load_entropy(counts),
        "router_entropy": sums["entropy"] / seen,
    }

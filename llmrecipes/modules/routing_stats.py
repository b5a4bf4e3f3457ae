"""Routing of one whole optimizer step, over its micro-batches and ranks."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

import torch
from torch import Tensor

from llmrecipes.distributed import all_reduce_sum, num_ranks
from llmrecipes.losses import balance_loss, load_entropy, max_violation
from llmrecipes.models import MoEConfig, Routing


class StepRouting:
    """This rank's sums over the step so far and, when a counting pass was made, the counts of the whole step.

    Layers may have different numbers of experts: what is counted per expert stands in one row, layer after layer.

    Args:
        tokens: real tokens of the whole step, over all ranks.
        layer_experts: experts of each MoE layer.
    """

    def __init__(self, tokens: Tensor, layer_experts: Sequence[int]) -> None:
        self.tokens = tokens
        self.layer_experts = list(layer_experts)
        self.known: Tensor | None = None
        self._sums: dict[str, Tensor] = {}

    def add(self, routing: list[Routing]) -> None:
        """Take in one micro-batch, one entry per MoE layer."""
        new = {
            "counts": expert_counts(routing),
            "prob_sum": torch.cat([r.prob_sum.detach() for r in routing]),
            "entropy": torch.stack([r.entropy_sum for r in routing]),
            "dropped": torch.stack([r.dropped for r in routing]),
            "seen": routing[0].num_tokens,
        }
        self._sums = {name: self._sums[name] + value if self._sums else value for name, value in new.items()}

    def counts_for_loss(self) -> tuple[list[Tensor], Tensor]:
        """Each layer's counts [E] that the balance loss takes its f from, and the tokens they were counted over.

        The whole step's when they are known, else what all ranks have seen of it so far.
        """
        if self.known is not None:
            return self.by_layer(self.known), self.tokens
        counts, seen = self._sums["counts"], self._sums["seen"]
        if num_ranks() == 1:
            return self.by_layer(counts), seen
        both = all_reduce_sum(torch.cat([counts, seen.reshape(1)]))
        return self.by_layer(both[:-1]), both[-1]

    def by_layer(self, values: Tensor) -> list[Tensor]:
        """``values`` per expert, cut into those of each layer, [E] each."""
        return list(values.split(self.layer_experts))

    def sums(self) -> dict[str, Tensor]:
        """This rank's ``counts`` and ``prob_sum`` [experts of all layers], ``entropy`` and ``dropped`` [layers],
        and ``seen`` tokens."""
        return self._sums


def expert_counts(routing: list[Routing]) -> Tensor:
    """Token-expert pairs of every expert, [experts of all layers]."""
    return torch.cat([r.counts for r in routing])


def routing_figures(sums: dict[str, Tensor], layer_experts: Sequence[int], moe: MoEConfig) -> dict[str, Any]:
    """What is logged of the routing, by layer unless said otherwise.

    The balance loss over the whole step, mean over layers (1.0 at balance, logged even when it is not trained on);
    the load of each expert (1/E at balance) and its worst excess; the entropy of the load (1 at balance) and of
    a token's probabilities (nats); with a capacity, the fraction of pairs that their expert had no room for.

    Args:
        sums: those of `StepRouting`, over all ranks.
        layer_experts: experts of each MoE layer. moe: how they are chosen.
    """
    seen = sums["seen"].clamp_min(1)
    counts, probs = (sums[name].split(list(layer_experts)) for name in ("counts", "prob_sum"))
    balance = [balance_loss(p, c, seen, moe.top_k) for p, c in zip(probs, counts, strict=True)]
    figures = {
        "aux_loss": torch.stack(balance).mean(),
        "expert_load": [c / (moe.top_k * seen) for c in counts],
        "max_violation": torch.stack([max_violation(c) for c in counts]),
        "load_entropy": torch.stack([load_entropy(c) for c in counts]),
        "router_entropy": sums["entropy"] / seen,
    }
    if moe.capacity_factor is not None:
        figures["dropped_fraction"] = sums["dropped"] / (moe.top_k * seen)
    return figures

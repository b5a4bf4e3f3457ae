"""Low-rank adapters on linear maps, one or many: sizes and options. Torch-free."""

from __future__ import annotations

import math
import re
from dataclasses import dataclass
from typing import Literal

Balance = Literal["loss", "bias", "none"]
# The feed-forward network only: with attention left alone, experts merge without averaging anything.
FEED_FORWARD = r".*\.(gate|up|down)_proj"


@dataclass(frozen=True, kw_only=True)
class LoraExperts:
    """Several adapters per linear map, of which a router chooses k for each token.

    Args:
        num_experts: adapters of each map, N.
        top_k: how many a token gets; their weights are the softmax over the chosen logits and sum to one.
        null_expert: one more choice that adds nothing: the model that the adapters were trained on.
        router: ``per_linear``: each map has a router of its own, on its own input; ``per_mlp``: one router for gate, up
            and down, which computes what a mixture of whole feed-forward networks does and folds into one.
        balance, balance_coef, balance_counts, bias_rate, z_loss_coef: as in ``moe``; none by default.
    """

    num_experts: int
    top_k: int = 2
    null_expert: bool = True
    router: Literal["per_linear", "per_mlp"] = "per_linear"
    balance: Balance = "none"
    balance_coef: float = 0.01
    balance_counts: Literal["step", "running"] = "step"
    bias_rate: float = 1e-3
    z_loss_coef: float = 0.0

    @property
    def num_choices(self) -> int:
        """Outputs of a router."""
        return self.num_experts + self.null_expert


@dataclass(frozen=True, kw_only=True)
class LoraConfig:
    """Low-rank updates ``W x + scale * B A drop(x)`` (2106.09685), as PEFT computes them.

    Args:
        rank: rows of A, columns of B. alpha: scale = alpha / rank.
        dropout: on the input of A.
        targets: regular expression for the whole name of a map, ``model.layers.0.mlp.gate_proj`` as transformers names
            it; there are q_proj, k_proj, v_proj and o_proj of ``self_attn``, gate_proj, up_proj and down_proj of
            ``mlp``.
        rank_stabilized: scale = alpha / sqrt(rank) (2312.03732).
        experts: several adapters and routers between them; ``null`` = one adapter, always on.
    """

    rank: int
    alpha: float
    dropout: float = 0.0
    targets: str = FEED_FORWARD
    rank_stabilized: bool = False
    experts: LoraExperts | None = None

    @property
    def scale(self) -> float:
        """What B A x is multiplied by."""
        return self.alpha / (math.sqrt(self.rank) if self.rank_stabilized else self.rank)

    @property
    def stacks(self) -> int:
        """Adapters of each map."""
        return 1 if self.experts is None else self.experts.num_experts

    @property
    def active_stacks(self) -> int:
        """Adapters of each map that a token passes through at most."""
        return 1 if self.experts is None else min(self.experts.top_k, self.experts.num_experts)

    @property
    def routes_linears(self) -> bool:
        """Whether each adapted map has a router of its own."""
        return self.experts is not None and self.experts.router == "per_linear"

    @property
    def routes_mlps(self) -> bool:
        """Whether each feed-forward network has one router."""
        return self.experts is not None and self.experts.router == "per_mlp"

    def problems(self) -> list[str]:
        """What is wrong, as sentences that begin with the field; empty when all is well."""
        found = []
        if self.rank < 1:
            found.append(f"lora.rank {self.rank} is less than 1")
        if not 0 <= self.dropout < 1:
            found.append(f"lora.dropout {self.dropout} is not in [0, 1)")
        try:
            re.compile(self.targets)
        except re.error as error:
            found.append(f"lora.targets {self.targets} is no regular expression: {error}")
        experts = self.experts
        if experts is not None:
            if experts.num_experts < 1:
                found.append(f"lora.experts.num_experts {experts.num_experts} is less than 1")
            if not 1 <= experts.top_k <= experts.num_choices:
                found.append(
                    f"lora.experts.top_k {experts.top_k} is not between 1 and {experts.num_choices}, "
                    "the adapters and the null expert"
                )
        return found

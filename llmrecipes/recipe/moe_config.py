"""The typed description of a layer with experts. Torch-free."""

from __future__ import annotations

import math
from dataclasses import dataclass
from typing import Literal

from llmrecipes.recipe.lora_config import Balance

Score = Literal["softmax", "sigmoid"]
DropPolicy = Literal["position", "probs", "random"]


@dataclass(frozen=True, kw_only=True)
class MoEConfig:
    """A mixture of experts in place of the feed-forward network.

    Args:
        num_experts: experts per layer, E; ``null`` where ``experts_per_layer`` says it.
        experts_per_layer: E of each layer with experts, first to last: a pyramid has more of them above (PR-MoE,
            2201.05596).
        top_k: experts each token is sent to, k.
        ffn_dim: hidden width of one expert.
        score: router scores by softmax over all experts (Mixtral) or by sigmoid (DeepSeek-V3).
        renormalize: make the k chosen weights sum to one.
        routed_scaling_factor: what the sum of the chosen experts is multiplied by (DeepSeek-V3, 2412.19437).
        balance: ``loss`` adds ``balance_coef * E * sum_e f_e P_e`` per layer (mean over layers; 1.0 at balance);
            ``bias`` moves a per-expert bias that only the choice of experts sees (2408.15664); ``none``.
        balance_coef: weight of the balance loss.
        balance_counts: where f comes from when a step has several micro-batches: ``step`` counts the whole step first
            (one more forward without gradient, exact for any micro-batch), ``running`` uses what it has routed so far.
        bias_rate: step of the bias update, gamma.
        z_loss_coef: weight of mean(logsumexp(router logits)^2) (ST-MoE, 2202.08906).
        residual: a dense network of the model's ``ffn_dim`` stands beside the experts (PR-MoE):
            ``c_0 experts(x) + c_1 dense(x)`` with ``c = softmax(W x + b)``, two numbers per token.
        shared_ffn_dim: width of a network that every token uses beside its experts (Qwen2-MoE):
            ``experts(x) + sigmoid(w x) shared(x)``; ``null`` = there is none.
        capacity_factor: an expert takes at most ``ceil(capacity_factor * k * tokens / E)`` of a micro-batch's tokens
            in training; to the others it gives nothing. ``null`` = it takes all that come.
        eval_capacity_factor: the same outside of training; ``null`` = nothing is dropped there.
        min_capacity: an expert takes at least so many, however small the micro-batch; ``null`` = 4.
        drop_policy: who is taken first: tokens by their ``position`` (first choices before second ones), those with
            the highest router ``probs``, or a ``random`` order (DeepSpeed's random token selection); ``null`` = that.
        router: one router ``per_mlp``, or ``per_linear``: gate, up and down choose their experts each by itself.
    """

    num_experts: int | None = None
    ffn_dim: int
    experts_per_layer: list[int] | None = None
    top_k: int = 2
    score: Score = "softmax"
    renormalize: bool = True
    routed_scaling_factor: float = 1.0
    balance: Balance = "loss"
    balance_coef: float = 0.01
    balance_counts: Literal["step", "running"] = "step"
    bias_rate: float = 1e-3
    z_loss_coef: float = 0.0
    residual: bool = False
    shared_ffn_dim: int | None = None
    capacity_factor: float | None = None
    eval_capacity_factor: float | None = None
    min_capacity: int | None = None
    drop_policy: DropPolicy | None = None
    router: Literal["per_mlp", "per_linear"] = "per_mlp"

    def __post_init__(self) -> None:
        problems = [*self._number_problems(), *self._capacity_problems()]
        beside = self.residual or self.shared_ffn_dim is not None or self.capacity_factor is not None
        if self.router == "per_linear" and beside:
            problems.append("moe.router per_linear goes with neither residual, shared_ffn_dim nor capacity_factor")
        if not 0 < self.routed_scaling_factor < math.inf:
            problems.append(f"moe.routed_scaling_factor {self.routed_scaling_factor} is not a number above 0")
        if self.residual and self.shared_ffn_dim is not None:
            problems.append("moe.shared_ffn_dim and moe.residual are two answers to one question: choose one")
        if problems:
            raise ValueError("; ".join(problems))

    def _number_problems(self) -> list[str]:
        if self.experts_per_layer is None:
            if self.num_experts is None:
                return ["moe.num_experts is missing"]
            if not 1 <= self.top_k <= self.num_experts:
                return [f"moe.top_k {self.top_k} is not between 1 and moe.num_experts {self.num_experts}"]
            return []
        if self.num_experts is not None:
            return ["moe.num_experts has no effect beside moe.experts_per_layer"]
        fewest = min(self.experts_per_layer, default=0)
        if not 1 <= self.top_k <= fewest:
            return [f"moe.top_k {self.top_k} is not between 1 and {fewest}, the fewest of moe.experts_per_layer"]
        return []

    def _capacity_problems(self) -> list[str]:
        found = []
        for name in ("capacity_factor", "eval_capacity_factor"):
            factor = getattr(self, name)
            if factor is not None and not 0 < factor < math.inf:
                found.append(f"moe.{name} {factor} is not a number above 0")
        if self.capacity_factor is None:
            listed = ("eval_capacity_factor", "min_capacity", "drop_policy")
            useless = [name for name in listed if getattr(self, name) is not None]
            found += [f"moe.{name} has no effect without moe.capacity_factor" for name in useless]
        if self.min_capacity is not None and self.min_capacity < 0:
            found.append(f"moe.min_capacity {self.min_capacity} is negative")
        return found

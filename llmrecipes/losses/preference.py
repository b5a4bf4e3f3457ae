"""Losses of preference training, one per pair, from the log-probabilities of its two answers."""

from __future__ import annotations

from typing import Literal, NamedTuple

import torch
import torch.nn.functional as F
from torch import Tensor

PreferenceLoss = Literal["sigmoid", "sigmoid_norm", "hinge", "ipo", "orpo"]


class Answers(NamedTuple):
    """What a model thinks of the answers of P pairs.

    Attributes:
        chosen, rejected: log-probability summed over the answer, [P].
    """

    chosen: Tensor
    rejected: Tensor


def preference_loss(
    policy: Answers,
    reference: Answers | None,
    lengths: Answers,
    kind: PreferenceLoss,
    beta: float,
    label_smoothing: float = 0.0,
) -> tuple[Tensor, Answers]:
    """The loss of each pair.

    With r = log pi(y|x) - log pi_ref(y|x) and m the number of an answer's tokens:

    | kind | loss | source |
    |---|---|---|
    | ``sigmoid`` | -(1 - e) log s(b (r_c - r_r)) - e log s(-b (r_c - r_r)), e = ``label_smoothing`` | 2305.18290 |
    | ``sigmoid_norm`` | the same with r / m | 2405.14734's length normalisation, with a reference |
    | ``hinge`` | max(0, 1 - b (r_c - r_r)) | 2305.10425 |
    | ``ipo`` | (r_c / m_c - r_r / m_r - 1 / (2 b))^2 | 2310.12036 |
    | ``orpo`` | -l_c - b log s(o(l_c) - o(l_r)), l = log pi / m, o(l) = l - log(1 - e^l) | 2403.07691 |

    Args:
        policy: of the model in training. reference: of the reference model; None for ``orpo``.
        lengths: tokens of each answer, [P].
        kind: see above. beta: b. label_smoothing: share of pairs taken to be labelled the wrong way round.

    Returns:
        losses [P], and the rewards b r of both answers (no gradient; for ``orpo`` b l).
    """
    if kind == "orpo":
        chosen, rejected = policy.chosen / lengths.chosen, policy.rejected / lengths.rejected
        odds = (chosen - rejected) - (_log1mexp(chosen) - _log1mexp(rejected))
        return -chosen - beta * F.logsigmoid(odds), _rewards(beta, chosen, rejected)
    assert reference is not None, f"{kind} needs a reference"
    chosen, rejected = policy.chosen - reference.chosen, policy.rejected - reference.rejected
    rewards = _rewards(beta, chosen, rejected)
    if kind in ("ipo", "sigmoid_norm"):
        chosen, rejected = chosen / lengths.chosen, rejected / lengths.rejected
    margin = chosen - rejected
    if kind == "ipo":
        return (margin - 1 / (2 * beta)).square(), rewards
    if kind == "hinge":
        return F.relu(1 - beta * margin), rewards
    right, wrong = F.logsigmoid(beta * margin), F.logsigmoid(-beta * margin)
    return -(1 - label_smoothing) * right - label_smoothing * wrong, rewards


def _rewards(beta: float, chosen: Tensor, rejected: Tensor) -> Answers:
    return Answers(beta * chosen.detach(), beta * rejected.detach())


def _log1mexp(x: Tensor) -> Tensor:
    """log(1 - e^x) for x < 0, exact near 0 too."""
    small = x > -0.6931471805599453  # ln 2
    # the branch that is not taken must not turn the gradient to NaN
    near = torch.log(-torch.expm1(torch.where(small, x, -torch.ones_like(x))))
    far = torch.log1p(-torch.exp(torch.where(small, -torch.ones_like(x), x)))
    return torch.where(small, near, far)

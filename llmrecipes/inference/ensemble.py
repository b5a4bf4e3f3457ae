"""Several experts as one model: their probabilities, mixed by how near the text so far is to each one's domain (c-BTM).

``p(token | text) = sum over e of w_e(text) p_e(token | text)``, w = softmax(-d^2 / T) over the domains' centres
(2303.14177). Probabilities are mixed, not logits, and only the text before a token decides.
"""

from __future__ import annotations

import math
from collections.abc import Sequence
from dataclasses import dataclass, replace

import numpy as np
import torch
from torch import Tensor

from data_prep.domain_vectors import Domains, domain_weights
from llmrecipes.errors import UserError
from llmrecipes.inference.opened import Opened
from llmrecipes.inference.perplexity import Score
from llmrecipes.inference.texts import Document
from llmrecipes.inference.windows import windows
from llmrecipes.losses import label_log_probs


@dataclass(frozen=True)
class Ensemble:
    """Experts and what weighs them.

    Attributes:
        experts: one for each domain, in order, all with the same tokenizer.
        domains: the domains. temperature: T of the weights. top_k: only so many nearest experts; None = all.
    """

    experts: list[Opened]
    domains: Domains
    temperature: float = 0.1
    top_k: int | None = None

    def __post_init__(self) -> None:
        count, first = len(self.domains.centers), self.experts[0]
        problems = []
        if len(self.experts) != count:
            problems.append(f"{len(self.experts)} models for {count} domains; give one for each, in their order")
        problems += [
            f"{expert.name}: another vocabulary ({expert.vocab_size}) than {first.name} ({first.vocab_size})"
            for expert in self.experts
            if expert.vocab_size != first.vocab_size
        ]
        if not (self.temperature > 0 and math.isfinite(self.temperature)):
            problems.append(f"--distance_temperature {self.temperature}: must be above 0")
        if self.top_k is not None and not 1 <= self.top_k <= count:
            problems.append(f"--top_experts {self.top_k}: 1 to {count}")
        if problems:
            raise UserError(*problems)

    def weights(self, texts: Sequence[str]) -> Tensor:
        """Weights of the experts after each text, [texts, experts], fp64."""
        points = self.domains.points(texts)
        return torch.from_numpy(domain_weights(points, self.domains.centers, self.temperature, self.top_k))

    def weights_before(self, ids: Sequence[int], text: str) -> Tensor:
        """Weights before each token but the first, by the text of the tokens before it, [len(ids) - 1, experts]."""
        ends = _ends(self.experts[0], ids, text)
        points = self.domains.prefix_points(text, ends)
        return torch.from_numpy(domain_weights(points, self.domains.centers, self.temperature, self.top_k))


def _ends(opened: Opened, ids: Sequence[int], text: str) -> list[int]:
    """Characters of ``text`` that the first 1 .. len(ids) - 1 tokens spell; part of a character counts as none."""
    found, end = [], 0
    for count in range(1, len(ids)):
        spelt = opened.codec.decode(ids[:count]).rstrip("\ufffd")
        end = max(end, len(spelt)) if text.startswith(spelt) else end
        found.append(end)
    return found


def mixture(log_probs: Tensor, weights: Tensor) -> Tensor:
    """``log sum over e of w_e p_e``: log-probabilities [experts, ...] and weights [..., experts] to [...]."""
    return torch.logsumexp(log_probs.double() + weights.double().movedim(-1, 0).log(), dim=0)


@dataclass(frozen=True)
class EnsembleScore:
    """Cost of the same texts.

    Attributes:
        experts: of each expert alone. uniform: of all with equal weights. ensemble: of all, weighed.
        mean_weights: of each expert, over the scored tokens.
    """

    experts: list[Score]
    uniform: Score
    ensemble: Score
    mean_weights: list[float]


def score(ensemble: Ensemble, documents: Sequence[Document], size: int, stride: int) -> EnsembleScore:
    """What documents cost.

    Args:
        ensemble: the experts. documents: the texts, which do not see each other.
        size, stride: of windows, see `windows`.
    """
    first = ensemble.experts[0]
    names = [*(expert.name for expert in ensemble.experts), "uniform", "ensemble"]
    sums = [Score(name) for name in names]
    weighed, tokens = np.zeros(len(ensemble.experts)), 0
    for document in documents:
        ids, skipped = first.codec.encode_span(document.text)
        if len(ids) < 2:
            continue
        if any(expert.codec.encode(document.text) != ids for expert in ensemble.experts[1:]):
            raise UserError("the models have different tokenizers: their probabilities are of different tokens")
        alone = torch.stack([_log_probs(expert, ids, size, stride) for expert in ensemble.experts])
        weights = ensemble.weights_before(ids, document.text)
        equal = torch.full_like(weights, 1 / len(weights[0]))
        nats = [*(-alone.double()), -mixture(alone, equal), -mixture(alone, weights)]
        text = document.text[min(skipped, len(document.text)) :]
        one = Score("", 0.0, len(ids) - 1, len(text), len(text.encode()), 1)
        sums = [total + replace(one, nats=float(part.sum())) for total, part in zip(sums, nats, strict=True)]
        weighed, tokens = weighed + weights.sum(0).numpy(), tokens + len(weights)
    if not tokens:
        raise UserError("the texts hold no token that could be predicted")
    return EnsembleScore(sums[:-2], sums[-2], sums[-1], (weighed / tokens).tolist())


@torch.inference_mode()
def _log_probs(opened: Opened, ids: Sequence[int], size: int, stride: int) -> Tensor:
    """log p of every token but the first, [len(ids) - 1]; each is scored once, as `llmrecipes perplexity` does."""
    found = []
    model = opened.model
    for window in windows(len(ids), size, stride):
        hidden = model(torch.tensor([ids[window.start : window.stop - 1]])).hidden[0]
        labels = torch.tensor(ids[window.first : window.stop])
        scored = hidden[window.first - window.start - 1 :]
        found.append(label_log_probs(scored, model.head_weight, labels, vocab_size=opened.vocab_size))
    return torch.cat(found)

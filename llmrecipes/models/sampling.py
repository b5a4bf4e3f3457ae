"""How the next token is chosen from the logits, in the order and by the formulas of transformers' processors."""

from __future__ import annotations

from dataclasses import dataclass

import torch
from torch import Tensor


@dataclass(frozen=True, kw_only=True)
class Sampling:
    """What is done to the logits before a token is drawn.

    Args:
        temperature: divides the logits; 0 takes the most likely token.
        top_k: draw among the k most likely tokens only (and those as likely as the k-th); None = all.
        top_p: draw among the fewest most likely tokens whose probabilities add up to it (1904.09751); 1 = all.
        repetition_penalty: logits of tokens that the text already holds are divided by it where they are positive and
            multiplied where they are negative (1909.05858); 1 = off.
    """

    temperature: float = 0.0
    top_k: int | None = None
    top_p: float = 1.0
    repetition_penalty: float = 1.0

    def problems(self) -> list[str]:
        """What is wrong with the values, as sentences; empty when nothing is."""
        found = []
        if not self.temperature >= 0:
            found.append(f"temperature {self.temperature}: must be 0 (the most likely token) or more")
        if self.top_k is not None and self.top_k < 1:
            found.append(f"top_k {self.top_k}: must be 1 or more")
        if not 0 < self.top_p <= 1:
            found.append(f"top_p {self.top_p}: must be larger than 0 and at most 1")
        if not self.repetition_penalty > 0:
            found.append(f"repetition_penalty {self.repetition_penalty}: must be larger than 0 (1 = off)")
        return found


def penalize(logits: Tensor, seen: Tensor, penalty: float) -> Tensor:
    """Make the tokens where ``seen`` [..., vocab] is True less likely (for a penalty above 1)."""
    return torch.where(seen, torch.where(logits < 0, logits * penalty, logits / penalty), logits)


def only_top_k(logits: Tensor, k: int) -> Tensor:
    """Minus infinity for all but the k largest of each row."""
    least = logits.topk(min(k, logits.shape[-1]), dim=-1).values[..., -1:]
    return logits.masked_fill(logits < least, -torch.inf)


def only_top_p(logits: Tensor, p: float) -> Tensor:
    """Minus infinity for the least likely tokens of each row, as many as together hold at most ``1 - p``."""
    ascending, order = logits.sort(dim=-1)
    removed = ascending.softmax(-1).cumsum(-1) <= 1 - p
    removed[..., -1] = False  # the most likely one always stays
    return logits.masked_fill(removed.scatter(-1, order, removed), -torch.inf)


def process(logits: Tensor, sampling: Sampling, seen: Tensor | None) -> Tensor:
    """The logits [..., vocab] to draw from, fp32; ``seen`` marks tokens of the text, needed with a penalty."""
    logits = logits.float()
    if sampling.repetition_penalty != 1.0:
        assert seen is not None
        logits = penalize(logits, seen, sampling.repetition_penalty)
    if sampling.temperature == 0:
        return logits
    logits = logits / sampling.temperature
    if sampling.top_k is not None:
        logits = only_top_k(logits, sampling.top_k)
    return only_top_p(logits, sampling.top_p) if sampling.top_p < 1 else logits


def draw(logits: Tensor, temperature: float, generator: torch.Generator | None) -> int:
    """An id from processed ``logits`` [vocab]; the most likely one when ``temperature`` is 0."""
    if temperature == 0:
        return int(logits.argmax())
    return int(torch.multinomial(logits.softmax(-1), 1, generator=generator))

"""Whether a merged model is what it should be: logits with the router held to one expert, or left alone."""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import contextmanager
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor

from llmrecipes.convert.folder import Source
from llmrecipes.convert.readers import Reader, build
from llmrecipes.convert.verify import near_ties, random_tokens, tolerance, widened
from llmrecipes.errors import UserError
from llmrecipes.models import Decoder
from llmrecipes.models.router import Router


@contextmanager
def forced(decoder: Decoder, expert: int) -> Iterator[None]:
    """Every token to one expert with weight one, whatever the routers say."""

    def one_hot(router: Router, _: Any, output: Any) -> Any:
        weights, experts, routing = output
        choices = router.weight.shape[0]
        slots = torch.arange(experts.shape[1], device=experts.device)
        weights = torch.zeros_like(weights)
        weights[:, 0] = 1
        return weights, ((expert + slots) % choices).expand_as(experts).contiguous(), routing

    handles = [module.register_forward_hook(one_hot) for module in decoder.modules() if isinstance(module, Router)]
    try:
        yield
    finally:
        for handle in handles:
            handle.remove()


@torch.inference_mode()
def logits(decoder: Decoder, tokens: Tensor, expert: int | None = None) -> Tensor:
    """In fp32, [B, T, vocab_size], with the routers held to ``expert`` where one is named."""
    with widened(decoder):
        if expert is None:
            hidden = decoder(tokens).hidden
        else:
            with forced(decoder, expert):
                hidden = decoder(tokens).hidden
    return F.linear(hidden, decoder.head_weight.float())[..., : decoder.config.vocab_size]


def check_experts(merged: Reader, branches: list[Reader], around: Source) -> list[float]:
    """Compare a merged model, held to each expert in turn, with that expert's own model; one is in memory at a time.

    Args:
        branches: in the order of the experts.
        around: how long texts may be.

    Returns:
        Per expert the largest difference of a logit, relative to the largest.

    Raises:
        UserError: one is above the tolerance.
    """
    tokens = random_tokens(around)
    decoder = build(merged)
    found = [logits(decoder, tokens, expert) for expert in range(len(branches))]
    del decoder
    return [_bounded(logits(build(b), tokens), found[e], merged, f"expert {e}") for e, b in enumerate(branches)]


def check_same(before: Reader, after: Reader, around: Source) -> float:
    """Compare two forms of one model; tokens whose experts rounding may exchange are left out, with all that see them.

    Raises:
        UserError: they differ.
    """
    tokens = random_tokens(around)
    decoder = build(before)
    with torch.inference_mode(), widened(decoder), near_ties(decoder, tokens) as undecided:
        decoder(tokens)
    expected = logits(decoder, tokens)
    del decoder
    decided = undecided.cumsum(1) == 0
    return _bounded(expected[decided], logits(build(after), tokens)[decided], after, "the folded model")


def _bounded(expected: Tensor, found: Tensor, reader: Reader, what: str) -> float:
    difference = float((expected - found).abs().max() / expected.abs().max().clamp_min(1)) if expected.numel() else 0.0
    bound = _bound(reader)
    if not difference <= bound:
        raise UserError(
            f"merge: the logits of {what} differ from its own by {difference:.1e} of the largest, more than "
            f"{bound:.0e}; nothing was kept"
        )
    return difference


def _bound(reader: Reader) -> float:
    """Weights rounded to bf16 or fp16 after a product was added to them differ by that rounding."""
    half = any(reader.dtype(name) in (torch.bfloat16, torch.float16) for name in reader.shapes)
    return 0.05 if half and reader.config.lora is None else tolerance(reader.config)

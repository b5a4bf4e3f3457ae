"""Text from a decoder, token by token."""

from __future__ import annotations

from collections.abc import Sequence

import torch
from torch import Tensor

from llmrecipes.models.cache import KVCache
from llmrecipes.models.decoder import Decoder


def sample_token(logits: Tensor, temperature: float, top_k: int | None, generator: torch.Generator | None) -> int:
    """Draw one id from ``logits`` [vocab]; the most likely one when ``temperature`` is 0."""
    if temperature == 0:
        return int(logits.argmax())
    scaled = logits.float() / temperature
    if top_k is not None and top_k < scaled.numel():
        scaled = scaled.masked_fill(scaled < scaled.topk(top_k).values[-1], -torch.inf)
    return int(torch.multinomial(scaled.softmax(-1), 1, generator=generator))


@torch.inference_mode()
def generate(
    model: Decoder,
    prompt_ids: Sequence[int] | Tensor,
    max_new_tokens: int,
    *,
    temperature: float = 1.0,
    top_k: int | None = None,
    generator: torch.Generator | None = None,
    eos_id: int | None = None,
    use_cache: bool = True,
    device: torch.device | None = None,
) -> list[int]:
    """Continue ``prompt_ids`` (at least one id) by up to ``max_new_tokens`` ids; returns the new ids only.

    Args:
        temperature: divides the logits; 0 takes the most likely token.
        top_k: draw among the k most likely tokens only.
        generator: source of randomness, on the CPU or the model's device.
        eos_id: stop after this id (it is returned).
        use_cache: keep keys and values of earlier tokens; without it every step reads the whole text again.
        device: that computes; None = where the embedding is (offloaded weights are elsewhere).

    The model is put into evaluation mode for the call and left as it was found.
    """
    device = device or model.embed.weight.device
    text = torch.as_tensor(prompt_ids, dtype=torch.long, device=device).reshape(1, -1)
    assert text.shape[1] > 0, "generation starts from at least one token"
    total = text.shape[1] + max_new_tokens
    if model.config.positions == "learned":
        assert model.config.max_seq_len is not None
        total = min(total, model.config.max_seq_len)
    dtype = (
        torch.get_autocast_dtype(device.type) if torch.is_autocast_enabled(device.type) else model.embed.weight.dtype
    )
    cache = KVCache(model.config, 1, total, dtype, device) if use_cache else None
    was_training = model.training
    model.eval()
    new_ids: list[int] = []
    try:
        step = text
        while text.shape[1] < total:
            hidden = model(step, cache=cache).hidden[0, -1]
            logits = model.logits(hidden).to(generator.device if generator is not None else device)
            token = sample_token(logits, temperature, top_k, generator)
            new_ids.append(token)
            if token == eos_id:
                break
            latest = torch.tensor([[token]], device=device)
            text = torch.cat((text, latest), dim=1)
            step = latest if use_cache else text
    finally:
        model.train(was_training)
    return new_ids

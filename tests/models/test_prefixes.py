"""A document that goes on from the beginning of another one computes what it computes with that beginning in front."""

from __future__ import annotations

import pytest
import torch

from llmrecipes.models import Decoder, ModelConfig, init_weights

KINDS = {
    "rope": {},
    "learned": {"positions": "learned", "max_seq_len": 64},
    "alibi": {"positions": "alibi"},
    "window": {"sliding_window": 5},
}


def decoder(kind):
    options = {"vocab_size": 50, "dim": 32, "num_layers": 2, "num_heads": 4, "num_kv_heads": 2, "ffn_dim": 48}
    model = Decoder(ModelConfig(**(options | KINDS[kind]))).double()
    init_weights(model, 0)
    return model


@pytest.mark.parametrize("kind", KINDS)
def test_it_equals_the_whole_text(kind):
    model = decoder(kind)
    draw = torch.Generator().manual_seed(1)
    prompt, first, second, other = (torch.randint(0, 50, (n,), generator=draw) for n in (9, 6, 8, 7))
    shared = torch.cat([prompt, first, second, other])[None]
    lengths, prefixes = [[15, 8, 7]], [[0, 9, 0]]
    hidden = model(shared, document_lengths=lengths, document_prefixes=prefixes).hidden[0].split(lengths[0])
    whole = model(torch.cat([prompt, second])[None]).hidden[0]
    torch.testing.assert_close(hidden[0], model(torch.cat([prompt, first])[None]).hidden[0], rtol=0, atol=1e-13)
    torch.testing.assert_close(hidden[1], whole[9:], rtol=0, atol=1e-13)
    torch.testing.assert_close(hidden[2], model(other[None]).hidden[0], rtol=0, atol=1e-13)
    mutant = model(shared, document_lengths=lengths).hidden[0].split(lengths[0])
    assert (mutant[1] - whole[9:]).abs().max() > 1e-3


def test_gradients_of_the_prompt_add_up():
    model = decoder("rope")
    draw = torch.Generator().manual_seed(1)
    prompt, first, second = (torch.randint(0, 50, (n,), generator=draw) for n in (9, 6, 8))
    weight = torch.randn(14, 32, dtype=torch.float64, generator=draw)

    def gradients(answers):
        model.zero_grad()
        (answers * weight).sum().backward()
        return [p.grad.clone() for p in model.parameters() if p.grad is not None]

    hidden = model(
        torch.cat([prompt, first, second])[None], document_lengths=[[15, 8]], document_prefixes=[[0, 9]]
    ).hidden[0]
    shared = gradients(hidden[9:])
    apart = [model(torch.cat([prompt, answer])[None]).hidden[0, 9:] for answer in (first, second)]
    for mine, theirs in zip(shared, gradients(torch.cat(apart)), strict=True):
        torch.testing.assert_close(mine, theirs, rtol=0, atol=1e-12)


def test_a_prefix_longer_than_what_is_before_it_is_a_mistake():
    model = decoder("rope")
    for lengths, prefixes in (([[4, 6]], [[0, 5]]), ([[4, 6]], [[1, 0]]), ([[4, 3, 3]], [[0, 2, 1]])):
        with pytest.raises(AssertionError, match="goes on from"):
            model(torch.zeros(1, 10, dtype=torch.long), document_lengths=lengths, document_prefixes=prefixes)

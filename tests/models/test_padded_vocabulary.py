"""Rows that only pad the vocabulary: no logits, no part in the loss, no gradient, whatever they hold."""

from __future__ import annotations

import pytest
import torch

from llmrecipes.losses import linear_cross_entropy
from llmrecipes.models import Decoder, ModelConfig, generate, init_weights

SIZES = {"vocab_size": 50, "dim": 32, "num_layers": 1, "num_heads": 4, "ffn_dim": 40}


def twins(tie):
    """The same model with and without padding, which holds what would win every comparison."""
    plain, padded = (Decoder(ModelConfig(**SIZES, tie_embeddings=tie, vocab_multiple=m)) for m in (1, 64))
    init_weights(plain, 1)
    state = plain.state_dict()
    for name, tensor in padded.state_dict().items():
        rows = state[name].shape[0]
        tensor[:rows] = state[name]
        tensor[rows:] = 1e3
    return plain.double().eval(), padded.double().eval()


@pytest.mark.parametrize("tie", [False, True])
@pytest.mark.parametrize("chunk", [3, 1024])
def test_nothing_depends_on_padded_rows(tie, chunk):
    plain, padded = twins(tie)
    assert padded.head_weight.shape[0] == padded.config.vocab_rows == 64
    assert padded.config.num_params - plain.config.num_params == 14 * 32 * (1 if tie else 2)
    assert padded.config.num_params == sum(p.numel() for p in padded.parameters())
    tokens = torch.randint(0, 50, (2, 9), generator=torch.Generator().manual_seed(0))
    losses = []
    for model in (plain, padded):
        hidden = model(tokens).hidden
        assert model.logits(hidden).shape == (2, 9, 50)
        loss, _ = linear_cross_entropy(
            hidden.flatten(0, 1), model.head_weight, tokens.flatten(), chunk, model.config.vocab_size
        )
        loss.backward()
        with torch.no_grad():
            again, _ = linear_cross_entropy(
                hidden.flatten(0, 1), model.head_weight, tokens.flatten(), chunk, model.config.vocab_size
            )
        torch.testing.assert_close(again, loss.detach(), rtol=0, atol=1e-12)
        losses.append(loss.detach())
    torch.testing.assert_close(losses[0], losses[1], rtol=0, atol=1e-12)
    for (name, one), (_, other) in zip(plain.named_parameters(), padded.named_parameters(), strict=True):
        rows = one.shape[0]
        torch.testing.assert_close(other.grad[:rows], one.grad, rtol=0, atol=1e-12, msg=name)
        assert not other.grad[rows:].any(), name
    assert generate(plain, [1, 2], 20, temperature=0) == generate(padded, [1, 2], 20, temperature=0)


def test_mutant_padding_that_takes_part():
    _, padded = twins(False)
    tokens = torch.randint(0, 50, (1, 9), generator=torch.Generator().manual_seed(0))
    hidden = padded(tokens).hidden.flatten(0, 1).detach()
    right, _ = linear_cross_entropy(hidden, padded.head_weight, tokens.flatten(), 1024, 50)
    wrong, _ = linear_cross_entropy(hidden, padded.head_weight, tokens.flatten(), 1024)
    assert abs(right - wrong) > 1

"""Sliding windows: against a mask written by hand, in packed documents, with a cache, with ALiBi."""

from __future__ import annotations

import pytest
import torch

from llmrecipes.models import Decoder, KVCache, ModelConfig, init_weights
from llmrecipes.models.attention import attend
from llmrecipes.models.context import make_context

SIZES = {"vocab_size": 50, "dim": 32, "num_layers": 3, "num_heads": 4, "num_kv_heads": 2, "ffn_dim": 40}


def make(**options):
    config = ModelConfig(**(SIZES | {"init_std": 0.3} | options))
    model = Decoder(config)
    init_weights(model, 1)
    return model.double().eval()


def ids(rows, length, seed=0):
    return torch.randint(0, 50, (rows, length), generator=torch.Generator().manual_seed(seed))


@pytest.mark.parametrize("window", [1, 3, 8, 20, 21])
def test_attention_is_that_of_a_mask_written_by_hand(window):
    config = ModelConfig(**SIZES, sliding_window=window)
    length, width = 20, 8
    torch.manual_seed(0)
    query, key, value = (torch.randn(2, length, heads, width, dtype=torch.float64) for heads in (4, 2, 2))
    context = make_context(config, ids(2, length), torch.float64)
    found = attend(query, key, value, context, window)
    for head in range(4):
        scores = query[:, :, head] @ key[:, :, head // 2].transpose(1, 2) / width**0.5
        for i in range(length):
            for j in range(length):
                if not i - window < j <= i:
                    scores[:, i, j] = -torch.inf
        expected = scores.softmax(-1) @ value[:, :, head // 2]
        torch.testing.assert_close(found[:, :, head], expected, rtol=0, atol=1e-12)
    if window < length:
        assert not torch.allclose(found, attend(query, key, value, context, None))


@pytest.mark.parametrize("positions", ["rope", "alibi"])
@pytest.mark.parametrize("layers", [None, [1]])
def test_packed_documents_and_a_cache_see_the_same_window(positions, layers):
    model = make(sliding_window=5, window_layers=layers, positions=positions)
    tokens = ids(2, 24)
    with torch.no_grad():
        whole = model(tokens).hidden
        cache = KVCache(model.config, 2, 24, torch.float64)
        parts = [model(part, cache=cache).hidden for part in tokens.split([11, 1, 1, 7, 4], dim=1)]
        torch.testing.assert_close(torch.cat(parts, 1), whole, rtol=0, atol=1e-12)
        packed = model(tokens, document_lengths=[[9, 15], [24]]).hidden
        alone = [model(piece).hidden for piece in (tokens[:1, :9], tokens[:1, 9:], tokens[1:])]
        torch.testing.assert_close(packed[:1], torch.cat(alone[:2], 1), rtol=0, atol=1e-12)
        torch.testing.assert_close(packed[1:], alone[2], rtol=0, atol=1e-12)


def test_how_far_a_token_reaches():
    """Each layer with a window of W carries information W - 1 tokens further; one layer without it, all the way."""
    for layers, reach in ((None, 3 * 2), ([0, 2], 39), ([], 39)):
        model = make(sliding_window=3, window_layers=layers)
        tokens = ids(1, 40)
        changed = tokens.clone()
        changed[0, 0] = (changed[0, 0] + 1) % 50
        with torch.no_grad():
            moved = (model(tokens).hidden - model(changed).hidden).abs().amax(-1)[0] > 0
        assert moved.nonzero().max() == reach


def test_wrong_windows_are_told():
    for options, problem in (
        ({"sliding_window": 0}, "sliding_window 0 is less than 1"),
        ({"window_layers": [0]}, "window_layers has no effect without sliding_window"),
        ({"sliding_window": 4, "window_layers": [3]}, "window_layers 3 is not one of the layers 0 to 2"),
        ({"dense_layers": [0]}, "dense_layers has no effect without moe"),
        ({"vocab_multiple": 0}, "vocab_multiple 0 is less than 1"),
    ):
        with pytest.raises(ValueError, match=problem):
            ModelConfig(**SIZES, **options)

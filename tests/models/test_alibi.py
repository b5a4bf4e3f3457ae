"""ALiBi against the definition, head by head."""

from __future__ import annotations

import math

import pytest
import torch

from llmrecipes.models.alibi import alibi_bias, alibi_slopes
from llmrecipes.models.attention import attend
from llmrecipes.models.context import SequenceContext


def test_slopes_of_the_paper():
    assert alibi_slopes(8) == [2.0**-i for i in range(1, 9)]
    assert alibi_slopes(12)[:8] == alibi_slopes(8)
    assert alibi_slopes(12)[8:] == [2.0**-0.5, 2.0**-1.5, 2.0**-2.5, 2.0**-3.5]
    assert alibi_slopes(1) == [2.0**-8]
    assert all(len(alibi_slopes(n)) == n for n in range(1, 41))


@pytest.mark.parametrize("heads", [4, 6])
def test_attention_with_biases_is_the_naive_one(heads):
    length, width = 9, 8
    q, k, v = torch.randn(3, 1, length, heads, width, dtype=torch.float64, generator=torch.Generator().manual_seed(0))
    bias = alibi_bias(heads, length, 0, torch.float64, q.device)
    got = attend(q, k, v, SequenceContext(torch.arange(length)[None], bias=bias))
    for head, slope in enumerate(alibi_slopes(heads)):
        for i in range(length):
            scores = [float(q[0, i, head] @ k[0, j, head]) / math.sqrt(width) - slope * (i - j) for j in range(i + 1)]
            naive = torch.tensor(scores, dtype=torch.float64).softmax(0) @ v[0, : i + 1, head]
            torch.testing.assert_close(got[0, i, head], naive, rtol=0, atol=1e-12)

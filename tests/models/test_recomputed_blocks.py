"""Recomputed blocks have the gradients of kept ones, whatever they are made of."""

import pytest
import torch

from llmrecipes.distributed.recompute import recompute_blocks
from llmrecipes.models import Decoder
from llmrecipes.recipe import ModelConfig, MoEConfig

KINDS = {
    "dense": {"ffn_dim": 24},
    "experts": {"moe": MoEConfig(num_experts=4, ffn_dim=12)},
    "a router per map": {"moe": MoEConfig(num_experts=4, ffn_dim=12, router="per_linear")},
}


def gradients(kind, how, masked):
    torch.manual_seed(0)
    model = Decoder(ModelConfig(vocab_size=32, dim=16, num_layers=2, num_heads=2, **KINDS[kind])).train()
    recompute_blocks(model, how)
    tokens = torch.randint(0, 32, (2, 12))
    mask = torch.ones(2, 12, dtype=torch.bool)
    mask[1, 9:] = False
    out = model(tokens, token_mask=mask if masked else None)
    loss = out.hidden.square().mean() + sum(routing.prob_sum.square().sum() for routing in out.routing)
    loss.backward()
    return [parameter.grad for parameter in model.parameters() if parameter.grad is not None]


@pytest.mark.parametrize("masked", [False, True], ids=["all tokens", "some tokens"])
@pytest.mark.parametrize("how", ["selective", "full"])
@pytest.mark.parametrize("kind", KINDS)
def test_recomputed_is_kept(kind, how, masked):
    kept, again = gradients(kind, "none", masked), gradients(kind, how, masked)
    assert len(kept) == len(again) > 8
    for a, b in zip(kept, again, strict=True):
        torch.testing.assert_close(a, b, rtol=0, atol=1e-6)

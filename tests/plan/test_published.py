"""The figures of the source documents, and of the papers they lean on."""

from __future__ import annotations

from itertools import combinations, pairwise

import pytest

from llmrecipes.plan.budget import DAY, optimal, over_training, solve
from llmrecipes.plan.failures import PER_GPU_HOUR, WEEK, failure_cost
from llmrecipes.plan.hardware import parse_gpus
from llmrecipes.plan.memory import checkpoint_bytes, zero_states
from llmrecipes.plan.pipeline import balance, layer_sizes, pipeline
from llmrecipes.recipe import ModelConfig, MoEConfig

BLOOM = ModelConfig(
    vocab_size=250_880,
    dim=14_336,
    num_layers=70,
    num_heads=112,
    ffn_dim=4 * 14_336,
    norm="layer",
    activation="gelu_tanh",
    positions="alibi",
    qkv_bias=True,
    bias=True,
    tie_embeddings=True,
    embedding_norm=True,
)
MIXTRAL = ModelConfig(
    vocab_size=32_000,
    dim=4096,
    num_layers=32,
    num_heads=32,
    num_kv_heads=8,
    moe=MoEConfig(num_experts=8, top_k=2, ffn_dim=14_336),
)
LLAMA = {"dim": 4096, "num_layers": 32, "num_heads": 32}


@pytest.mark.parametrize(
    ("config", "params"),
    [
        (ModelConfig(vocab_size=32_000, ffn_dim=11_008, **LLAMA), 6_738_415_616),
        (ModelConfig(vocab_size=65_024, ffn_dim=14_336, num_kv_heads=8, **LLAMA), 7_512_264_704),
        (MIXTRAL, 46_702_792_704),
        (BLOOM, 176_247_271_424),
        (ModelConfig(vocab_size=151_936, ffn_dim=11_008, qkv_bias=True, **LLAMA), 7_721_324_544),
        (ModelConfig(vocab_size=65_024, dim=256, num_layers=8, num_heads=4, ffn_dim=1024), 41_685_248),
    ],
    ids=["llama2-7b", "tanuki-8b", "mixtral-8x7b", "bloom", "qwen-7b", "rtx3090"],
)
def test_parameters(config, params):
    assert config.num_params == params


def test_parameters_of_the_final_mixture():
    moe = MoEConfig(num_experts=8, top_k=2, ffn_dim=4096)
    config = ModelConfig(vocab_size=56_320, dim=2048, num_layers=40, num_heads=32, moe=moe)
    assert (config.num_params, config.active_params) == (8_955_660_288, 2_915_862_528)


def test_states_of_mixtral_on_eight_model_parallel_gpus():
    """11.7 + 23.4 + 46.7 GB, and 35 GB after ZeRO-2 over three."""
    mine = MIXTRAL.num_params / 8
    assert [round(mine * n / 1e9, 1) for n in (2, 4, 8)] == [11.7, 23.4, 46.7]
    assert zero_states(mine, 2, 3) / 1e9 == pytest.approx(35.0, abs=0.05)
    assert zero_states(mine, 0, 3) == 14 * mine
    assert zero_states(mine, 3, 3) == pytest.approx(14 * mine / 3)
    assert zero_states(mine, 1, 3) / 1e9 == pytest.approx(50.6, abs=0.05)  # the mutant: gradients are not shared


def test_checkpoints_of_bloom():
    """2.47 TB = 2.24 TiB at 14 bytes a parameter, 352.5 GB = 328.3 GiB in bf16."""
    assert checkpoint_bytes(BLOOM.num_params, 14) == pytest.approx(2.467e12, rel=1e-3)
    assert checkpoint_bytes(BLOOM.num_params, 14) / 2**40 == pytest.approx(2.24, abs=0.005)
    assert checkpoint_bytes(BLOOM.num_params, 2) / 1e9 == pytest.approx(352.5, abs=0.05)
    assert checkpoint_bytes(BLOOM.num_params, 2) / 2**30 == pytest.approx(328.3, abs=0.05)


def test_stages_of_bloom():
    """Embedding 7.19 GB, a block 4.93 GB; 70 blocks + 2 = 72 in 12 stages of six, as the script has them.

    The ends are 6.3 % above the mean, not within the 5 % that the documents aim at: no cut of whole layers is better.
    """
    sizes = layer_sizes(BLOOM)
    assert (round(sizes[0] / 1e9, 2), round(sizes[1] / 1e9, 2), len(sizes)) == (7.19, 4.93, 72)
    stages = pipeline(BLOOM, 12)
    assert [s.blocks for s in stages] == [5, *[6] * 10, 5]
    assert stages[0].embedding and stages[-1].head and sum(s.embedding + s.head for s in stages) == 2
    mean = sum(s.size for s in stages) / 12
    assert max(s.size for s in stages) / mean - 1 == pytest.approx(0.0627, abs=5e-4)
    # counting blocks alone (the mutant), the first stage would be a quarter above it
    assert (sizes[0] + 6 * sizes[1]) / mean > 1.22


def test_balance_is_the_best_of_all_cuts():
    sizes = [5.0, 1, 2, 4, 1, 1, 3]
    for stages in range(1, 8):
        cuts = [(0, *cut, 7) for cut in combinations(range(1, 7), stages - 1)]
        best = min(max(sum(sizes[a:b]) for a, b in pairwise(cut)) for cut in cuts)
        counts, start, worst = balance(sizes, stages), 0, 0.0
        for count in counts:
            worst, start = max(worst, sum(sizes[start : start + count])), start + count
        assert (worst, start, len(counts)) == (best, 7, stages)


@pytest.mark.parametrize(
    ("days", "tokens", "mfu", "digits"),
    [(30, 200e9, 0.234, 3), (30, 600e9, 0.702, 3), (25, 200e9, 0.28, 2), (25, 600e9, 0.84, 2)],
)
def test_mfu_of_twenty_h100(days, tokens, mfu, digits):
    peak = parse_gpus("20xH100-80G").peak
    assert solve(peak, 6 * 10e9, days * DAY, None, tokens).mfu == pytest.approx(mfu, abs=0.5 * 10**-digits)


@pytest.mark.parametrize(("days", "tokens"), [(30, 342e9), (25, 285e9)])
def test_tokens_of_twenty_h100(days, tokens):
    peak = parse_gpus("20xH100-80G").peak
    found = solve(peak, 6 * 10e9, days * DAY, 0.4, None)
    assert found.tokens == pytest.approx(tokens, rel=2e-3)
    again = solve(peak, 6 * 10e9, None, 0.4, found.tokens)
    assert again.seconds == pytest.approx(days * DAY)


def test_chinchilla():
    assert over_training(10e9, 200e9) == 1.0
    per_param = 1e12 / 6_738_415_616  # LLaMA 7B
    assert per_param == pytest.approx(148, abs=0.5)
    params, tokens = optimal(6 * 10e9 * 200e9)
    assert (params, tokens) == (pytest.approx(10e9), pytest.approx(200e9))


def test_failures_of_bloom():
    """Saved every three hours, 40 s each; one to two failures a week: 1.5 h lost to each."""
    cost = failure_cost(WEEK, 1.5, 3 * 3600, 40, 0)
    assert cost.lost / 3600 == pytest.approx(2.25)
    assert cost.saving == pytest.approx(56 * 40)
    assert cost.best_interval / 3600 == pytest.approx(1.58, abs=0.01)
    assert 1 < PER_GPU_HOUR * 168 * 384 < 2  # the rate taken from Llama 3 is BLOOM's too
    # the interval that is called cheapest is cheaper than its neighbours
    price = {
        f: sum(failure_cost(WEEK, 1.5, f * cost.best_interval, 40, 0).__dict__[k] for k in ("lost", "saving"))
        for f in (0.8, 1.0, 1.25)
    }
    assert price[1.0] < min(price[0.8], price[1.25])

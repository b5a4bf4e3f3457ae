"""The estimate on paper: FLOPs counted from the operations are the model's own, and the roofline is one."""

from __future__ import annotations

import pytest

from benchmarks.paper_estimate import BANDWIDTH, LAUNCH, PRODUCTS, Estimate, Work, estimate, micro_batch_work, table
from llmrecipes.models import ModelConfig, MoEConfig
from llmrecipes.plan.activations import Step
from llmrecipes.plan.hardware import GPUS, parse_gpus

SIZES = {"vocab_size": 512, "dim": 128, "num_layers": 6, "num_heads": 4, "num_kv_heads": 2, "ffn_dim": 256}
GPU = GPUS["H100-80G"]


@pytest.mark.parametrize("moe", [None, MoEConfig(num_experts=8, top_k=2, ffn_dim=128)])
def test_counted_flops_are_the_models_own(moe):
    config = ModelConfig(**SIZES, moe=moe)
    rows, length = 4, 1024
    kinds = micro_batch_work(config, Step(rows, length, on_gpu=True), GPU)
    counted = {kind: work.flops for kind, work in kinds.items()}
    attention = counted.pop("attention") * 6 / 7  # five products backward instead of four
    padding = 1.0 if moe is None else 1.05  # blocks of experts padded to 64 rows
    own = config.flops_per_token(length) * rows * length
    assert own * 0.999 < sum(counted.values()) + attention < own * padding * 1.001
    assert kinds["norms, elementwise, copies"].flops == 0
    # beside the head's three products the last norm's sums over rows, which are products too
    assert counted["head and loss"] == pytest.approx(6 * 512 * 128 * rows * length, rel=0.005)


def test_an_operation_takes_the_longest_of_products_memory_and_launch():
    for flops, size, seconds, bound in (
        (PRODUCTS * GPU.peak, 8.0, 1.0, "products"),
        (8.0, BANDWIDTH * GPU.bandwidth, 1.0, "memory"),
        (8.0, 8.0, LAUNCH, "launches"),
    ):
        work = Work()
        work.add(flops, size, GPU, PRODUCTS)
        assert work.seconds == pytest.approx(seconds)
        assert work.bound == bound


def test_a_recipe_on_one_gpu_has_no_traffic():
    found = estimate("rtx3090/pretrain_dense", parse_gpus("RTX3090"))
    assert isinstance(found, Estimate)
    assert found.traffic == found.exposed == 0
    assert 0.05 < found.mfu < PRODUCTS
    text = table(found)
    assert "| head and loss |" in text and "traffic" not in text

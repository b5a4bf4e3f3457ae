"""Kinds of work of a profile: by an operator's name and its callers', nothing lost and nothing counted twice."""

from __future__ import annotations

import pytest
import torch

from benchmarks.profile_step import PROFILED, grouped, kind_of, table
from llmrecipes.losses import linear_cross_entropy


@pytest.mark.parametrize(
    ("names", "kind"),
    [
        (["aten::mm"], "matrix products"),
        (["aten::mm", "aten::_grouped_mm", "_GroupedExperts"], "matrix products"),
        (["aten::mm", "_LinearCrossEntropy"], "head and loss"),
        (["aten::mul_", "Optimizer.step#AdamW.step"], "optimizer, clipping"),
        (["aten::_fused_adamw_"], "optimizer, clipping"),
        (["aten::fill_", "aten::_scaled_dot_product_flash_attention_for_cpu_backward"], "attention"),
        (["aten::mul_", "_SwiGLUBackward"], "norms, elementwise"),
        (["aten::copy_", "aten::_to_copy", "aten::to"], "casts, copies, gathers"),
        (["aten::view"], "other"),
    ],
)
def test_kind_of_an_operator(names, kind):
    assert kind_of(names) == kind


def test_all_time_of_a_real_profile_is_in_some_kind():
    hidden = torch.randn(64, 32, requires_grad=True)
    weight = torch.randn(128, 32, requires_grad=True)
    with torch.profiler.profile(activities=[torch.profiler.ProfilerActivity.CPU]) as profile:
        product = hidden @ torch.randn(32, 32)
        linear_cross_entropy(product, weight, torch.arange(64))[0].backward()
    found = grouped(profile.events())
    total = sum(event.self_cpu_time_total for event in profile.events()) / 1000 / PROFILED
    assert sum(sum(operators.values()) for operators in found.values()) == pytest.approx(total)
    # fp32 products of the head are oneDNN's on some processors
    assert found["head and loss"].keys() & {"mm", "mkldnn::_linear_pointwise"} and "mm" in found["matrix products"]
    text = table(found)
    assert text.count("\n") == 1 + len(found)
    assert sum(float(row.split("|")[3].rstrip("% ")) for row in text.splitlines()[2:]) == pytest.approx(100, abs=0.5)

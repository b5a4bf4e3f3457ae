from __future__ import annotations

import argparse

import pytest

from llmrecipes.callbacks.throughput import PEAK_FLOPS
from llmrecipes.errors import UserError
from llmrecipes.plan.hardware import GPUS, parse_gpus
from llmrecipes.plan.units import count_of, duration, gibibytes, share_of, short_count


@pytest.mark.parametrize(
    ("text", "count", "name"),
    [
        ("24xH100-80G", 24, "H100-80G"),
        ("H100-80Gx24", 24, "H100-80G"),
        ("rtx3090", 1, "RTX3090-24G"),
        ("4 x RTX4090", 4, "RTX4090-24G"),
        ("RTX4090x4", 4, "RTX4090-24G"),
        ("8xA100-40GB", 8, "A100-40G"),
    ],
)
def test_gpus_are_understood(text, count, name):
    found = parse_gpus(text)
    assert (found.count, found.gpu.name) == (count, name)


@pytest.mark.parametrize(
    ("text", "hint"),
    [
        ("24xH1000-80G", "H100-80G"),
        ("8xA100", "A100-80G or A100-40G"),
        ("0xH100", "write a number and a name"),
        ("3xTPU", "known: "),
        ("", "write a number and a name"),
    ],
)
def test_a_slip_is_answered(text, hint):
    with pytest.raises(UserError, match=hint):
        parse_gpus(text)


def test_training_measures_with_the_same_peaks():
    """``mfu`` in metrics.jsonl and that of plan are shares of one figure."""
    seen = 0
    for key, peak in PEAK_FLOPS.items():
        same = [
            gpu for gpu in GPUS.values() if gpu.name.startswith(key.replace(" ", "") + "-") and "PCIE" not in gpu.name
        ]
        assert same and all(gpu.peak == peak for gpu in same), key
        seen += 1
    assert seen >= 7
    assert all(gpu.source and gpu.memory > 2**33 and gpu.bandwidth > 1e11 for gpu in GPUS.values())


def test_units():
    assert count_of("10B") == 10e9 and count_of("1.5T") == 1.5e12 and count_of("200_000") == 200_000
    assert share_of("40%") == 0.4 and share_of("0.4") == 0.4
    for wrong in ("", "ten", "-3", "0", "1.2.3"):
        with pytest.raises(argparse.ArgumentTypeError):
            count_of(wrong)
    for wrong in ("0", "1.1", "x", "120%"):
        with pytest.raises(argparse.ArgumentTypeError):
            share_of(wrong)
    assert [duration(s) for s in (1.5, 42, 600, 18_000, 900_000)] == ["1.5 s", "42 s", "10.0 min", "5.0 h", "10.4 d"]
    assert short_count(8_955_660_288) == "8.96 B" and gibibytes(2**30) == "1.0 GiB"

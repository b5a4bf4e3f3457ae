"""The one line a person reads, to the letter, and what loggers get."""

from __future__ import annotations

import pytest
import torch

from llmrecipes.callbacks.logging import console_line, flatten, validation_line
from llmrecipes.callbacks.throughput import PEAK_FLOPS, Throughput, clock, known_peak, peak_memory

DENSE = {
    "step": 250,
    "tokens": 32_000,
    "loss": 2.345678,
    "grad_norm": 0.98765,
    "lr": 0.00029876,
    "batch": "0b9e0597",
    "tokens_per_second": 12345.6,
    "memory_gib": 1.234,
}
MOE = DENSE | {
    "aux_loss": 1.01234,
    "z_loss": 1.9,
    "expert_load": [[0.5, 0.5, 0.0, 0.0], [0.25, 0.25, 0.25, 0.25]],
    "max_violation": [1.0, 0.0],
}


def test_dense_line():
    assert console_line(DENSE, 10_000, None) == (
        "step   250/10000   2.5%  loss 2.3457  grad 0.988  lr 2.99e-04  12,346 tok/s  1.23 GiB"
    )
    assert console_line(DENSE | {"step": 10_000}, 10_000, 0.0).startswith("step 10000/10000 100.0%  ")


def test_line_with_mfu_and_eta():
    assert console_line(DENSE | {"mfu": 0.41234}, 10_000, 18_720) == (
        "step   250/10000   2.5%  loss 2.3457  grad 0.988  lr 2.99e-04  12,346 tok/s  MFU 41.2%  1.23 GiB  ETA 5h12m"
    )


def test_moe_line_names_dead_experts():
    expected = (
        "step   250/10000   2.5%  loss 2.3457  grad 0.988  lr 2.99e-04  12,346 tok/s  1.23 GiB  "
        "balance 1.012 maxvio 1.00"
    )
    assert console_line(MOE, 10_000, None) == expected + " dead 2"
    alive = MOE | {"expert_load": [[0.5, 0.5, 0.01, 0.01]] * 2}
    assert console_line(alive, 10_000, 42.4) == expected + "  ETA 42s"


@pytest.mark.parametrize(
    ("seconds", "text"),
    [
        (-3, "0s"),
        (0.4, "0s"),
        (42, "42s"),
        (59.4, "59s"),
        (59.6, "1m00s"),
        (187, "3m07s"),
        (3599.4, "59m59s"),
        (3599.6, "1h00m"),
        (18_720, "5h12m"),
        (86_399.6, "1d00h"),
        (187_200, "2d04h"),
        (8_640_000, "100d00h"),
    ],
)
def test_clock(seconds, text):
    assert clock(seconds) == text


def test_flatten_gives_loggers_numbers_only():
    assert flatten(MOE | {"note": None, "name": "x"}) == {
        **{k: v for k, v in DENSE.items() if k != "batch"},
        "aux_loss": 1.01234,
        "z_loss": 1.9,
        "expert_load/0/0": 0.5,
        "expert_load/0/1": 0.5,
        "expert_load/0/2": 0.0,
        "expert_load/0/3": 0.0,
        **{f"expert_load/1/{e}": 0.25 for e in range(4)},
        "max_violation/0": 1.0,
        "max_violation/1": 0.0,
    }


@pytest.mark.parametrize(
    ("name", "peak"),
    [
        ("NVIDIA H100 80GB HBM3", 989e12),
        ("NVIDIA H200", 989e12),
        ("NVIDIA A100-SXM4-40GB", 312e12),
        ("NVIDIA L40S", 362e12),
        ("NVIDIA GeForce RTX 4090", 165e12),
        ("NVIDIA GeForce RTX 3090", 71e12),
        ("Tesla V100-SXM2-16GB", 125e12),
        ("NVIDIA Unheard-of 9000", None),
    ],
)
def test_peaks_by_name(monkeypatch, name, peak):
    monkeypatch.setattr(torch.cuda, "get_device_name", lambda device: name)
    assert known_peak(torch.device("cuda", 0)) == peak
    assert known_peak(torch.device("cpu")) is None
    assert len(PEAK_FLOPS) == 7


def test_memory_of_a_cpu_is_the_process():
    assert 0.05 < peak_memory(torch.device("cpu")) < 100


def test_throughput_counts_steps_for_the_rate_and_everything_for_the_forecast(monkeypatch):
    """Steps of 2 s with 100 tokens, the first of 12 s; 1 s between steps for validation and saving."""
    now = [0.0]
    monkeypatch.setattr("llmrecipes.callbacks.throughput.time.perf_counter", lambda: now[0])
    timer = Throughput()

    def step(seconds, pause=1.0):
        timer.start_step()
        now[0] += seconds
        timer.end_step(100)
        now[0] += pause

    assert timer.rate() == 0.0
    step(12.0)
    assert timer.seconds_left(11, 100) is None  # the first step pays for compilation
    assert timer.rate() == pytest.approx(100 / 12)
    for _ in range(3):
        step(2.0)
    assert timer.rate() == pytest.approx(50.0)  # only since last asked, pauses left out
    assert timer.seconds_left(14, 20) == pytest.approx((10.0 / 3) * 6)  # 1 + 3 x (2 + 1) seconds for three steps


def test_a_validation_shows_the_loss_of_every_set_and_a_perplexity_where_there_is_one():
    metrics = {"val_loss/ja": 2.0, "val_loss/en": 1.0, "val_loss": 1.5}
    assert validation_line(40, metrics, ()) == "valid     40  val_loss 1.5000  ppl 4.48  ja 2.0000  en 1.0000"
    pairs = {"val_loss/p": 0.6, "val_loss": 0.6, "val_rewards/accuracies/p": 0.75, "val_rewards/accuracies": 0.75}
    assert validation_line(40, pairs, ("rewards/accuracies",)) == (
        "valid     40  val_loss 0.6000  accuracies 0.7500  p 0.6000"
    )


def test_preferences_show_margins_and_accuracy():
    line = console_line(DENSE | {"rewards/margins": 0.25, "rewards/accuracies": 0.8}, 10_000, None)
    assert "margins 0.250  accuracies 0.800" in line

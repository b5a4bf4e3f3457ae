"""Scaling: the fitted exponent, rates of several processes, and a tiny sweep that is really run."""

from __future__ import annotations

import pytest

from benchmarks.scaling import WARMUP, Job, Sizes, Sweep, exponent, grow, processes_table, rates, sizes_table

TINY = Sizes(rows=1, length=16, vocab=64, layers=1, dim=32)


def test_exponent_of_a_power():
    values = [1.0, 2.0, 4.0, 8.0]
    assert exponent(values, [3 * value**1.5 for value in values]) == pytest.approx(1.5)
    assert exponent(values, [7.0] * 4) == pytest.approx(0)


def test_rates_take_the_slowest_process_and_the_sum_of_cpu_times():
    def record(wall: float, cpu: float) -> dict:
        return {"units": [{"wall": 99.0, "cpu": 99.0}] * WARMUP + [{"wall": wall, "cpu": cpu}] * 3}

    assert rates([record(2.0, 1.0), record(4.0, 3.0)], 80) == (20.0, 20.0)


@pytest.mark.parametrize(("field", "values"), [("layers", (1, 2)), ("experts", (4, 8)), ("length", (16, 32))])
def test_a_sweep_changes_one_size_and_measures_every_point(field, values):
    sweep = Sweep(field, field, values, TINY)
    assert [getattr(point, field) for point in sweep.points] == list(values)
    found = grow(sweep, rounds=1, steps=1)
    assert len(found.seconds) == len(found.memory) == 2
    assert found.memory[1] > found.memory[0]
    assert f"- {field}: doubled" in sizes_table([found])


def test_memory_of_a_step_holds_weights_gradients_and_both_moments():
    sweep = Sweep("vocabulary", "vocab", (1024, 2048), TINY)
    small, large = grow(sweep, rounds=1, steps=1).memory
    more = 1024 * 32 * 2 * 4  # embedding and head, fp32
    assert large - small >= 4 * more


def test_processes_are_compared_with_the_first():
    text = processes_table([Job(1, 100.0, 50.0, [2.0**20], 2.0**20), Job(2, 150.0, 40.0, [2.0**20, 2.0**21], 2.0**20)])
    assert "| 1 | 100 | 1.00 | 50 | 1.00 | 1.0 | 1.0 | +0.0% |" in text
    assert "| 2 | 150 | 1.50 | 40 | 0.80 | 1.0, 2.0 | 1.0 | -50.0% |" in text

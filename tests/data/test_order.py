"""The order is a bijection per epoch, blends exactly, and is a pure function of (seed, sample)."""

from __future__ import annotations

import time
from itertools import pairwise

import numpy as np
import pytest

from llmrecipes.data.order import Order, Permutation, derive_key, floor_sum

GOLDEN_KEY = 9058871843155686531
GOLDEN_PERMUTATION = [355, 604, 775, 878, 457, 412, 288, 352]
GOLDEN_SAMPLES = ([2, 1, 0, 1, 0, 2, 1, 0], [817766698, 442, 604, 263, 169, 502111903, 89, 737])


def test_permutation_is_a_bijection_for_every_size():
    sizes = [*range(1, 300), 1023, 1024, 1025, 65537]
    for n in sizes:
        assert (np.sort(Permutation(n, 5)(np.arange(n))) == np.arange(n)).all(), n
    assert len(sizes) == 303


@pytest.mark.parametrize("n", [2**31 - 1, 2**48 + 3, 10**18])
def test_permutation_of_huge_domains(n):
    index = np.unique(np.random.default_rng(0).integers(0, n, 20000))
    image = Permutation(n, 1)(index)
    assert len(np.unique(image)) == len(index) and image.min() >= 0 and image.max() < n
    assert abs(image.mean() / n - 0.5) < 0.02  # 7 sigma


def test_permutation_looks_random():
    """Neighbours fly apart, keys are independent: as for a uniform permutation, within 5 sigma."""
    n = 10007
    a, b = Permutation(n, 1)(np.arange(n)), Permutation(n, 2)(np.arange(n))
    for x, y in ((a[:-1], a[1:]), (a, b), (a, np.arange(n))):
        assert abs(np.corrcoef(x, y)[0, 1]) < 5 / n**0.5
    assert (a == np.arange(n)).sum() < 10 and (a == b).sum() < 10
    cells = np.histogram2d(a[:-1], a[1:], bins=10)[0]
    assert ((cells - n / 100) ** 2 / (n / 100)).sum() < 99 + 5 * (2 * 99) ** 0.5


def test_small_domains_reach_every_place():
    """Over keys, each value lands everywhere about equally often (5 sigma)."""
    for n in (2, 3, 5, 8):
        counts = np.zeros((n, n))
        for key in range(2000):
            counts[np.arange(n), Permutation(n, key)(np.arange(n))] += 1
        assert abs(counts - 2000 / n).max() < 5 * (2000 / n) ** 0.5, n


def test_floor_sum():
    rng, seen = np.random.default_rng(0), 0
    for n, m, a, b in rng.integers(0, 60, (500, 4)).tolist():
        assert floor_sum(n, m + 1, a, b) == sum((a * i + b) // (m + 1) for i in range(n))
        seen += 1
    assert seen == 500


WEIGHTS = [[0.5, 0.5], [0.03, 0.1, 0.4, 0.47], [1e-3, 1.0], [3, 1, 2, 2, 2]]


@pytest.mark.parametrize("weights", WEIGHTS)
@pytest.mark.parametrize("seed", [0, 7])
def test_every_prefix_has_the_planned_share(weights, seed):
    order = Order(seed, [50] * len(weights), weights)
    source, _ = order.samples(0, 20000)
    drawn = np.cumsum(source[:, None] == np.arange(len(weights)), axis=0)
    planned = np.arange(1, 20001)[:, None] * np.array(weights) / sum(weights)
    assert abs(drawn - planned).max() < 4  # samples, at any time
    for k in (0, 1, 2, 17, 1000, 19999):
        assert order.counts_before(k) == np.bincount(source[:k], minlength=len(weights)).tolist()


def test_counts_stay_exact_far_out():
    order = Order(3, [50, 60, 70], [0.2, 0.3, 0.5])
    for k in (10**6, 10**12, 2**48):
        before, after = order.counts_before(k), order.counts_before(k + 5000)
        source, _ = order.samples(k, k + 5000)
        assert (np.array(after) - before == np.bincount(source, minlength=3)).all() and sum(before) == k
        assert abs(np.array(before) - k * np.array([0.2, 0.3, 0.5])).max() < 20


@pytest.mark.parametrize("weights", [[1.0], [0.3, 0.7]])
def test_each_window_once_per_epoch(weights):
    lengths = [37, 101][: len(weights)]
    source, window = Order(1, lengths, weights).samples(0, 3000)
    epochs = 0
    for s, n in enumerate(lengths):
        seen = window[source == s]
        orders = [seen[i : i + n] for i in range(0, len(seen) - n + 1, n)]
        assert all((np.sort(epoch) == np.arange(n)).all() for epoch in orders)
        assert len({tuple(epoch) for epoch in orders}) == len(orders)  # a fresh order each epoch
        epochs += len(orders)
    assert epochs > 40


def test_any_split_of_the_range_gives_the_same_samples():
    order, rng = Order(2, [37, 101, 11], [0.3, 0.6, 0.1]), np.random.default_rng(0)
    whole = np.stack(order.samples(100, 1100))
    for _ in range(50):
        cuts = [100, *np.sort(rng.integers(100, 1100, 5)).tolist(), 1100]
        parts = [np.stack(Order(2, [37, 101, 11], [0.3, 0.6, 0.1]).samples(a, b)) for a, b in pairwise(cuts)]
        assert (np.concatenate(parts, axis=1) == whole).all()


def test_small_reads_on_and_back_are_those_of_one_large_one():
    lengths, weights = [37, 101, 11], [0.3, 0.6, 0.1]
    whole = np.stack(Order(2, lengths, weights).samples(0, 1600))
    order, crossed = Order(2, lengths, weights), 0
    for size in (8, 12, 255):  # places are computed in blocks of 256 samples, and kept
        for start in [*range(0, 1300, size), 700, 0, 250]:
            part = np.stack(order.samples(start, start + size))
            assert (part == whole[:, start : start + size]).all(), (size, start)
            crossed += start // 256 != (start + size - 1) // 256
    assert crossed > 10
    assert not (np.stack(Order(3, lengths, weights).samples(0, 8)) == whole[:, :8]).all()


def test_seeds_differ():
    a, b = (np.stack(Order(seed, [1000, 1000], [1, 1]).samples(0, 500)) for seed in (0, 1))
    assert (a[1] == b[1]).mean() < 0.05 and (a[0] != b[0]).any()


def test_golden_values():
    """Changing these changes what every existing run would see next: a resume would repeat and skip data."""
    assert derive_key(0, 1, 2) == GOLDEN_KEY
    assert Permutation(1000, 7)(np.arange(8)).tolist() == GOLDEN_PERMUTATION
    source, window = Order(42, [1000, 500, 10**9], [0.5, 0.3, 0.2]).samples(10**9, 10**9 + 8)
    assert (source.tolist(), window.tolist()) == GOLDEN_SAMPLES


def test_constant_time_and_fast():
    order = Order(0, [10**9, 10**8], [0.5, 0.5])
    start = time.process_time()
    for step in range(10**9, 10**9 + 20):
        order.samples(step * 1024, (step + 1) * 1024)
    assert (time.process_time() - start) / 20 / 1024 < 20e-6  # measured 0.4 us per sample

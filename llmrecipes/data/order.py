"""The data order: which window of which source is global sample k. A pure function of (seed, k), no index in memory.

Sources are blended with a Kronecker sequence: sample k belongs to the source whose share of [0, 1) holds
frac(k * golden ratio + offset), so that every prefix has each share to within a few samples. How many earlier samples
a source had is a sum of floors, computed in O(log k). Within a source each epoch is a fresh keyed permutation.
"""

from __future__ import annotations

import hashlib
import math
from collections.abc import Sequence
from fractions import Fraction

import numpy as np

_BITS = 62
_MODULUS = 1 << _BITS
_STEP = 2850178704830799621  # floor((sqrt(5) - 1) / 2 * 2^62), odd: the worst-approximable, hence most even, step
_ROUNDS = 6
_BLOCK = 1024  # samples that are placed together: numpy's calls take the time, for 8 of them as for 1,024


def derive_key(*parts: int) -> int:
    """A 64-bit key from integers, the same on every platform and Python."""
    text = ",".join(str(part) for part in parts).encode()
    return int.from_bytes(hashlib.blake2b(text, digest_size=8).digest(), "little")


class Permutation:
    """A keyed bijection of 0 .. n - 1: a generalized Feistel network over Z_a x Z_b, walked until inside.

    With a and b about sqrt(n) the grid exceeds n by less than a, so that hardly any value needs a second walk
    (Black and Rogaway, "Ciphers with arbitrary finite domains", 2002).

    Args:
        n: size of the domain, 1 to 2^62.
        key: 64 bits; another key is another permutation.
    """

    def __init__(self, n: int, key: int) -> None:
        assert 1 <= n <= _MODULUS
        self.n = n
        a = math.isqrt(n - 1) + 1
        self._sides = np.uint64(a), np.uint64(-(-n // a))
        self._keys = [np.uint64(derive_key(key, r)) for r in range(_ROUNDS)]

    def __call__(self, index: np.ndarray) -> np.ndarray:
        """Images of ``index`` [N], int64."""
        assert index.size == 0 or (index.min() >= 0 and index.max() < self.n)
        values = self._feistel(index.astype(np.uint64))
        outside = np.flatnonzero(values >= self.n)
        while outside.size:
            values[outside] = self._feistel(values[outside])
            outside = outside[values[outside] >= self.n]
        return values.astype(np.int64)

    def _feistel(self, values: np.ndarray) -> np.ndarray:
        a, b = self._sides
        left, right = values // b, values % b
        for r in range(0, _ROUNDS, 2):
            left = (left + _scatter(right, self._keys[r])) % a
            right = (right + _scatter(left, self._keys[r + 1])) % b
        return left * b + right


def _scatter(x: np.ndarray, key: np.uint64) -> np.ndarray:
    """32 well mixed bits of each value and the key (multiply, fold, multiply: the core of splitmix64)."""
    x = (x + key) * np.uint64(0xBF58476D1CE4E5B9)
    x ^= x >> np.uint64(29)
    x *= np.uint64(0x94D049BB133111EB)
    x >>= np.uint64(32)
    return x


def floor_sum(n: int, m: int, a: int, b: int) -> int:
    """Sum of floor((a i + b) / m) over i = 0 .. n - 1, for n, a, b >= 0, exact, in O(log m) steps (Euclid's scheme)."""
    total = 0
    while True:
        total += (a // m) * (n * (n - 1) // 2) + (b // m) * n
        a, b = a % m, b % m
        last = a * n + b
        if last < m:
            return total
        n, b = divmod(last, m)
        m, a = a, m


class Order:
    """Global sample k -> (source, window of the source).

    Args:
        seed: the data seed.
        lengths: windows per source.
        weights: share of each source, of tokens and so of samples; any positive scale. A source whose share exceeds
            its size begins another epoch, in a fresh order.
    """

    def __init__(self, seed: int, lengths: Sequence[int], weights: Sequence[float]) -> None:
        assert len(lengths) == len(weights) > 0 and min(lengths) > 0 and min(weights) > 0
        self.seed = seed
        self.lengths = list(lengths)
        exact = [Fraction(weight) for weight in weights]
        edges = [int(sum(exact[:i]) / sum(exact) * _MODULUS) for i in range(len(exact))]
        self._edges = [*edges, _MODULUS]
        self._offset = derive_key(seed, -1) % _MODULUS
        self._permutations: dict[tuple[int, int], Permutation] = {}
        self._blocks: dict[int, tuple[np.ndarray, np.ndarray]] = {}

    def counts_before(self, k: int) -> list[int]:
        """Samples of each source among the global samples 0 .. k - 1; exact."""
        if len(self.lengths) == 1:
            return [k]
        # u_j < edge exactly when floor((A j + B) / M) - floor((A j + B - edge) / M) is 1; + M keeps terms positive.
        whole = floor_sum(k, _MODULUS, _STEP, self._offset)
        below = [
            whole - (floor_sum(k, _MODULUS, _STEP, self._offset - edge + _MODULUS) - k) for edge in self._edges[1:-1]
        ]
        return np.diff([0, *below, k]).tolist()

    def samples(self, start: int, stop: int) -> tuple[np.ndarray, np.ndarray]:
        """Sources and windows of the global samples start .. stop - 1, both int64 [stop - start]; not to be written."""
        if stop - start >= _BLOCK:
            return self._place(start, stop)
        number, offset = divmod(start, _BLOCK)
        size = stop - start
        source, window = self._block(number)
        if offset + size > _BLOCK:
            more = self._block(number + 1)
            source, window = np.concatenate([source, more[0]]), np.concatenate([window, more[1]])
        return source[offset : offset + size], window[offset : offset + size]

    def _block(self, number: int) -> tuple[np.ndarray, np.ndarray]:
        if number not in self._blocks:
            if len(self._blocks) > 1:  # a step reads on from where the last one ended
                self._blocks.clear()
            self._blocks[number] = self._place(number * _BLOCK, (number + 1) * _BLOCK)
            for array in self._blocks[number]:
                array.flags.writeable = False
        return self._blocks[number]

    def _place(self, start: int, stop: int) -> tuple[np.ndarray, np.ndarray]:
        source = self._sources(start, stop)
        window = np.empty(stop - start, dtype=np.int64)
        for s, before in enumerate(self.counts_before(start)):
            rows = np.flatnonzero(source == s)
            epoch, position = np.divmod(before + np.arange(len(rows)), self.lengths[s])
            for e in np.unique(epoch):
                now = epoch == e
                window[rows[now]] = self._permutation(s, int(e))(position[now])
        return source, window

    def _sources(self, start: int, stop: int) -> np.ndarray:
        if len(self.lengths) == 1:
            return np.zeros(stop - start, dtype=np.int64)
        k = np.arange(start, stop, dtype=np.uint64)
        u = (k * np.uint64(_STEP) + np.uint64(self._offset)) & np.uint64(_MODULUS - 1)
        return np.searchsorted(np.array(self._edges[1:-1], dtype=np.uint64), u, side="right")

    def _permutation(self, source: int, epoch: int) -> Permutation:
        key = (source, epoch)
        if key not in self._permutations:
            if len(self._permutations) > 4 * len(self.lengths):  # past epochs are not needed again
                self._permutations.clear()
            self._permutations[key] = Permutation(self.lengths[source], derive_key(self.seed, source, epoch))
        return self._permutations[key]

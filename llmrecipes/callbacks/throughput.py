"""Tokens per second, model FLOPs utilisation, memory, time to the end."""

from __future__ import annotations

import resource
import time

import torch

# Dense bf16 peaks without sparsity, in FLOP/s, from the makers' data sheets; matched against the device's name.
PEAK_FLOPS = {
    "H200": 989e12,
    "H100": 989e12,
    "A100": 312e12,
    "L40S": 362e12,
    "RTX 4090": 165e12,
    "RTX 3090": 71e12,
    "V100": 125e12,
}


def known_peak(device: torch.device) -> float | None:
    """Peak of the device in FLOP/s, or None when it is not in the table (CPUs never are)."""
    if device.type != "cuda":
        return None
    name = torch.cuda.get_device_name(device)
    return next((peak for key, peak in PEAK_FLOPS.items() if key in name), None)


def peak_memory(device: torch.device) -> float:
    """Peak memory so far in GiB: of the device's allocator, on a CPU of the process."""
    if device.type == "cuda":
        return torch.cuda.max_memory_allocated(device) / 2**30
    return resource.getrusage(resource.RUSAGE_SELF).ru_maxrss / 2**20


def clock(seconds: float) -> str:
    """``42s``, ``3m07s``, ``5h12m``, ``2d04h``."""
    seconds = max(0, round(seconds))
    if seconds < 60:
        return f"{seconds}s"
    if seconds < 3600:
        return f"{seconds // 60}m{seconds % 60:02d}s"
    if seconds < 86400:
        return f"{seconds // 3600}h{seconds % 3600 // 60:02d}m"
    return f"{seconds // 86400}d{seconds % 86400 // 3600:02d}h"


class Throughput:
    """Times steps. The rate counts the steps alone; the time to the end counts everything between them too."""

    def __init__(self) -> None:
        self._step_started = self._started = time.perf_counter()
        self._seconds, self._tokens, self._seen = 0.0, 0, 0

    def start_step(self) -> None:
        self._step_started = time.perf_counter()

    def end_step(self, tokens: int) -> None:
        self._seconds += time.perf_counter() - self._step_started
        self._tokens += tokens
        self._seen += 1
        if self._seen == 1:
            # The first step pays for allocations and compilation: it would spoil the forecast.
            self._started = time.perf_counter()

    def rate(self) -> float:
        """Tokens per second since this was last asked."""
        rate = self._tokens / self._seconds if self._seconds else 0.0
        self._seconds, self._tokens = 0.0, 0
        return rate

    def seconds_left(self, step: int, max_steps: int) -> float | None:
        """Forecast of the time to the last step, or None after a single step."""
        if self._seen < 2:
            return None
        return (time.perf_counter() - self._started) / (self._seen - 1) * (max_steps - step)

"""What the reference model of preference training thinks of every pair, worked out once."""

from __future__ import annotations

import logging
import sys
import time
from collections.abc import Callable

import torch
from torch import Tensor

from llmrecipes.data.preference_data import PreferenceBatch, PreferencePairs
from llmrecipes.distributed import all_reduce_sum

log = logging.getLogger("llmrecipes")


def reference_log_probs(
    data: PreferencePairs,
    sums: Callable[[PreferenceBatch], Tensor],
    device: torch.device,
    between: Callable[[], None],
) -> Tensor:
    """Log-probabilities of the chosen and the rejected answer of every pair, [pairs, 2] fp64, on all ranks.

    Args:
        data: the pairs; each rank takes its share of the rows, and all run equally many forward passes.
        sums: log-probability of each answer of a batch: chosen, rejected, chosen, ...
        device: where the result is to be.
        between: called after the last forward pass.
    """
    rows = data.all_rows()
    log.info(f"reference: scoring {data.num_pairs:,} pairs once")
    scores = torch.zeros(data.num_pairs, 2, dtype=torch.float64, device=device)
    began = shown = time.monotonic()
    unit = data.micro_batch * data.data_ranks
    for first in range(0, len(rows), unit):
        at = first + data.data_rank * data.micro_batch
        mine = rows[at : at + data.micro_batch]
        # a rank without rows left runs the first ones again, for nothing: collectives must match
        batch = data.batch_of(mine or rows[:1]).to(device)
        found = sums(batch)
        if mine:
            scores[torch.tensor(batch.pair_numbers, device=device)] = found.view(-1, 2).double()
        if sys.stderr.isatty() and time.monotonic() - shown > 1:
            shown = time.monotonic()
            done = min(first + unit, len(rows))
            left = (shown - began) / done * (len(rows) - done)
            print(f"\rreference: {done:,} of {len(rows):,} rows, {left:.0f} s left ", end="", file=sys.stderr)
    between()
    log.info(f"reference: {data.num_pairs:,} pairs in {time.monotonic() - began:.0f} s")
    return all_reduce_sum(scores)

"""Pipeline stages on paper: where a model with a large vocabulary would be cut.

The trainer has no pipeline parallelism; this answers the question before one is chosen (BLOOM's embedding weighs as
much as one and a half of its blocks: it was counted as a layer, 2211.05100).
"""

from __future__ import annotations

from dataclasses import dataclass
from functools import cache

from llmrecipes.errors import UserError
from llmrecipes.plan.sizes import model_sizes
from llmrecipes.recipe import ModelConfig


@dataclass(frozen=True)
class Stage:
    """Consecutive layers on one device.

    Attributes:
        first, blocks: its first block and how many there are. embedding, head: whether it holds them.
        size: bytes of its weights.
    """

    first: int
    blocks: int
    embedding: bool
    head: bool
    size: float


def layer_sizes(config: ModelConfig, per_param: float = 2) -> list[float]:
    """Bytes of the embedding, of each block, and of the head; a tied head needs a copy of the embedding."""
    model, table = model_sizes(config), config.vocab_rows * config.dim
    embedding = model.rest - (0 if config.tie_embeddings else table)
    return [size * per_param for size in (embedding, *model.blocks, table)]


def balance(sizes: list[float], stages: int) -> list[int]:
    """How many consecutive layers each stage gets, so that the largest stage is as small as can be.

    Among equally good answers the one whose stages differ least (sum of squares).

    Raises:
        UserError: more stages than layers.
    """
    if not 1 <= stages <= len(sizes):
        raise UserError(f"--stages {stages}: between 1 and {len(sizes)}, embedding and head counted as layers")
    before = [0.0]
    for size in sizes:
        before.append(before[-1] + size)

    @cache
    def best(start: int, left: int) -> tuple[float, float, tuple[int, ...]]:
        if left == 1:
            whole = before[-1] - before[start]
            return whole, whole * whole, (len(sizes) - start,)
        found = None
        for stop in range(start + 1, len(sizes) - left + 2):
            mine = before[stop] - before[start]
            largest, squares, rest = best(stop, left - 1)
            option = (max(mine, largest), squares + mine * mine, (stop - start, *rest))
            if found is None or option[:2] < found[:2]:
                found = option
        assert found is not None
        return found

    return list(best(0, stages)[2])


def pipeline(config: ModelConfig, stages: int, per_param: float = 2) -> list[Stage]:
    """The stages of a model, first to last.

    Raises:
        UserError: more stages than layers.
    """
    sizes = layer_sizes(config, per_param)
    found, start = [], 0
    for count in balance(sizes, stages):
        stop = start + count
        embedding, head = start == 0, stop == len(sizes)
        found.append(Stage(max(0, start - 1), count - embedding - head, embedding, head, sum(sizes[start:stop])))
        start = stop
    return found

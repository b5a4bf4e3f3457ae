"""Batch sizes: what must divide what."""

from __future__ import annotations

from collections.abc import Iterator

from llmrecipes.recipe.rules.facts import CONFIG, DATA, Facts, Finding


def batch_problems(facts: Facts) -> Iterator[Finding]:
    """Positive sizes; global batch divisible by micro-batch x data ranks; the position table long enough."""
    sizes = {key: facts.integer(*DATA, key) for key in ("seq_len", "micro_batch", "global_batch", "valid_batches")}
    for key, size in sizes.items():
        if size is not None and size < 1:
            yield Finding((*DATA, key), f"data.init_args.{key} {size} is less than 1")
    micro, total, ranks = sizes["micro_batch"], sizes["global_batch"], facts.data_ranks
    if micro and total and micro > 0 and total > 0 and total % (micro * ranks):
        unit = micro * ranks
        near = sorted({max(unit, total // unit * unit), (total // unit + 1) * unit})
        what = (
            f"data.init_args.global_batch {total} is not divisible by micro_batch {micro} x {ranks} data "
            f"rank{'s' if ranks > 1 else ''} = {unit}"
        )
        yield Finding((*DATA, "global_batch"), what, f"use {' or '.join(map(str, near))}")
    length, table = sizes["seq_len"], facts.integer(*CONFIG, "max_seq_len")
    if facts.get(*CONFIG, "positions") == "learned" and length and table is not None and table < length:
        what = f"data.init_args.seq_len {length} is longer than the position table, max_seq_len {table}"
        yield Finding((*DATA, "seq_len"), what, "raise max_seq_len or shorten seq_len")
    scaling = (*CONFIG, "rope_scaling")
    kind, longest = facts.get(*scaling, "kind"), facts.integer(*scaling, "original_max_seq_len")
    if kind in ("dynamic", "longrope") and length and longest is not None and longest < length:
        what = f"data.init_args.seq_len {length}: rope_scaling {kind} turns by other angles beyond {longest} tokens"
        yield Finding((*DATA, "seq_len"), what, "shorten seq_len, or use rope_scaling of kind yarn or linear")
    yield from _weights(facts)


def _weights(facts: Facts) -> Iterator[Finding]:
    weights = facts.mapping(*DATA, "train")
    if facts.has(*DATA, "train") and facts.get(*DATA, "train") == {}:
        yield Finding((*DATA, "train"), "data.init_args.train names no source")
    numbers = {prefix: facts.number(*DATA, "train", prefix) for prefix in weights}
    for prefix, weight in numbers.items():
        if weight is not None and weight < 0:
            yield Finding(
                (*DATA, "train", prefix), f"data.init_args.train: the weight of {prefix} is negative, {weight}"
            )
        elif weight is None and isinstance(weights[prefix], float):
            yield Finding((*DATA, "train", prefix), f"data.init_args.train: the weight of {prefix} is not finite")
    if numbers and all(weight == 0 for weight in numbers.values()):
        yield Finding((*DATA, "train"), "data.init_args.train: all weights are zero")

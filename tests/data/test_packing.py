"""Every token is a target exactly once per epoch; documents never leak into each other."""

from __future__ import annotations

from itertools import pairwise

import numpy as np
import pytest

from llmrecipes.data.batch import IGNORE
from llmrecipes.data.packing import PackedSource, parse_split, split_documents
from llmrecipes.data.shards import IndexedShard
from llmrecipes.errors import UserError


def load(source: PackedSource) -> tuple[np.ndarray, np.ndarray, list[list[int]]]:
    every = np.arange(len(source))
    tokens = np.empty((len(source), source.seq_len), dtype=np.int64)
    labels, lengths = np.empty_like(tokens), [[] for _ in every]
    source.fill(every, every, tokens, labels)
    if source.document_mask:
        source.cut(every, every, labels, lengths)
    return tokens, labels, lengths


def positions_trained(source: PackedSource, labels: np.ndarray, starts: np.ndarray) -> np.ndarray:
    """How often each token of the run is a target."""
    row, column = np.nonzero(labels != IGNORE)
    return np.bincount(starts[row] + column + 1 - source.start, minlength=source.num_tokens)


@pytest.mark.parametrize("seq_len", [1, 7, 16, 64, 1000])
def test_each_token_is_a_target_once(make_shard, seq_len):
    prefix, texts = make_shard(documents=100)
    source = PackedSource(IndexedShard(prefix), (3, 90), seq_len, document_mask=False, what="x")
    run = np.concatenate(texts[3:90])
    tokens, labels, _ = load(source)
    starts = source._starts(np.arange(len(source)))
    for row, start in enumerate(starts - source.start):
        assert (tokens[row] == run[start : start + seq_len]).all()
        real = labels[row] != IGNORE
        assert (labels[row][real] == run[start + 1 : start + seq_len + 1][real]).all()
    counts = positions_trained(source, labels, starts)
    assert counts[0] == 0 and (counts[1:] == 1).all()
    if source._moved_back():  # the mutant: the last window without its mask trains some targets twice
        last = run[starts[-1] - source.start + 1 :][:seq_len]
        mutant = np.concatenate([labels[:-1], last[None]])
        assert positions_trained(source, mutant, starts).max() == 2


@pytest.mark.parametrize("seq_len", [1, 5, 32, 300])  # 300: more documents per window than the first look-ahead
def test_document_mask(make_shard, seq_len):
    prefix, texts = make_shard(documents=200, longest=12)
    source = PackedSource(IndexedShard(prefix), (0, 200), seq_len, document_mask=True, what="x")
    bounds = np.cumsum([0, *map(len, texts)])
    document = np.repeat(np.arange(200), np.diff(bounds))
    _, labels, lengths = load(source)
    starts, crossings = source._starts(np.arange(len(source))), 0
    for row, start in enumerate(starts):
        assert sum(lengths[row]) == seq_len and min(lengths[row]) > 0
        inputs = document[start : start + seq_len]
        assert lengths[row] == np.unique(inputs, return_counts=True)[1].tolist()
        crossing = document[start + 1 : start + seq_len + 1] != inputs
        assert (labels[row][crossing] == IGNORE).all()
        crossings += int(crossing.sum())
    trained = positions_trained(source, labels, starts)
    firsts = np.zeros(source.num_tokens, dtype=bool)
    firsts[bounds[:-1]] = True
    assert crossings >= 199 and (trained == np.where(firsts, 0, 1)).all()


def test_rows_may_be_scattered(make_shard):
    prefix, _ = make_shard()
    source = PackedSource(IndexedShard(prefix), (0, 300), 16, document_mask=True, what="x")
    tokens, labels, lengths = load(source)
    some, rows = np.array([7, len(source) - 1, 0]), np.array([4, 1, 2])
    got_tokens, got_labels, got = np.zeros((5, 16), np.int64), np.zeros((5, 16), np.int64), [[] for _ in range(5)]
    source.fill(some, rows, got_tokens, got_labels)
    source.cut(some, rows, got_labels, got)
    assert (got_tokens[rows] == tokens[some]).all() and (got_labels[rows] == labels[some]).all()
    assert [got[r] for r in rows] == [lengths[w] for w in some] and not got[0] and not got[3]


@pytest.mark.parametrize(
    ("split", "size", "bounds"),
    [
        ("998,1,1", 1000, [0, 998, 999, 1000]),
        ("998,1,1", 30513, [0, 30451, 30482, 30513]),  # 30452 + 31 + 31 is one too many
        ("969,30,1", 12345, [0, 11963, 12333, 12345]),
        ("1", 10, [0, 10, 10, 10]),
        ("90,10", 10, [0, 9, 10, 10]),
        ("998,1,1", 3, [0, 3, 3, 3]),
    ],
)
def test_split_as_megatron(split, size, bounds):
    parts = split_documents(split, size)
    assert [parts[0][0], *(stop for _, stop in parts)] == bounds
    assert all(before[1] == after[0] for before, after in pairwise(parts))


@pytest.mark.parametrize("split", ["", "a,b", "1,-1", "0,1,1", "1,1,1,1"])
def test_bad_splits(split):
    with pytest.raises(UserError, match=r"data\.split"):
        parse_split(split)


def test_too_small(make_shard):
    prefix, _ = make_shard(documents=4)
    with pytest.raises(UserError, match=r"here: .* tokens in 1 documents, one window needs 101"):
        PackedSource(IndexedShard(prefix), (0, 1), 100, document_mask=True, what="here")

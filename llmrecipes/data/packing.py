"""Documents packed into windows of fixed length: a shard, or a part of one, as an array of training samples."""

from __future__ import annotations

from itertools import pairwise

import numpy as np

from llmrecipes.data.batch import IGNORE
from llmrecipes.data.shards import IndexedShard
from llmrecipes.errors import UserError


def parse_split(split: str) -> tuple[float, ...]:
    """``"998,1,1"`` -> shares of train, validation and test; missing ones are 0.

    Raises:
        UserError: not one to three numbers, a negative one, or none for training.
    """
    try:
        shares = [float(part) for part in split.split(",")]
    except ValueError:
        shares = []
    if not 1 <= len(shares) <= 3 or min(shares) < 0 or shares[0] <= 0:
        raise UserError(f"data.split: {split!r} is not like '998,1,1' (shares of train, validation and test documents)")
    return tuple([*shares, 0.0, 0.0][:3])


def split_documents(split: str, num_documents: int) -> list[tuple[int, int]]:
    """Document ranges of the three parts, contiguous, rounded as Megatron-LM's get_train_valid_test_split_ rounds.

    Each bound is the one before plus the rounded share, then all bounds but the first move by the common excess.
    """
    shares = parse_split(split)
    bounds = [0]
    for share in shares:
        bounds.append(bounds[-1] + round(share / sum(shares) * float(num_documents)))
    excess = bounds[-1] - num_documents
    bounds = [0, *(max(0, bound - excess) for bound in bounds[1:])]
    return list(pairwise(bounds))


class PackedSource:
    """Windows over a contiguous run of documents.

    Window i covers ids i * T .. i * T + T of the run: T inputs, T targets. The last one is moved back to end with the
    run, and the targets that the one before it had are masked; so each id but the first is a target once per epoch.

    Args:
        shard: the tokens.
        documents: first and one past the last document of the run.
        seq_len: T.
        document_mask: cut windows at document starts: no attention across, and no target across (what follows an EOS
            is another text). False: plain causal rows.
        what: how messages call this part, such as ``data/ja (train)``.

    Raises:
        UserError: the run is shorter than one window.
    """

    def __init__(
        self, shard: IndexedShard, documents: tuple[int, int], seq_len: int, document_mask: bool, what: str
    ) -> None:
        self.shard = shard
        self.documents = documents
        self.seq_len = seq_len
        self.document_mask = document_mask
        self.start, self.stop = shard.document_range(*documents)
        self._last = len(self) - 1  # asked for with every batch
        if self.num_tokens < seq_len + 1:
            raise UserError(
                f"{what}: {self.num_tokens} tokens in {documents[1] - documents[0]} documents, one window needs "
                f"{seq_len + 1}; give it more documents, a shorter data.seq_len, or another data.split"
            )

    @property
    def num_tokens(self) -> int:
        """Ids in the run."""
        return self.stop - self.start

    def __len__(self) -> int:
        return -(-(self.num_tokens - 1) // self.seq_len)

    def fill(self, windows: np.ndarray, rows: np.ndarray, tokens: np.ndarray, labels: np.ndarray) -> int:
        """Write windows [N] into ``rows`` [N] of ``tokens`` and ``labels`` [B, T] int64; returns the largest id met.

        A negative id, which only a damaged file has, is returned instead.
        """
        ids = self.shard.windows(self._starts(windows), self.seq_len + 1)
        # All rows (they are 0 .. B - 1) are a slice, which numpy writes faster than scattered rows.
        where = slice(None) if len(rows) == len(tokens) else rows
        tokens[where], labels[where] = ids[:, :-1], ids[:, 1:]
        if self._last in windows.tolist():
            labels[rows[windows == self._last], : self._moved_back()] = IGNORE
        low = int(ids.min()) if ids.dtype.kind == "i" else 0
        return int(ids.max()) if low >= 0 else low

    def cut(self, windows: np.ndarray, rows: np.ndarray, labels: np.ndarray, lengths: list[list[int]]) -> None:
        """Set ``lengths[row]`` to the document lengths of each window, and mask the targets that cross a boundary."""
        starts = self._starts(windows)
        # A document that begins with the last target, at T, still cuts that target off.
        owner, positions = self.shard.document_starts(starts, starts + self.seq_len + 1)
        cuts = positions - starts[owner]
        labels[rows[owner], cuts - 1] = IGNORE
        flat, bounds = cuts.tolist(), np.searchsorted(owner, np.arange(len(rows) + 1)).tolist()
        for row, (begin, end) in zip(rows.tolist(), pairwise(bounds), strict=True):
            lengths[row] = _pieces(flat[begin:end], self.seq_len)

    def _starts(self, windows: np.ndarray) -> np.ndarray:
        return np.minimum(self.start + windows * self.seq_len, self.stop - self.seq_len - 1)

    def _moved_back(self) -> int:
        return len(self) * self.seq_len - (self.num_tokens - 1)


def _pieces(cuts: list[int], seq_len: int) -> list[int]:
    """Lengths of the documents of a row from the cuts inside it; the cut at T only ends the row."""
    bounds = [0, *cuts] if cuts and cuts[-1] == seq_len else [0, *cuts, seq_len]
    return [b - a for a, b in pairwise(bounds) if b > a]

"""What every pretraining step is fed with."""

from __future__ import annotations

import zlib
from dataclasses import dataclass

import torch
from torch import BoolTensor, LongTensor, Tensor

IGNORE = -100


@dataclass
class Batch:
    """Rows of packed documents.

    Args:
        tokens: input ids [B, T].
        labels: the next id at each position [B, T]; ``IGNORE`` = not trained on.
        document_lengths: per row the lengths of its documents, which sum to T; None = every row is one document.
        token_mask: [B, T], True = a real token; None = all are.
        first_row: place of the first row in the global batch.
        document_prefixes: per row, how many first tokens of the document before it each document goes on from; None =
            none does.
    """

    tokens: LongTensor | Tensor
    labels: LongTensor | Tensor
    document_lengths: list[list[int]] | None = None
    token_mask: BoolTensor | Tensor | None = None
    first_row: int = 0
    document_prefixes: list[list[int]] | None = None

    def to(self, device: torch.device | str, non_blocking: bool = False) -> Batch:
        """The batch on another device; Lightning calls this."""
        mask = self.token_mask
        return Batch(
            self.tokens.to(device, non_blocking=non_blocking),
            self.labels.to(device, non_blocking=non_blocking),
            self.document_lengths,
            None if mask is None else mask.to(device, non_blocking=non_blocking),
            self.first_row,
            self.document_prefixes,
        )

    def rows(self, start: int, stop: int) -> Batch:
        """Rows start .. stop - 1 (a micro-batch), without copying."""
        lengths, prefixes, mask = self.document_lengths, self.document_prefixes, self.token_mask
        return Batch(
            self.tokens[start:stop],
            self.labels[start:stop],
            None if lengths is None else lengths[start:stop],
            None if mask is None else mask[start:stop],
            self.first_row + start,
            None if prefixes is None else prefixes[start:stop],
        )

    @property
    def num_rows(self) -> int:
        """B."""
        return self.tokens.shape[0]

    @property
    def num_targets(self) -> int:
        """Positions that are trained on."""
        return int(self.counts()["targets"])

    @property
    def num_tokens(self) -> int:
        """Real tokens: those that are not padding."""
        return int(self.counts()["tokens"])

    def counts(self) -> dict[str, Tensor]:
        """``targets`` (positions trained on) and ``tokens`` (real ones) as int64 scalars on the device, unasked."""
        targets, mask = (self.labels != IGNORE).sum(), self.token_mask
        return {
            "targets": targets,
            "tokens": torch.full_like(targets, self.tokens.numel()) if mask is None else mask.sum(),
        }

    def split(self, rows: int) -> list[Batch]:
        """Micro-batches of at most ``rows`` rows, without copying."""
        return [self.rows(start, start + rows) for start in range(0, self.num_rows, rows)]

    def digest(self) -> int:
        """A sum over rows, so that shares add up to that of the whole step: CRC-32 of place, tokens, labels."""
        tokens, labels = (part.detach().cpu().contiguous().numpy() for part in (self.tokens, self.labels))
        total = 0
        for row in range(len(tokens)):
            place = (self.first_row + row).to_bytes(8, "little")
            total += zlib.crc32(labels[row].data, zlib.crc32(tokens[row].data, zlib.crc32(place)))
        return total

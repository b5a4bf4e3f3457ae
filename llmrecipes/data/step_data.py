"""What every DataModule here shares: one train batch is this rank's whole share of an optimizer step."""

from __future__ import annotations

from collections.abc import Iterator
from functools import cached_property
from typing import Any, Protocol

import lightning.pytorch as L
import numpy as np
import torch

from llmrecipes.data.batch import IGNORE, Batch
from llmrecipes.data.order import Order
from llmrecipes.data.tokenizer import Tokenizer
from llmrecipes.errors import UserError


class Source(Protocol):
    """An array of training samples: rows of the same length."""

    def __len__(self) -> int:
        """Rows of one epoch."""
        ...


class StepData(L.LightningDataModule):
    """Rows of several sources, blended by weight, in an order that depends on (seed, step) only.

    Subclasses open their sources in ``setup`` and then call :meth:`blend`; ``_collate`` makes batches of their rows.

    Args:
        seq_len: positions per row, T.
        micro_batch: rows that pass through the model at once.
        global_batch: rows per optimizer step over all data ranks.
        seed: of the data order; independent of the model's.
        tokenizer: folder of the tokenizer.
        valid_batches: at most so many batches of ``micro_batch`` rows per validation set, over all ranks together.
    """

    def __init__(
        self, seq_len: int, micro_batch: int, global_batch: int, seed: int, tokenizer: str | None, valid_batches: int
    ) -> None:
        super().__init__()
        self.seq_len = seq_len
        self.micro_batch = micro_batch
        self.global_batch = global_batch
        self.seed = seed
        self.tokenizer_folder = tokenizer
        self.valid_batches = valid_batches
        self.start_step = 0
        self.notes: list[str] = []
        self._train_sources: list[Any] = []
        self._valid_sources: dict[str, Any] = {}
        self._order: Order | None = None

    # ---- what a kind of data defines

    def fingerprint(self) -> dict[str, Any]:
        """All that decides which tokens step s sees; a checkpoint keeps it and a resume compares it."""
        raise NotImplementedError  # pragma: no cover - abstract

    def describe(self, max_steps: int | None = None) -> list[str]:
        """Lines for the log: size, share and epochs of each source, and the notes of the checks."""
        raise NotImplementedError  # pragma: no cover - abstract

    def _collate(self, sources: list[Any], source: np.ndarray, window: np.ndarray) -> Batch:
        """A batch of the rows ``window`` [B] of ``sources[source]``, ``source`` [B]."""
        raise NotImplementedError  # pragma: no cover - abstract

    # ---- batches

    def blend(self, train: list[Any], weights: list[float], valid: dict[str, Any]) -> None:
        """Take the sources; from here on there are batches."""
        self._train_sources, self._valid_sources = train, valid
        self._order = Order(self.seed, [len(source) for source in train], weights)

    def step_batch(self, step: int) -> Batch:
        """This rank's rows of optimizer step ``step``: its contiguous share of the step's ``global_batch`` samples."""
        assert self._order is not None, "setup() comes first"
        share = self.global_batch // self.data_ranks
        place = self.data_rank * share
        first = step * self.global_batch + place
        source, window = self._order.samples(first, first + share)
        batch = self._collate(self._train_sources, source, window)
        batch.first_row = place
        return batch

    def train_dataloader(self) -> TrainStream:
        """Batches of steps ``start_step``, ``start_step + 1``, ... without end."""
        return TrainStream(self)

    def val_dataloader(self) -> list[ValidSet]:
        """One set per domain, in the order of ``valid_names``."""
        return [ValidSet(self, source) for source in self._valid_sources.values()]

    @property
    def valid_names(self) -> list[str]:
        """Names of the validation sets."""
        return list(self._valid_sources)

    def blank(self, batch: Batch, rows: np.ndarray) -> None:
        """Leave nothing to be scored in ``rows``, a mask [B]."""
        batch.labels[torch.from_numpy(rows)] = IGNORE

    # ---- facts

    @property
    def data_rank(self) -> int:
        """Which share of each step is this process's."""
        return self._replica("rank", 0)

    @property
    def data_ranks(self) -> int:
        """How many processes share a step; tensor-parallel peers count once."""
        return self._replica("num_replicas", 1)

    def _replica(self, key: str, alone: int) -> int:
        strategy = getattr(self.trainer, "strategy", None)
        kwargs = getattr(strategy, "distributed_sampler_kwargs", None)
        return alone if kwargs is None else int(kwargs[key])

    @property
    def tokens_per_step(self) -> int:
        """Token slots of one optimizer step over all ranks."""
        return self.global_batch * self.seq_len

    @cached_property
    def tokenizer(self) -> Tokenizer:
        """The recipe's tokenizer.

        Raises:
            UserError: the recipe names none.
        """
        if self.tokenizer_folder is None:
            raise UserError("data.tokenizer: missing; text samples need the folder of the tokenizer")
        return Tokenizer(self.tokenizer_folder)

    # ---- checks

    def _size_problems(self) -> list[str]:
        problems = []
        for name in ("seq_len", "micro_batch", "global_batch", "valid_batches"):
            if getattr(self, name) < 1:
                problems.append(f"data.{name}: {getattr(self, name)} must be at least 1")
        rows = self.micro_batch * self.data_ranks
        if not problems and self.global_batch % rows:
            problems.append(
                f"data.global_batch: {self.global_batch} is not divisible by micro_batch x data ranks = "
                f"{self.micro_batch} x {self.data_ranks} = {rows}"
            )
        return problems

    def _weight_problems(self, train: dict[str, float], what: str) -> list[str]:
        if not train:
            return [f"data.train: empty; give at least one {what} and its weight"]
        return [
            f"data.train: the weight of {name} is {weight}; it must be above 0, or leave it out"
            for name, weight in train.items()
            if not (np.isfinite(weight) and weight > 0)
        ]

    @staticmethod
    def _raise(problems: list[str]) -> None:
        if problems:
            raise UserError(*problems)


class TrainStream:
    """The endless stream of this rank's train batches; a resume sets ``start_step`` and nothing else."""

    def __init__(self, data: StepData) -> None:
        self._data = data

    def __iter__(self) -> Iterator[Batch]:
        step = self._data.start_step
        while True:
            yield self._data.step_batch(step)
            step += 1


class ValidSet:
    """Fixed windows spread evenly over one validation source.

    The windows do not depend on the number of ranks; each rank takes a contiguous share, and all have equally many
    batches (collectives must match): a rank that is short repeats a window with no target in it.
    """

    def __init__(self, data: StepData, source: Source) -> None:
        self._data = data
        self._source = source
        self.num_windows = min(len(source), data.valid_batches * data.micro_batch)

    @property
    def _rows(self) -> int:
        return -(-self.num_windows // self._data.data_ranks)

    def __len__(self) -> int:
        return -(-self._rows // self._data.micro_batch)

    def __iter__(self) -> Iterator[Batch]:
        begin = self._data.data_rank * self._rows
        for first in range(0, self._rows, self._data.micro_batch):
            sample = begin + np.arange(first, min(first + self._data.micro_batch, self._rows))
            beyond = sample >= self.num_windows
            window = np.minimum(sample, self.num_windows - 1) * len(self._source) // self.num_windows
            batch = self._data._collate([self._source], np.zeros_like(window), window)
            self._data.blank(batch, beyond)
            yield batch

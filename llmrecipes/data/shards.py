"""Token shards on disk: Megatron's ``.bin`` (flat ids) and ``.idx`` (MMIDIDX version 1), read and written natively.

``.idx``: magic ``MMIDIDX\\0\\0``, u64 version, u8 dtype code, u64 number of sequences S, u64 number of document marks,
i32 lengths[S], i64 byte pointers[S], i64 marks: document d is the sequences marks[d] .. marks[d + 1] - 1.
"""

from __future__ import annotations

import contextlib
import mmap
import os
import struct
from array import array
from collections.abc import Sequence
from functools import cached_property
from pathlib import Path
from types import TracebackType

import numpy as np

from llmrecipes.data.manifest import BlockChecksum, Manifest, file_crc32
from llmrecipes.errors import UserError

MAGIC = b"MMIDIDX\x00\x00"
HEADER = struct.Struct("<9sQBQQ")
DTYPES: dict[int, np.dtype] = {
    1: np.dtype("u1"),
    3: np.dtype("<i2"),
    4: np.dtype("<i4"),
    5: np.dtype("<i8"),
    8: np.dtype("<u2"),
}
_CODES = {dtype: code for code, dtype in DTYPES.items()}


def dtype_for(vocab_size: int) -> np.dtype:
    """uint16 when every id fits, else 32 bits (Megatron has no code for uint32; ids below 2^31 are the same bytes)."""
    return np.dtype("<u2") if vocab_size <= 2**16 else np.dtype("<i4")


def shard_files(prefix: str | Path) -> tuple[Path, Path, Path]:
    """The three files of a shard: ``.bin``, ``.idx`` and the manifest ``.json``."""
    return Path(f"{prefix}.bin"), Path(f"{prefix}.idx"), Path(f"{prefix}.json")


class ShardWriter:
    """Writes one shard; it appears under its name only when complete, the manifest last.

    Use as a context manager: leaving it without an exception commits, an exception removes all that was written.

    Args:
        prefix: path without ``.bin``; its folder is created.
        vocab_size: number of ids of the tokenizer.
        eos_id: id that ends each document; the caller appends it.
        tokenizer_sha256, tokenizer: ``Tokenizer.sha256`` and ``Tokenizer.name``.
        sources, config_hash: recorded in the manifest.
    """

    def __init__(
        self,
        prefix: str | Path,
        vocab_size: int,
        *,
        eos_id: int,
        tokenizer_sha256: str,
        tokenizer: str = "",
        sources: Sequence[dict[str, str | int]] = (),
        config_hash: str = "",
    ) -> None:
        self.prefix = Path(prefix)
        self.vocab_size = vocab_size
        self.dtype = dtype_for(vocab_size)
        self.eos_id = eos_id
        self.num_tokens = 0
        self.num_characters = 0
        self.max_id = -1
        self._tokenizer_sha256, self._tokenizer, self._config_hash = tokenizer_sha256, tokenizer, config_hash
        self._sources = tuple(sources)
        self._lengths = array("i")
        self._checksum = BlockChecksum()
        # In the same folder, so that the final rename stays inside one file system; the pid keeps two writers apart.
        self._temporary = shard_files(self.prefix.with_name(f".{self.prefix.name}.{os.getpid()}.tmp"))

    @property
    def num_documents(self) -> int:
        """Documents added so far."""
        return len(self._lengths)

    def __enter__(self) -> ShardWriter:
        self.prefix.parent.mkdir(parents=True, exist_ok=True)
        self._file = self._temporary[0].open("wb", buffering=2**20)
        return self

    def add(self, ids: np.ndarray | Sequence[int], num_characters: int = 0) -> None:
        """Append one document of at least one id, EOS included.

        Raises:
            UserError: an id is negative or not below the vocabulary size.
        """
        self.extend(np.asarray(ids), np.array([len(ids)]), num_characters)

    def extend(self, tokens: np.ndarray, lengths: np.ndarray, num_characters: int = 0) -> None:
        """Append many documents at once.

        Args:
            tokens: ids of all, one after another, EOS included.
            lengths: of each document, at least one id, [D].
            num_characters: of all.

        Raises:
            UserError: an id is negative or not below the vocabulary size.
        """
        assert tokens.ndim == 1 and lengths.sum() == len(tokens), "documents are flat lists of ids"
        assert lengths.min(initial=1) > 0 and lengths.max(initial=1) < 2**31, "a document is a non-empty list of ids"
        if not len(tokens):
            return
        if int(tokens.min()) < 0 or int(tokens.max()) >= self.vocab_size:
            wrong = int(np.argmax((tokens < 0) | (tokens >= self.vocab_size)))
            document = self.num_documents + int(np.searchsorted(np.cumsum(lengths), wrong, side="right"))
            raise UserError(
                f"{self.prefix}: document {document} has id {tokens[wrong]}, the vocabulary has {self.vocab_size} ids"
            )
        data = tokens.astype(self.dtype, copy=False).tobytes()
        self._file.write(data)
        self._checksum.update(data)
        self._lengths.extend(lengths.tolist())
        self.num_tokens += len(tokens)
        self.num_characters += num_characters
        self.max_id = max(self.max_id, int(tokens.max()))

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        try:
            if kind is None:
                self._commit()
        finally:
            self._file.close()
            for path in self._temporary:
                path.unlink(missing_ok=True)

    def _commit(self) -> None:
        if not self._lengths:
            raise UserError(f"{self.prefix}: no document to write; is the input empty?")
        _sync(self._file.fileno(), self._file.flush)
        _, idx_tmp, json_tmp = self._temporary
        with idx_tmp.open("wb") as file:
            lengths = np.frombuffer(self._lengths, dtype=np.int32)
            file.write(HEADER.pack(MAGIC, 1, _CODES[self.dtype], len(lengths), len(lengths) + 1))
            ends = np.cumsum(lengths, dtype=np.int64) * self.dtype.itemsize
            pointers, marks = np.r_[0, ends[:-1]], np.arange(len(lengths) + 1)
            for part in (lengths.astype("<i4"), pointers.astype("<i8"), marks.astype("<i8")):
                part.tofile(file)
            _sync(file.fileno(), file.flush)
        self.manifest = Manifest(
            vocab_size=self.vocab_size,
            eos_id=self.eos_id,
            dtype=self.dtype.name,
            num_documents=self.num_documents,
            num_tokens=self.num_tokens,
            num_characters=self.num_characters,
            max_id=self.max_id,
            bin_crc32=self._checksum.blocks,
            idx_crc32=file_crc32(idx_tmp),
            sources=self._sources,
            tokenizer_sha256=self._tokenizer_sha256,
            tokenizer=self._tokenizer,
            config_hash=self._config_hash,
        )
        self.manifest.write(json_tmp)
        with json_tmp.open("rb") as file:
            os.fsync(file.fileno())
        final = shard_files(self.prefix)
        # An older shard of this name must not lend its manifest or index to the new ids, should we be killed here.
        for path in reversed(final[1:]):
            path.unlink(missing_ok=True)
        for source, target in zip(self._temporary, final, strict=True):
            source.replace(target)
        folder = os.open(self.prefix.parent, os.O_RDONLY)
        try:
            os.fsync(folder)
        finally:
            os.close(folder)


def _sync(descriptor: int, flush: object) -> None:
    assert callable(flush)
    flush()
    os.fsync(descriptor)


class IndexedShard:
    """Reads one shard through memory maps: opening takes the same few microseconds for any size.

    Token positions count ids from the start of the ``.bin``. A document may consist of several sequences.

    Args:
        prefix: path without ``.bin``.

    Raises:
        UserError: a file is missing, of another format, truncated, or the two do not belong together.
    """

    def __init__(self, prefix: str | Path) -> None:
        self.prefix = str(prefix)
        self.bin_path, self.idx_path, _ = shard_files(prefix)
        for path in (self.bin_path, self.idx_path):
            if not path.is_file():
                raise UserError(f"{path}: no such file; a shard is named by its path without .bin")
        index = _map(self.idx_path)
        num_sequences, num_marks, self.dtype = self._read_header(index)
        self._lengths, self._pointers, self._marks = self._sections(index, num_sequences, num_marks)
        self.num_documents = num_marks - 1
        self._check_ends(num_sequences)
        self._tokens = np.frombuffer(_map(self.bin_path), dtype=self.dtype)
        self._all_windows = np.empty((0, 0), dtype=self.dtype)

    def _read_header(self, index: mmap.mmap) -> tuple[int, int, np.dtype]:
        path = self.idx_path
        if index[:8] == b"TNTIDX\x00\x00":
            raise UserError(f"{path}: the old TNTIDX format (lazy or cached); write it again with --dataset-impl mmap")
        if index[: len(MAGIC)] != MAGIC[: len(index)]:
            raise UserError(f"{path}: not a Megatron index (it begins with {index[:9]!r}, not MMIDIDX)")
        if len(index) < HEADER.size:
            raise UserError(f"{path}: truncated: {len(index)} bytes, the header alone has {HEADER.size}")
        _, version, code, num_sequences, num_marks = HEADER.unpack(index[: HEADER.size])
        if version != 1:
            raise UserError(f"{path}: index version {version}, only version 1 is known")
        if code not in DTYPES:
            raise UserError(f"{path}: dtype code {code} is no type of token ids (known: {sorted(DTYPES)})")
        if num_sequences < 1 or num_marks < 2 or num_marks > num_sequences + 1:
            raise UserError(f"{path}: {num_sequences} sequences and {num_marks} document marks do not make a shard")
        return int(num_sequences), int(num_marks), DTYPES[code]

    def _sections(self, index: mmap.mmap, num_sequences: int, num_marks: int) -> tuple[np.ndarray, ...]:
        expected = HEADER.size + 12 * num_sequences + 8 * num_marks
        if len(index) == expected + num_sequences:
            raise UserError(f"{self.idx_path}: a multimodal index (one mode byte per sequence); only text is read")
        if len(index) != expected:
            kind = "truncated" if len(index) < expected else "too long"
            raise UserError(f"{self.idx_path}: {kind}: {len(index)} bytes, its header calls for {expected}")
        first, second = HEADER.size + 4 * num_sequences, HEADER.size + 12 * num_sequences
        # The sections are never aligned to 8 bytes, and numpy copies a whole unaligned array where it needs an aligned
        # one. As rows of 16-bit words they are aligned; _gather turns the rows it takes into numbers.
        return (
            np.frombuffer(index, "<u2", 2 * num_sequences, HEADER.size).reshape(-1, 2),
            np.frombuffer(index, "<u2", 4 * num_sequences, first).reshape(-1, 4),
            np.frombuffer(index, "<u2", 4 * num_marks, second).reshape(-1, 4),
        )

    def _check_ends(self, num_sequences: int) -> None:
        """Only first and last entries: a scan of the index would not be O(1)."""
        ends = np.array([0, num_sequences - 1])
        marks = _gather(self._marks, np.array([0, self.num_documents]), "<i8")
        pointers = _gather(self._pointers, ends, "<i8")
        if marks[0] != 0 or marks[1] != num_sequences or pointers[0] != 0:
            raise UserError(f"{self.idx_path}: damaged: its documents do not cover its {num_sequences} sequences")
        size = int(pointers[1]) + int(_gather(self._lengths, ends, "<i4")[1]) * self.dtype.itemsize
        actual = self.bin_path.stat().st_size
        if actual != size:
            kind = "truncated" if actual < size else "too long"
            raise UserError(f"{self.bin_path}: {kind}: {actual} bytes, its index calls for {size}")

    @property
    def num_tokens(self) -> int:
        """Ids in the ``.bin``."""
        return len(self._tokens)

    def document_positions(self, documents: np.ndarray) -> np.ndarray:
        """Token position at which each document begins, int64; ``num_documents`` gives the end of the shard."""
        first = _gather(self._marks, documents, "<i8")
        last = len(self._pointers) - 1
        positions = _gather(self._pointers, np.minimum(first, last), "<i8") // self.dtype.itemsize
        return np.where(first > last, self.num_tokens, positions)

    def document_range(self, first: int, stop: int) -> tuple[int, int]:
        """Token range of documents ``first`` .. ``stop - 1``."""
        assert 0 <= first <= stop <= self.num_documents
        start, end = self.document_positions(np.array([first, stop]))
        return int(start), int(end)

    def documents_at(self, positions: np.ndarray) -> np.ndarray:
        """The document that holds each token position, [N] to [N] int64.

        A binary search of all positions at once: log2(documents) gathers, no pass over the index.
        """
        stride, fences = self._fences
        offsets = positions * self.dtype.itemsize
        document = (np.searchsorted(fences, positions, side="right") - 1) * stride
        last = len(self._pointers) - 1
        step = stride >> 1
        while step:
            candidate = np.minimum(document + step, self.num_documents)
            first = _gather(self._marks, candidate, "<i8")
            begins = _gather(self._pointers, np.minimum(first, last), "<i8")
            document = np.where((begins <= offsets) & (first <= last), candidate, document)
            step >>= 1
        return document

    @cached_property
    def _fences(self) -> tuple[int, np.ndarray]:
        """Positions of every ``stride``-th document, at most 1,024: the top of the search, kept in memory."""
        stride = 1
        while self.num_documents > 1024 * stride:
            stride *= 2
        return stride, self.document_positions(np.arange(0, self.num_documents, stride))

    def document_starts(self, starts: np.ndarray, stops: np.ndarray) -> tuple[np.ndarray, np.ndarray]:
        """Where documents begin inside windows: positions p with start < p < stop.

        Args:
            starts, stops: token positions [N].

        Returns:
            Window (0 .. N - 1) and position of each such document, rising, both int64.
        """
        first = self.documents_at(starts) + 1
        columns = 8
        while True:  # a window rarely holds many documents: look a few ahead, and further only if need be
            documents = np.minimum(first[:, None] + np.arange(columns), self.num_documents)
            positions = self.document_positions(documents)
            if (positions[:, -1] >= stops).all():
                break
            columns *= 4
        inside = positions < stops[:, None]
        return np.nonzero(inside)[0], positions[inside]

    def document_starts_in(self, start: int, stop: int) -> np.ndarray:
        """Token positions p, start < p < stop, at which a document begins, int64, rising."""
        return self.document_starts(np.array([start]), np.array([stop]))[1]

    def read(self, start: int, stop: int) -> np.ndarray:
        """Token ids at positions start .. stop - 1, in the shard's dtype; a view of the file."""
        assert 0 <= start <= stop <= self.num_tokens
        return self._tokens[start:stop]

    def windows(self, starts: np.ndarray, length: int) -> np.ndarray:
        """Copies ``length`` ids from each position >= 0: [N] to [N, length] in the shard's dtype."""
        if self._all_windows.shape[1] != length:  # making the view takes longer than reading some rows through it
            step = self.dtype.itemsize
            shape = (self.num_tokens - length + 1, length)
            self._all_windows = np.lib.stride_tricks.as_strided(self._tokens, shape, (step, step), writeable=False)
        return self._all_windows[starts]


def _gather(rows: np.ndarray, index: np.ndarray, dtype: str) -> np.ndarray:
    return rows[index].view(dtype)[..., 0]


def _map(path: Path) -> mmap.mmap:
    with path.open("rb") as file:
        if os.fstat(file.fileno()).st_size == 0:
            raise UserError(f"{path}: empty")
        mapped = mmap.mmap(file.fileno(), 0, access=mmap.ACCESS_READ)
    with contextlib.suppress(AttributeError, OSError):  # windows are read in random order: read-ahead is waste
        mapped.madvise(mmap.MADV_RANDOM)
    return mapped

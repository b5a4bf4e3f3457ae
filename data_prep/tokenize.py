"""`llmrecipes data tokenize`: documents to token shards, in parallel, restartable, the same bytes however it is run."""

from __future__ import annotations

import functools
import hashlib
import itertools
import json
import time
from collections import deque
from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Any

import numpy as np

from data_prep.jsonl import check_inputs, chunks, fingerprint, input_size, parse, stem
from data_prep.parts import Part, Parts
from llmrecipes.errors import UserError

if TYPE_CHECKING:
    from concurrent.futures import Executor, Future

    from tqdm import tqdm

    from data_prep.jsonl import Chunk
    from llmrecipes.data.manifest import Manifest
    from llmrecipes.data.tokenizer import Tokenizer

FORMAT = 1  # counts up when the same options would give other bytes


def tokenize(
    input: list[str],
    tokenizer: str,
    output: str | None = None,
    output_dir: str | None = None,
    workers: int = 2,
    field: str = "text",
    chunk_bytes: int = 8 << 20,
    overwrite: bool = False,
) -> None:
    """Turns documents into Megatron-compatible shards: PREFIX.bin, PREFIX.idx and the manifest PREFIX.json.

    Every document ends with the tokenizer's end-of-text piece; the trainer counts on it.
    Ids are stored in 16 bits when the vocabulary fits, else as int32: Megatron's format has no code for uint32, and no
    vocabulary needs the 32nd bit. A run that was stopped, by Ctrl-C or kill -9, goes on where it was when it is started
    again; nothing appears under the final name before it is complete. The bytes do not depend on `workers`.

    Args:
        input: JSONL files (plain, .gz, .zst) or Hugging Face dataset folders.
        tokenizer: folder with tokenizer.model or tokenizer.json.
        output: prefix of the one shard that all inputs make, in their order.
        output_dir: instead of --output: one shard for each input, named by the file without its endings.
        workers: processes that tokenize; one core each.
        field: name of the field that holds the text.
        chunk_bytes: size of the parts that are tokenized, and kept for a restart, as a whole.
        overwrite: replace shards, or begun ones, that were made with other options or inputs.
    """
    from llmrecipes.data.tokenizer import Tokenizer

    paths = check_inputs(input)
    jobs = _jobs(paths, output, output_dir)
    if workers < 1 or chunk_bytes < 1:
        raise UserError(f"--workers {workers}, --chunk_bytes {chunk_bytes}: both must be positive")
    pieces = Tokenizer(tokenizer)
    options = Options(tokenizer, pieces.sha256, field, pieces.eos_id, chunk_bytes)
    for prefix, sources in jobs:
        _tokenize_one(prefix, sources, pieces, options, workers, overwrite)


@dataclass(frozen=True)
class Options:
    """What decides the bytes of a shard, beside its inputs."""

    tokenizer: str
    tokenizer_sha256: str
    field: str
    eos_id: int
    chunk_bytes: int

    def key(self, input_hashes: list[str]) -> str:
        """One hash for options and inputs; folder names do not count, contents do."""
        content = [FORMAT, self.tokenizer_sha256, self.field, self.eos_id, self.chunk_bytes, input_hashes]
        return hashlib.sha256(json.dumps(content).encode()).hexdigest()[:32]


def _jobs(paths: list[Path], output: str | None, output_dir: str | None) -> list[tuple[Path, list[Path]]]:
    """(prefix, inputs) of every shard to make."""
    if (output is None) == (output_dir is None):
        raise UserError("say either --output PREFIX (one shard of all inputs) or --output_dir DIR (one shard an input)")
    if output is not None:
        if output.endswith("/") or Path(output).is_dir():
            example = Path(output) / "ja"
            raise UserError(f"--output {output}: is a folder; name a prefix such as {example}, or use --output_dir")
        return [(Path(output), paths)]
    by_name: dict[str, list[Path]] = {}
    for path in paths:
        by_name.setdefault(stem(path), []).append(path)
    clashes = [
        f"--output_dir: {' and '.join(map(str, same))} would both become {name!r}; rename one, or use --output"
        for name, same in by_name.items()
        if len(same) > 1
    ]
    if clashes:
        raise UserError(*clashes)
    return [(Path(str(output_dir)) / name, same) for name, same in by_name.items()]


def _tokenize_one(
    prefix: Path, sources: list[Path], pieces: Tokenizer, options: Options, workers: int, overwrite: bool
) -> None:
    hashes = [fingerprint(path) for path in sources]
    key = options.key(hashes)
    if (there := _existing(prefix, key, overwrite)) is not None:
        print(f"{prefix}: already there: {there.num_documents:,} documents, {there.num_tokens:,} tokens")
        return
    from llmrecipes.data.shards import ShardWriter, dtype_for

    started, num_empty, num_bytes = time.perf_counter(), 0, 0
    with Parts(prefix, key, overwrite) as parts:
        num_reused = parts.num_done()
        num_parts = _encode_all(sources, parts, options, dtype_for(pieces.vocab_size).str, workers)
        with ShardWriter(
            prefix,
            pieces.vocab_size,
            eos_id=pieces.eos_id,
            tokenizer_sha256=pieces.sha256,
            tokenizer=pieces.name,
            sources=[{"name": path.name, "sha256": sha} for path, sha in zip(sources, hashes, strict=True)],
            config_hash=key,
        ) as writer:
            for part in parts.read(num_parts):
                writer.extend(part.tokens, part.lengths, int(part.characters.sum()))
                num_empty, num_bytes = num_empty + part.num_empty, num_bytes + part.num_bytes
        parts.remove()
    print(f"{prefix}: " + _summary(writer.manifest, num_empty, num_bytes, time.perf_counter() - started, num_reused))


def _existing(prefix: Path, key: str, overwrite: bool) -> Manifest | None:
    """The manifest of a finished shard made of the same inputs with the same options, or None.

    Raises:
        UserError: there is another shard of this name, and it may not be overwritten.
    """
    from llmrecipes.data.manifest import Manifest
    from llmrecipes.data.shards import IndexedShard, shard_files

    if overwrite or not any(path.exists() for path in shard_files(prefix)[:2]):
        return None
    manifest = Manifest.read(prefix)
    if manifest is None or manifest.config_hash != key:
        what = "was not made by this command" if manifest is None else "was made of other inputs or with other options"
        raise UserError(f"{prefix}.bin: exists and {what}; choose another --output, or say --overwrite true")
    IndexedShard(prefix)  # says what is wrong if it is truncated
    return manifest


def _encode_all(sources: list[Path], parts: Parts, options: Options, dtype: str, workers: int) -> int:
    """Makes every part that is not there yet, a bounded number at a time, and returns how many parts there are."""
    from concurrent.futures.process import BrokenProcessPool

    from tqdm import tqdm

    total, num_parts = sum(input_size(path) for path in sources), 0
    pending: deque[tuple[Future[None], int]] = deque()
    with (
        _executor(workers) as executor,
        tqdm(total=total, unit="B", unit_scale=True, desc=parts.prefix.name, leave=False, disable=None) as bar,
    ):
        try:
            for chunk, advance in _all_chunks(sources, options):
                if parts.has(num_parts):
                    bar.update(advance)
                else:
                    pending.append(
                        (executor.submit(encode_part, chunk, parts.file(num_parts), options, dtype), advance)
                    )
                num_parts += 1
                while len(pending) > 2 * workers:
                    _wait_for_first(pending, bar)
            while pending:
                _wait_for_first(pending, bar)
        except BrokenProcessPool:
            raise UserError(
                f"{parts.prefix}: a worker process died, perhaps for want of memory; run the same command again with "
                f"fewer --workers than {workers}: finished parts are kept"
            ) from None
        except BaseException:
            executor.shutdown(cancel_futures=True)
            raise
    return num_parts


def encode_part(chunk: Chunk, file: Path, options: Options, dtype: str) -> None:
    """Tokenizes one chunk into one part file, in whichever process it is called.

    Raises:
        UserError: a broken line (see `parse`).
    """
    found = parse(chunk, options.field)
    documents = _loaded(options.tokenizer).encode_batch(found.texts)
    for ids in documents:
        ids.append(options.eos_id)
    Part(
        tokens=np.fromiter(itertools.chain.from_iterable(documents), dtype=dtype),
        lengths=np.array([len(ids) for ids in documents], dtype=np.int64),
        characters=np.array([len(text) for text in found.texts], dtype=np.int64),
        num_bytes=sum(len(text.encode()) for text in found.texts),
        num_empty=found.num_empty,
    ).save(file)


@functools.cache
def _loaded(folder: str) -> Tokenizer:
    """The tokenizer, loaded once in each process."""
    from llmrecipes.data.tokenizer import Tokenizer

    return Tokenizer(folder)


def _all_chunks(sources: list[Path], options: Options) -> Iterator[tuple[Chunk, int]]:
    """Every chunk of every input, and how far it moves the progress bar."""
    for path in sources:
        before = 0
        for chunk in chunks(path, options.field, options.chunk_bytes):
            yield chunk, chunk.position - before
            before = chunk.position


def _wait_for_first(pending: deque[tuple[Future[None], int]], bar: tqdm[Any]) -> None:
    future, advance = pending.popleft()
    future.result()
    bar.update(advance)


def _executor(workers: int) -> Executor:
    """Processes, started afresh (a fork of a process with threads may hang); for one worker a thread does."""
    import multiprocessing
    from concurrent.futures import ProcessPoolExecutor, ThreadPoolExecutor

    if workers == 1:
        return ThreadPoolExecutor(1)
    return ProcessPoolExecutor(workers, multiprocessing.get_context("spawn"), initializer=_start_worker)


def _start_worker() -> None:
    """A worker leaves Ctrl-C to its parent, and never outlives it, however the parent dies."""
    import multiprocessing
    import os
    import signal
    import threading

    signal.signal(signal.SIGINT, signal.SIG_IGN)
    parent = multiprocessing.parent_process()
    assert parent is not None

    def end_with_parent() -> None:
        parent.join()
        os._exit(1)

    threading.Thread(target=end_with_parent, daemon=True).start()


def _summary(manifest: Manifest, num_empty: int, num_bytes: int, seconds: float, num_reused: int) -> str:
    rate = manifest.num_characters / (manifest.num_tokens or 1)
    text = f"{manifest.num_documents:,} documents, {manifest.num_tokens:,} tokens, {rate:.2f} characters/token"
    if num_reused:
        text += f", {num_reused} parts of an earlier run used"
    else:
        text += f", {num_bytes / 1e6 / seconds:.1f} MB/s"
    return text + (f", {num_empty:,} empty documents left out" if num_empty else "")

"""A stage that looks at one document after another: keeps it, changes it or rejects it, and says why."""

from __future__ import annotations

import functools
from collections.abc import Callable
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any, TypeVar

from data_prep.frame.config import StageConfig
from data_prep.frame.records import Broken, Document, JsonlWriter, read_documents, write_json
from data_prep.frame.shards import (
    Advance,
    Shard,
    cpu_seconds,
    find_shards,
    open_output,
    result_file,
    run_shards,
    sha256_of_results,
)
from data_prep.frame.tally import Flow, Tally

BATCH_CHARACTERS = 1 << 19


@dataclass(slots=True)
class Verdict:
    """What becomes of one document.

    Attributes:
        text: what is kept of it; of a rejected one, what is shown as a sample.
        reason: why it is rejected, in one word; None keeps it.
        trimmed: characters that each rule cut out of it (negative: put in).
        added: fields to add to its record.
        notes: what the manifest should count about it.
    """

    text: str
    reason: str | None = None
    trimmed: dict[str, int] = field(default_factory=dict)
    added: dict[str, Any] = field(default_factory=dict)
    notes: tuple[str, ...] = ()


AnyConfig = TypeVar("AnyConfig", bound=StageConfig)
Judge = Callable[[list[Document]], list[Verdict]]


def run_map(stage: str, config: AnyConfig, make: Callable[[AnyConfig, Shard], Judge]) -> Tally | None:
    """Runs a stage over all its files and writes the manifest once all are done.

    Args:
        stage: its name.
        config: its recipe.
        make: module-level function that makes the judge of a file's documents.

    Returns:
        The counts, or None when files of other tasks are still to be done.
    """
    shards = find_shards(config.input)
    return map_pass(stage, config, make, shards, open_output(stage, config, shards), {})


def map_pass(
    stage: str,
    config: AnyConfig,
    make: Callable[[AnyConfig, Shard], Judge],
    shards: list[Shard],
    output: Path,
    more: dict[str, Any],
) -> Tally | None:
    """As :func:`run_map`, for a stage with passes before this one; `more` goes into the manifest."""
    counts = run_shards(functools.partial(_map_file, make), stage, config, shards, output)
    if counts is None:
        return None
    tally = Tally()
    for shard in shards:
        tally.merge(Tally.from_json(counts[shard.name]), config.samples)
    write_manifest(stage, config, shards, output, tally, more)
    return tally


def write_manifest(
    stage: str, config: StageConfig, shards: list[Shard], output: Path, tally: Tally, more: dict[str, Any]
) -> None:
    """Checks that the counts add up, writes `<output>/manifest.json` and prints the table."""
    from data_prep.frame.config import content

    tally.check()
    manifest = {
        "stage": stage,
        "recipe": content(config),
        "inputs": [shard.name for shard in shards],
        **more,
        **tally.to_json(),
        "outputs": sha256_of_results(output),
    }
    write_json(output / "manifest.json", manifest)
    print(tally.table(tokens=config.tokenizer is not None))
    seconds = cpu_seconds(output)
    print(f"{output}: done, {tally.read.num_bytes / 1e6 / max(seconds, 1e-3):.1f} MB per CPU-second")


def _map_file(
    make: Callable[[Any, Shard], Judge], config: StageConfig, shard: Shard, output: Path, advance: Advance
) -> dict[str, Any]:
    """One file: reads, judges in batches, writes what is kept."""
    judge, count = make(config, shard), token_counter(config.tokenizer)
    tally, batch, size = Tally(), list[Document](), 0
    with JsonlWriter(result_file(output, shard, config.format), config.format) as writer:

        def judge_batch() -> None:
            verdicts = judge(batch)
            assert len(verdicts) == len(batch)
            for document, verdict in zip(batch, verdicts, strict=True):
                _settle(document, verdict, config, tally, writer, count)

        for document in read_documents(
            shard.path, config.field, config.max_document_mb * 1e6, advance, config.reads_conversations
        ):
            if isinstance(document, Broken):
                count_broken(document, shard, tally, config.samples)
                continue
            batch.append(document)
            size += len(document.text)
            if size >= BATCH_CHARACTERS:
                judge_batch()
                batch, size = [], 0
        judge_batch()
    tally.check()
    return tally.to_json()


def count_broken(broken: Broken, shard: Shard, tally: Tally, num_samples: int) -> None:
    """Counts a line that is no document; an empty one is no mistake worth naming."""
    flow = Flow(documents=1, num_bytes=broken.num_bytes)
    tally.read.add(flow)
    tally.reject(broken.reason, flow, "", num_samples)
    if broken.reason != "empty":
        tally.problem(f"{shard.path}:{broken.line}: {broken.detail}")


def _settle(
    document: Document,
    verdict: Verdict,
    config: StageConfig,
    tally: Tally,
    writer: JsonlWriter,
    count: Callable[[str], int],
) -> None:
    before = Flow(1, len(document.text), document.num_bytes, count(document.text))
    tally.read.add(before)
    for note in verdict.notes:
        tally.notes[note] = tally.notes.get(note, 0) + 1
    if verdict.reason is not None:
        tally.reject(verdict.reason, before, verdict.text or document.text, config.samples)
        return
    if verdict.text is document.text or verdict.text == document.text:
        tally.kept.add(before)
    else:
        tally.kept.add(Flow(1, len(verdict.text), len(verdict.text.encode()), count(verdict.text)))
    for rule, characters in verdict.trimmed.items():
        tally.trim(rule, characters)
    if verdict.text == document.text and not verdict.added:
        writer.write_line(document.raw)
        return
    changed = {} if verdict.text == document.text else {config.field: verdict.text}
    writer.write({**document.record, **changed, **verdict.added})


def token_counter(folder: str | None) -> Callable[[str], int]:
    """Counts tokens, or 0 where no tokenizer is named."""
    if folder is None:
        return lambda _: 0
    from llmrecipes.data.tokenizer import Tokenizer

    tokenizer = Tokenizer(folder)
    return lambda text: len(tokenizer.encode(text))

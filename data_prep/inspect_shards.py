"""`llmrecipes data stats` and `llmrecipes data inspect`: what is in a shard, for people."""

from __future__ import annotations

import sys
from typing import TYPE_CHECKING

from llmrecipes.errors import UserError

if TYPE_CHECKING:
    from collections.abc import Sequence

    from llmrecipes.data.tokenizer import Tokenizer

COLOURS = ("\x1b[30;46m", "\x1b[30;43m")  # black on cyan, black on yellow
RESET = "\x1b[0m"


def stats(shards: list[str]) -> None:
    """Prints what shards hold, and verifies every byte of them.

    Args:
        shards: prefixes (paths, with or without .bin).
    """
    from tqdm import tqdm

    from llmrecipes.data.manifest import Manifest
    from llmrecipes.data.shards import IndexedShard
    from llmrecipes.data.verify import verify

    # dir/*.bin is the natural way to name all shards of a folder
    shards = [prefix.removesuffix(".bin") for prefix in shards]
    width = max((len(prefix) for prefix in shards), default=0)
    print(
        f"{'shard':<{width}} {'documents':>12} {'tokens':>15} {'tokens/doc':>11} {'chars/token':>12}  vocabulary, dtype"
    )
    notes, problems, total_documents, total_tokens = list[str](), list[str](), 0, 0
    for prefix in tqdm(shards, desc="verifying", leave=False, disable=None):
        try:
            notes += verify(prefix, full=True)
            shard, manifest = IndexedShard(prefix), Manifest.read(prefix)
        except UserError as error:
            problems += error.problems
            continue
        rate = f"{manifest.num_characters / manifest.num_tokens:.2f}" if manifest and manifest.num_characters else "-"
        of = f"{manifest.vocab_size:,} of {manifest.tokenizer or 'unnamed'}" if manifest else "unknown"
        mean = shard.num_tokens / shard.num_documents
        counts = f"{shard.num_documents:>12,} {shard.num_tokens:>15,} {mean:>11,.1f} {rate:>12}"
        print(f"{prefix:<{width}} {counts}  {of}, {shard.dtype.name}")
        total_documents += shard.num_documents
        total_tokens += shard.num_tokens
    print(f"{'all':<{width}} {total_documents:>12,} {total_tokens:>15,}")
    print("\n".join(notes)) if notes else None
    if problems:
        raise UserError(*problems)
    print("verified: sizes, checksums, ends of documents")


def inspect(
    shard: str | None = None,
    tokenizer: str | None = None,
    documents: list[int] | None = None,
    start: int | None = None,
    length: int = 200,
    count: int = 3,
    seed: int = 0,
    ids: bool = True,
    recipe: list[str] | None = None,
    step: int = 0,
) -> None:
    """Prints documents, or one window of tokens, of a shard; or what a recipe trains on, with the part the loss sees.

    Neighbouring pieces of a shard differ in colour on a terminal.

    Args:
        shard: prefix (path without .bin).
        tokenizer: folder of the tokenizer that made it.
        documents: numbers of the documents to show; without them `count` are drawn.
        start: show the window of tokens from this position instead of documents.
        length: at most so many tokens of a document, or of the window.
        count: how many documents to draw, or to show of a recipe.
        seed: chooses the documents.
        ids: print the token ids below the text; those that are trained on have a star.
        recipe: show the rows of this recipe instead of a shard; several files are merged as by `fit`.
        step: which optimizer step of the recipe, from 0.
    """
    if recipe is not None:
        if shard is not None or tokenizer is not None:
            raise UserError("--recipe names its data and tokenizer itself; leave --shard and --tokenizer out")
        from data_prep.inspect_recipe import inspect_recipe

        inspect_recipe(recipe, step, count, ids)
        return
    if shard is None or tokenizer is None:
        raise UserError("data inspect: give --shard and --tokenizer, or --recipe")
    from random import Random

    from llmrecipes.data.manifest import Manifest
    from llmrecipes.data.shards import IndexedShard
    from llmrecipes.data.tokenizer import Tokenizer

    data, pieces = IndexedShard(shard), Tokenizer(tokenizer)
    manifest = Manifest.read(shard)
    if manifest is not None and manifest.tokenizer_sha256 != pieces.sha256:
        raise UserError(f"{shard}: made with another tokenizer ({manifest.tokenizer}) than {tokenizer}; name that one")
    if start is not None:
        if not 0 <= start < data.num_tokens:
            raise UserError(f"--start {start}: {shard} has tokens 0 to {data.num_tokens - 1:,}")
        _show(f"tokens {start:,} on", data.read(start, min(start + length, data.num_tokens)).tolist(), pieces, ids)
        return
    chosen = documents or sorted(Random(seed).sample(range(data.num_documents), min(count, data.num_documents)))
    if outside := [number for number in chosen if not 0 <= number < data.num_documents]:
        raise UserError(f"--documents {outside}: {shard} has documents 0 to {data.num_documents - 1:,}")
    for number in chosen:
        first, end = data.document_range(number, number + 1)
        title = f"document {number:,}: {end - first:,} tokens" + (
            f", the first {length}" if end - first > length else ""
        )
        _show(title, data.read(first, min(end, first + length)).tolist(), pieces, ids)


def piece_boundaries(ids: Sequence[int], pieces: Tokenizer, colour: bool) -> str:
    """The text with its pieces in two colours in turn, or with `|` between them.

    Bytes of one character are shown together: a part of a character is no text. Spaces and newlines stay what they are.
    """
    spans, pending = list[str](), list[int]()
    for token in ids:
        pending.append(token)
        text = pieces.decode(pending)
        if "\ufffd" in text and len(pending) < 4:  # an unfinished character
            continue
        spans.append(text or pieces.piece(token))
        pending = []
    if pending:
        spans.append(pieces.decode(pending))
    if not colour:
        return "|".join(spans)
    return "".join(f"{COLOURS[number % 2]}{span}{RESET}" for number, span in enumerate(spans))


def _show(title: str, tokens: list[int], pieces: Tokenizer, ids: bool) -> None:
    print(f"--- {title}")
    print(piece_boundaries(tokens, pieces, sys.stdout.isatty()))
    if ids:
        print(" ".join(map(str, tokens)))
    print()

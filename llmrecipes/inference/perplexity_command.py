"""``llmrecipes perplexity``: opens the models, reads the texts, prints what they cost."""

from __future__ import annotations

import json
import sys
from argparse import Namespace
from dataclasses import dataclass
from typing import Any

from llmrecipes.errors import UserError
from llmrecipes.inference.opened import Opened, open_model
from llmrecipes.inference.perplexity import Score, score
from llmrecipes.inference.report import side_by_side, table
from llmrecipes.inference.texts import Document, read_documents

DEFAULT_WINDOW = 1024


@dataclass(frozen=True)
class Result:
    """What one model made of the texts.

    Attributes:
        name: the model's folder.
        window, stride: how long texts were cut.
        texts: the score of each text. corpora: of each corpus, and of all.
    """

    name: str
    window: int
    stride: int
    texts: list[Score]
    corpora: list[Score]

    def as_dict(self, per_text: bool) -> dict[str, Any]:
        """For JSON."""
        texts = {"texts": [score.as_dict() for score in self.texts]} if per_text else {}
        corpora = [score.as_dict() for score in self.corpora]
        return {"model": self.name, "window": self.window, "stride": self.stride, **texts, "corpora": corpora}


def run(args: Namespace) -> int:
    """The command, from its parsed options."""
    documents = list(read_documents(args.text, args.input, args.field, args.max_documents))
    results = [
        _result(folder, tokenizer, args, documents)  # one model in memory at a time
        for folder, tokenizer in zip(args.models, _tokenizers(args), strict=True)
    ]
    per_text = args.per_text or not args.input
    if args.json:
        print(json.dumps({"models": [result.as_dict(per_text) for result in results]}, ensure_ascii=False))
        return 0
    for result in results:
        print(f"{result.name}  (windows of {result.window} tokens, stride {result.stride})")
        print(table([*(result.texts if per_text else []), *result.corpora]) + "\n")
    if len(results) == 2:
        first, second = ([*(result.texts if per_text else []), *result.corpora] for result in results)
        print(side_by_side((results[0].name, results[1].name), first, second))
    return 0


def _tokenizers(args: Namespace) -> list[str | None]:
    given = args.tokenizer or [None] * len(args.models)
    if len(given) != len(args.models):
        raise UserError(f"--tokenizer: give one for each of the {len(args.models)} models, or none")
    return list(given)


def _result(folder: str, tokenizer: str | None, args: Namespace, documents: list[Document]) -> Result:
    opened = open_model(folder, args.dtype, tokenizer)
    size, stride = window_of(opened.name, opened.max_seq_len, opened.hard_limit, args.window, args.stride)
    scores = _measure(opened, documents, size, stride)
    return Result(opened.name, size, stride, scores, corpora(documents, scores))


def window_of(
    name: str, limit: int | None, hard_limit: bool, window: int | None, stride: int | None
) -> tuple[int, int]:
    """Size and stride of a model's windows.

    Args:
        name: of the model, for messages.
        limit: longest text it was made for; the default size, up to 1024.
        hard_limit: whether it can read no longer one.
        window, stride: as given, or None; the default stride is half a window.

    Raises:
        UserError: they are impossible.
    """
    size = window if window is not None else min(limit or DEFAULT_WINDOW, DEFAULT_WINDOW)
    if hard_limit and limit is not None and size > limit:
        raise UserError(f"--window {size}: {name} has positions for {limit} tokens only")
    if size < 2:
        raise UserError(f"--window {size}: must be 2 or more")
    step = stride if stride is not None else size // 2
    if not 1 <= step < size:
        raise UserError(f"--stride {step}: must be at least 1 and less than the window of {size} ({name})")
    return size, step


def _measure(opened: Opened, documents: list[Document], size: int, stride: int) -> list[Score]:
    scores = []
    shown = sys.stderr.isatty()
    for found in score(opened.model, opened.codec, documents, size, stride, opened.vocab_size):
        scores.append(found)
        if shown:
            print(f"\r{opened.name}: {len(scores)}/{len(documents)} texts", end="", file=sys.stderr, flush=True)
    if shown:
        print(file=sys.stderr)
    return scores


def corpora(documents: list[Document], scores: list[Score]) -> list[Score]:
    """The sum of each corpus in order, and of all when there are several."""
    sums: dict[str, Score] = {}
    for document, found in zip(documents, scores, strict=True):
        sums[document.corpus] = sums.get(document.corpus, Score(document.corpus)) + found
    several = list(sums.values())
    return [*several, sum(several, Score("all"))] if len(several) > 1 else several

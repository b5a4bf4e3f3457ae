"""How well a model predicts texts: per token, per character and per byte."""

from __future__ import annotations

import math
from collections.abc import Callable, Iterable, Iterator
from dataclasses import dataclass, replace

import torch
from torch import Tensor

from llmrecipes.inference.codec import Codec
from llmrecipes.inference.texts import Document
from llmrecipes.inference.windows import Window, windows
from llmrecipes.losses import linear_cross_entropy
from llmrecipes.models import Decoder, DecoderOutput

TOKENS_AT_ONCE = 4096  # windows are read side by side up to this many


@dataclass(frozen=True)
class Score:
    """The cost of some text.

    Attributes:
        name: of the text or corpus.
        nats: sum of -ln p of the scored tokens.
        tokens: how many were scored. characters, num_bytes: what they stand for (bytes of UTF-8).
        texts: how many documents.
    """

    name: str
    nats: float = 0.0
    tokens: int = 0
    characters: int = 0
    num_bytes: int = 0
    texts: int = 0

    def __add__(self, other: Score) -> Score:
        return Score(
            self.name,
            self.nats + other.nats,
            self.tokens + other.tokens,
            self.characters + other.characters,
            self.num_bytes + other.num_bytes,
            self.texts + other.texts,
        )

    @property
    def per_token(self) -> float:
        """Perplexity per token, ``exp(nats / tokens)``: comparable for one tokenizer only."""
        return _exp(self.nats, self.tokens)

    @property
    def per_character(self) -> float:
        """Perplexity per character (Unicode code point)."""
        return _exp(self.nats, self.characters)

    @property
    def bits_per_byte(self) -> float:
        """Bits per byte of UTF-8: comparable for any two models."""
        return self.nats / self.num_bytes / math.log(2) if self.num_bytes else math.nan

    def as_dict(self) -> dict[str, str | float | int | None]:
        """For JSON: what was counted and what follows from it; null where nothing was scored."""
        measures = {
            "perplexity_per_token": self.per_token,
            "perplexity_per_character": self.per_character,
            "bits_per_byte": self.bits_per_byte,
        }
        return {
            "name": self.name,
            "texts": self.texts,
            "tokens": self.tokens,
            "characters": self.characters,
            "bytes": self.num_bytes,
            "nats": self.nats,
            **{key: value if math.isfinite(value) else None for key, value in measures.items()},
        }


def _exp(nats: float, count: int) -> float:
    if count == 0:
        return math.nan
    return math.exp(nats / count) if nats / count < 700 else math.inf


@dataclass(frozen=True)
class _Part:
    """A window of a document, with its tokens."""

    document: int
    window: Window
    tokens: list[int]


def score(
    model: Decoder,
    codec: Codec,
    texts: Iterable[Document],
    size: int,
    stride: int,
    vocab_size: int | None = None,
    listener: Callable[[DecoderOutput], object] | None = None,
) -> Iterator[Score]:
    """The score of every document, in order; documents do not see each other.

    The first id of a document is never scored, having nothing before it. Where the tokenizer begins texts with a piece
    of its own (as Llama's), that piece is it and the whole text is scored; otherwise the characters of the first token
    are left out of the counts too.

    Args:
        model: the decoder.
        codec: its tokenizer.
        texts: documents.
        size, stride: see :func:`~llmrecipes.inference.windows.windows`.
        vocab_size: ids that exist; later rows of the output layer only pad it. None = all rows.
        listener: called with what the model gives, such as where its routers send the tokens.
    """
    waiting: list[Score] = []  # in order, the first is document number `done`
    parts: list[_Part] = []
    done = 0
    for number, document in enumerate(texts):
        ids, skipped = codec.encode_span(document.text)
        first = min(skipped, len(document.text)) if len(ids) > 1 else len(document.text)
        text = document.text[first:]
        waiting.append(Score(document.name, 0.0, max(0, len(ids) - 1), len(text), len(text.encode()), 1))
        for window in windows(len(ids), size, stride):
            part = _Part(number, window, ids[window.start : window.stop])
            if parts and sum(len(p.tokens) for p in parts) + len(part.tokens) > TOKENS_AT_ONCE:
                _settle(model, parts, waiting, done, vocab_size, listener)
                parts = []
            parts.append(part)
        ready = (parts[0].document if parts else number + 1) - done
        yield from waiting[:ready]
        waiting, done = waiting[ready:], done + ready
    _settle(model, parts, waiting, done, vocab_size, listener)
    yield from waiting


def _settle(
    model: Decoder,
    parts: list[_Part],
    waiting: list[Score],
    done: int,
    vocab_size: int | None,
    listener: Callable[[DecoderOutput], object] | None,
) -> None:
    """Add the nats of ``parts`` to the documents they belong to."""
    for part, nats in zip(parts, _nats(model, parts, vocab_size, listener), strict=True):
        place = part.document - done
        waiting[place] = replace(waiting[place], nats=waiting[place].nats + nats)


@torch.inference_mode()
def _nats(
    model: Decoder, parts: list[_Part], vocab_size: int | None, listener: Callable[[DecoderOutput], object] | None
) -> list[float]:
    """Sum of -ln p of each window's scored tokens; all stand in one row without padding, each seeing only itself."""
    if not parts:
        return []
    lengths = [len(part.tokens) - 1 for part in parts]  # the last token is only predicted
    device = model.head_weight.device
    tokens = torch.tensor([[token for part in parts for token in part.tokens[:-1]]], device=device)
    output: DecoderOutput = model(tokens, document_lengths=[lengths])
    if listener is not None:
        listener(output)
    hidden: Tensor = output.hidden[0]
    weight = model.head_weight[: vocab_size or model.config.vocab_size]
    found = []
    for part, piece in zip(parts, hidden.split(lengths), strict=True):
        context = part.window.first - part.window.start - 1
        labels = torch.tensor(part.tokens[1 + context :], device=device)
        loss, count = linear_cross_entropy(piece[context:], weight, labels)
        assert int(count) == part.window.stop - part.window.first
        found.append(float(loss))
    return found

"""Text from a decoder, token by token, for one text or for several side by side."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import dataclass, field
from typing import Literal

import torch
from torch import Tensor

from llmrecipes.models.cache import KVCache
from llmrecipes.models.decoder import Decoder
from llmrecipes.models.sampling import Sampling, draw, process

Finish = Literal["eos", "stop", "length", "positions"]
GREEDY = Sampling()


@dataclass
class Continuation:
    """What was written after a prompt.

    Attributes:
        ids: the new tokens; one that ends the text is the last of them.
        finish: why no more came: an ending token, the listener, ``max_new_tokens``, or the table of positions is full.
    """

    ids: list[int] = field(default_factory=list)
    finish: Finish = "length"


class _Batch:
    """The texts still being written, and what the decoder remembers of them."""

    def __init__(
        self, model: Decoder, prompts: dict[int, list[int]], room: int, use_cache: bool, device: torch.device
    ) -> None:
        self.model, self.device = model, device
        self.numbers = list(prompts)
        self.texts = [list(text) for text in prompts.values()]
        longest = max(map(len, self.texts))
        padding = [longest - len(text) for text in self.texts]
        self.step = torch.tensor([[0] * n + text for n, text in zip(padding, self.texts, strict=True)], device=device)
        self.mask: Tensor | None = None
        self.cache: KVCache | None = None
        if use_cache:
            ragged = torch.tensor(padding, device=device) if any(padding) else None
            if ragged is not None:
                self.mask = torch.arange(longest, device=device) >= ragged[:, None]
            dtype = _compute_dtype(model, device)
            self.cache = KVCache(model.config, len(self.texts), longest + room, dtype, device, ragged)

    def logits(self, vocab_size: int | None) -> Tensor:
        """Scores of every text's next token, [texts, vocab]."""
        if self.cache is not None:
            hidden = self.model(self.step, cache=self.cache, token_mask=self.mask).hidden[:, -1]
            self.mask = None  # later columns are real in every row
        else:
            rows = [torch.tensor([text], device=self.device) for text in self.texts]
            hidden = torch.cat([self.model(row, dropless=True).hidden[:, -1] for row in rows])
        return self.model.logits(hidden)[:, :vocab_size]

    def seen(self, vocab: int, device: torch.device) -> Tensor:
        """True for the tokens that each text holds, [texts, vocab]."""
        seen = torch.zeros(len(self.texts), vocab, dtype=torch.bool)
        for row, text in enumerate(self.texts):
            seen[row, torch.tensor(text)] = True
        return seen.to(device)

    def append(self, tokens: list[int]) -> None:
        """Each text's next token, in order."""
        for text, token in zip(self.texts, tokens, strict=True):
            text.append(token)
        self.step = torch.tensor(tokens, device=self.device)[:, None]

    def drop(self, finished: set[int]) -> None:
        """Go on without the texts of these numbers."""
        if not finished:
            return
        rows = [row for row, number in enumerate(self.numbers) if number not in finished]
        self.numbers = [self.numbers[row] for row in rows]
        self.texts = [self.texts[row] for row in rows]
        if rows and self.cache is not None:
            index = torch.tensor(rows, device=self.device)
            self.step = self.step.index_select(0, index)
            self.cache.keep(index)


# Weights of several models after each text so far: [texts, models].
Weigh = Callable[[list[list[int]]], Tensor]


class _Mixture:
    """Several models that write the same texts: each token from the weighted sum of their probabilities."""

    def __init__(self, batches: list[_Batch], weigh: Weigh) -> None:
        self.batches, self.weigh = batches, weigh

    @property
    def numbers(self) -> list[int]:
        return self.batches[0].numbers

    @property
    def texts(self) -> list[list[int]]:
        return self.batches[0].texts

    def logits(self, vocab_size: int | None) -> Tensor:
        """Log-probabilities of every text's next token, [texts, vocab]."""
        alone = torch.stack([batch.logits(vocab_size).double().log_softmax(-1) for batch in self.batches])
        weights = self.weigh(self.texts).to(alone)
        return torch.logsumexp(alone + weights.t().log()[..., None], dim=0).float()

    def seen(self, vocab: int, device: torch.device) -> Tensor:
        return self.batches[0].seen(vocab, device)

    def append(self, tokens: list[int]) -> None:
        for batch in self.batches:
            batch.append(tokens)

    def drop(self, finished: set[int]) -> None:
        for batch in self.batches:
            batch.drop(finished)


def _compute_dtype(model: Decoder, device: torch.device) -> torch.dtype:
    if torch.is_autocast_enabled(device.type):
        return torch.get_autocast_dtype(device.type)
    return model.embed.weight.dtype


def _next_tokens(
    batch: _Batch | _Mixture, sampling: Sampling, generators: Sequence[torch.Generator] | None, vocab_size: int | None
) -> list[int]:
    """One token for each text of the batch."""
    logits = batch.logits(vocab_size)
    if generators:
        logits = logits.to(generators[0].device)
    seen = batch.seen(logits.shape[-1], logits.device) if sampling.repetition_penalty != 1.0 else None
    scores = process(logits, sampling, seen)
    sources = [generators[number] if generators else None for number in batch.numbers]
    return [draw(row, sampling.temperature, source) for row, source in zip(scores, sources, strict=True)]


@torch.inference_mode()
def generate_batch(
    model: Decoder,
    prompts: Sequence[Sequence[int]],
    max_new_tokens: int,
    *,
    sampling: Sampling = GREEDY,
    generators: Sequence[torch.Generator] | None = None,
    eos_ids: Sequence[int] = (),
    vocab_size: int | None = None,
    listener: Callable[[int, int], bool] | None = None,
    use_cache: bool = True,
    device: torch.device | None = None,
    others: Sequence[Decoder] = (),
    weigh: Weigh | None = None,
) -> list[Continuation]:
    """Continue every prompt (at least one id each) by up to ``max_new_tokens`` ids, all side by side.

    Each text comes out as it would alone: the padding to the left of shorter ones is seen by nobody, positions count
    from each text's own beginning, and each has a generator of its own. Finished texts leave the batch.

    Args:
        model: the decoder; put into evaluation mode for the call and left as it was found.
        prompts: ids of each prompt.
        max_new_tokens: most new ids per prompt.
        sampling: how a token is chosen.
        generators: sources of randomness, one per prompt; None = torch's own.
        eos_ids: tokens that end a text.
        vocab_size: tokens from this id on are never chosen (rows that only pad the vocabulary); None = all may be.
        listener: called with the prompt's number and its new token; True ends that text.
        use_cache: keep keys and values of earlier tokens; without it every step reads the whole text again.
        device: that computes; None = where the embedding is (offloaded weights are elsewhere).
        others: models that write along, of the same vocabulary: each token comes from the weighted sum of all
            probabilities. weigh: their weights, given the texts so far; the first is that of ``model``.
    """
    assert (weigh is None) == (not others), "several models need weights, one needs none"
    assert all(len(prompt) for prompt in prompts), "generation starts from at least one token"
    limit = model.config.longest_text
    results = [Continuation() for _ in prompts]
    todo = {}
    for number, prompt in enumerate(prompts):
        if limit is not None and len(prompt) >= limit:
            results[number].finish = "positions"
        elif max_new_tokens > 0:
            todo[number] = list(prompt)
    if not todo:
        return results
    were_training = [one.training for one in (model, *others)]
    try:
        batches = [
            _Batch(one.eval(), todo, max_new_tokens, use_cache, device or model.embed.weight.device)
            for one in (model, *others)
        ]
        batch = batches[0] if weigh is None else _Mixture(batches, weigh)
        for _ in range(max_new_tokens):
            tokens = _next_tokens(batch, sampling, generators, vocab_size)
            batch.append(tokens)
            finished = set()
            for number, token, text in zip(batch.numbers, tokens, batch.texts, strict=True):
                results[number].ids.append(token)
                told_to_stop = listener is not None and listener(number, token)
                if finish := _finish(token in eos_ids, told_to_stop, len(text) == limit):
                    results[number].finish = finish
                    finished.add(number)
            batch.drop(finished)
            if not batch.numbers:
                break
    finally:
        for one, was_training in zip((model, *others), were_training, strict=True):
            one.train(was_training)
    return results


def _finish(eos: bool, told_to_stop: bool, full: bool) -> Finish | None:
    """Why a text ends with its newest token, if it does."""
    if eos:
        return "eos"
    if told_to_stop:
        return "stop"
    return "positions" if full else None


def generate(
    model: Decoder,
    prompt_ids: Sequence[int] | Tensor,
    max_new_tokens: int,
    *,
    temperature: float = 1.0,
    top_k: int | None = None,
    generator: torch.Generator | None = None,
    eos_id: int | None = None,
    use_cache: bool = True,
    device: torch.device | None = None,
) -> list[int]:
    """Continue one prompt by up to ``max_new_tokens`` ids; returns the new ids only. See :func:`generate_batch`."""
    prompt = torch.as_tensor(prompt_ids).reshape(-1).tolist()
    done = generate_batch(
        model,
        [prompt],
        max_new_tokens,
        sampling=Sampling(temperature=temperature, top_k=top_k),
        generators=None if generator is None else [generator],
        eos_ids=() if eos_id is None else (eos_id,),
        use_cache=use_cache,
        device=device,
    )
    return done[0].ids

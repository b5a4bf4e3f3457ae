"""Choosing the next token, against the processors of transformers on random logits."""

from __future__ import annotations

import math

import pytest
import torch

from llmrecipes.models import Sampling
from llmrecipes.models.sampling import draw, only_top_k, only_top_p, penalize, process

transformers = pytest.importorskip("transformers")
VOCAB = 211
CASES = 60


def cases():
    """Random texts and logits; every fourth has equal logits, where ties must be treated alike."""
    generator = torch.Generator().manual_seed(0)
    for index in range(CASES):
        logits = torch.randn(3, VOCAB, generator=generator) * (0.5 + index % 5)
        if index % 4 == 3:
            logits = logits.round()
        texts = torch.randint(0, VOCAB, (3, 1 + index), generator=generator)
        yield logits, texts


def seen_of(texts):
    return torch.zeros(len(texts), VOCAB, dtype=torch.bool).scatter(1, texts, True)


def theirs(logits, texts, sampling):
    found = transformers.LogitsProcessorList()
    if sampling.repetition_penalty != 1:
        found.append(transformers.RepetitionPenaltyLogitsProcessor(sampling.repetition_penalty))
    if sampling.temperature:
        found.append(transformers.TemperatureLogitsWarper(sampling.temperature))
        if sampling.top_k:
            found.append(transformers.TopKLogitsWarper(sampling.top_k))
        if sampling.top_p < 1:
            found.append(transformers.TopPLogitsWarper(sampling.top_p))
    return found(texts, logits.clone())


SETTINGS = [
    Sampling(),
    Sampling(repetition_penalty=1.3),
    Sampling(temperature=0.7),
    Sampling(temperature=1.0, top_k=7),
    Sampling(temperature=1.0, top_k=1000),
    Sampling(temperature=1.0, top_p=0.9),
    Sampling(temperature=1.0, top_p=0.01),
    Sampling(temperature=0.6, top_k=20, top_p=0.8, repetition_penalty=0.8),
]


@pytest.mark.oracle
@pytest.mark.parametrize("sampling", SETTINGS, ids=str)
def test_processed_logits_equal_transformers(sampling):
    compared = 0
    for logits, texts in cases():
        ours, peer = process(logits, sampling, seen_of(texts)), theirs(logits, texts, sampling)
        assert torch.equal(ours.isinf(), peer.isinf())
        torch.testing.assert_close(ours, peer, rtol=1e-6, atol=1e-6)
        compared += 1
    assert compared == CASES


def mutants():
    def penalty_divides_all(logits, texts):
        return torch.where(seen_of(texts), logits / 1.3, logits)

    def top_k_drops_ties(logits, texts):
        kept = logits.topk(7).indices
        return torch.full_like(logits, -math.inf).scatter(1, kept, logits.gather(1, kept))

    def top_p_without_the_one_that_crosses(logits, texts):
        descending, order = logits.sort(dim=-1, descending=True)
        removed = descending.softmax(-1).cumsum(-1) > 0.9
        removed[:, 0] = False
        return logits.masked_fill(removed.scatter(1, order, removed), -math.inf)

    def top_p_before_temperature(logits, texts):
        return only_top_p(logits, 0.9) / 0.7

    def top_p_before_top_k(logits, texts):
        return only_top_k(only_top_p(logits, 0.5), 7)

    return [
        (penalty_divides_all, Sampling(repetition_penalty=1.3)),
        (top_k_drops_ties, Sampling(temperature=1.0, top_k=7)),
        (top_p_without_the_one_that_crosses, Sampling(temperature=1.0, top_p=0.9)),
        (top_p_before_temperature, Sampling(temperature=0.7, top_p=0.9)),
        (top_p_before_top_k, Sampling(temperature=1.0, top_k=7, top_p=0.5)),
    ]


@pytest.mark.oracle
@pytest.mark.parametrize(("mutant", "sampling"), mutants(), ids=lambda x: getattr(x, "__name__", ""))
def test_mutant_processors_differ(mutant, sampling):
    differ = 0
    for logits, texts in cases():
        ours, peer = mutant(logits, texts), theirs(logits, texts, sampling)
        both = torch.where(peer.isinf(), 0.0, (ours - peer).abs())
        differ += not torch.equal(ours.isinf(), peer.isinf()) or both.nan_to_num(1e9).max().item() > 1e-4
    assert differ > 0


def test_draws_follow_the_probabilities():
    logits = torch.tensor([0.0, math.log(2), math.log(5), -math.inf])
    generator = torch.Generator().manual_seed(1)
    counts = torch.bincount(torch.tensor([draw(logits, 1.0, generator) for _ in range(8000)]), minlength=4)
    torch.testing.assert_close(counts / 8000, torch.tensor([1, 2, 5, 0]) / 8, rtol=0, atol=0.02)
    assert draw(logits, 0.0, None) == 2


def test_penalty_makes_seen_tokens_less_likely_whatever_their_sign():
    logits = torch.tensor([2.0, -2.0, 1.0])
    seen = torch.tensor([True, True, False])
    assert penalize(logits, seen, 2.0).tolist() == [1.0, -4.0, 1.0]


def test_impossible_values_are_named():
    bad = Sampling(temperature=-1.0, top_k=0, top_p=0.0, repetition_penalty=0.0)
    assert [problem.split()[0] for problem in bad.problems()] == [
        "temperature", "top_k", "top_p", "repetition_penalty",
    ]  # fmt: skip
    assert Sampling(temperature=math.nan).problems() and not Sampling(temperature=1.0, top_k=1).problems()

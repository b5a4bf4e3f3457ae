"""Experts as one model: the formula against brute force, its mutants, batches, and what mixing gains on two topics."""

from __future__ import annotations

import json
import math

import numpy as np
import pytest
import torch
from helpers import cli

from data_prep.domain_vectors import Domains, domain_weights
from llmrecipes.errors import UserError
from llmrecipes.inference.codec import PlainCodec
from llmrecipes.inference.ensemble import Ensemble, mixture, score
from llmrecipes.inference.opened import Opened
from llmrecipes.inference.texts import Document
from llmrecipes.losses import linear_cross_entropy
from llmrecipes.models import Decoder, ModelConfig, generate_batch, init_weights

pytest.importorskip("sklearn")
TOWNS = [f"The river of the town flows past the old market, {i} steps from the bridge." for i in range(40)]
SUMS = [f"{i} + {i + 3} = {2 * i + 3}\n{i + 9} - {i} = 9\n{i} x 2 = {2 * i}" for i in range(40)]


def trained(codec: PlainCodec, texts: list[str], seed: int) -> Opened:
    """A little decoder after some steps on one topic."""
    model = Decoder(ModelConfig(vocab_size=codec.vocab_size, dim=24, num_layers=1, num_heads=2, ffn_dim=32))
    init_weights(model, seed)
    optimizer = torch.optim.Adam(model.parameters(), lr=0.02)
    for step in range(25):
        ids = [codec.encode(text) for text in texts[step % 8 :: 8]]
        lengths = [len(one) - 1 for one in ids]
        tokens = torch.tensor([[token for one in ids for token in one[:-1]]])
        labels = torch.tensor([token for one in ids for token in one[1:]])
        loss, count = linear_cross_entropy(
            model(tokens, document_lengths=[lengths]).hidden[0], model.head_weight, labels
        )
        (loss / count).backward()
        optimizer.step()
        optimizer.zero_grad()
    return Opened(f"expert {seed}", model.eval(), codec, codec.vocab_size, None, False)


@pytest.fixture(scope="module")
def experts(sentencepiece_folder):
    codec = PlainCodec(sentencepiece_folder)
    return [trained(codec, texts, seed) for seed, texts in enumerate((TOWNS[:32], SUMS[:32]))]


@pytest.fixture(scope="module")
def domains():
    """Of the two topics, towns first."""
    from data_prep.stages.domains import learn

    found, labels = learn([*TOWNS[:32], *SUMS[:32]], 2, 20, 1000, seed=0)
    assert len(set(labels[:32])) == len(set(labels[32:])) == 1
    return Domains(found.vocabulary, found.directions, found.centers[[labels[0], labels[-1]]])


@pytest.fixture
def ensemble(experts, domains):
    return Ensemble(experts, domains)


def documents(texts):
    return [Document("", "", text) for text in texts]


def test_mixing_by_the_text_so_far_is_better_than_any_expert_and_than_equal_weights(ensemble):
    found = score(ensemble, documents([*TOWNS[32:], *SUMS[32:]]), 256, 128)
    alone = [expert.nats for expert in found.experts]
    assert found.ensemble.nats < found.uniform.nats < min(alone)
    assert found.ensemble.tokens == found.experts[0].tokens > 300
    assert sum(found.mean_weights) == pytest.approx(1)
    of_towns = score(ensemble, documents(TOWNS[32:]), 256, 128)
    assert of_towns.mean_weights[0] > 0.9, "each text has its own expert"


def brute(ensemble, text, whole_text=False, mix_logits=False):
    """-log p of a text, token by token from nothing; with the mistakes that would be easy to make."""
    codec = ensemble.experts[0].codec
    ids = codec.encode(text)
    nats = 0.0
    for place in range(1, len(ids)):
        points = ensemble.domains.points([text if whole_text else codec.decode(ids[:place])])
        weights = domain_weights(points, ensemble.domains.centers, ensemble.temperature, ensemble.top_k)[0]
        logits = [
            expert.model.logits(expert.model(torch.tensor([ids[:place]])).hidden[0, -1]).double().detach()
            for expert in ensemble.experts
        ]
        if mix_logits:
            p = sum(w * one for w, one in zip(weights, logits, strict=True)).softmax(-1)
        else:
            p = sum(w * one.softmax(-1) for w, one in zip(weights, logits, strict=True))
        assert float(p.sum()) == pytest.approx(1, abs=1e-12)
        nats -= math.log(float(p[ids[place]]))
    return nats


@pytest.mark.parametrize("top_k", [None, 1])
def test_the_formula_and_its_mutants(experts, domains, top_k):
    ensemble = Ensemble(experts, domains, temperature=0.5, top_k=top_k)
    text = "12 + 3 of the old market of 風崎町, 4 steps from the river = 15"
    nats = score(ensemble, documents([text]), 256, 128).ensemble.nats
    assert nats == pytest.approx(brute(ensemble, text), abs=1e-4)
    assert abs(nats - brute(ensemble, text, whole_text=True)) > 0.01
    if top_k is None:
        assert abs(nats - brute(ensemble, text, mix_logits=True)) > 0.01
    windowed = score(ensemble, documents([text]), 8, 4).ensemble
    assert windowed.tokens == len(experts[0].codec.encode(text)) - 1 and windowed.nats != nats


def test_what_comes_later_has_no_say(ensemble):
    codec = ensemble.experts[0].codec
    texts = ["The river of the town x x x x", "The river of the town flows past"]
    ids = [codec.encode(text) for text in texts]
    same = next(i for i, (a, b) in enumerate(zip(*ids, strict=False)) if a != b)
    first, second = (ensemble.weights_before(one, text) for one, text in zip(ids, texts, strict=True))
    assert same > 3 and torch.equal(first[:same], second[:same])
    assert not torch.equal(first[-1], second[-1])


def test_equal_experts_are_the_expert(experts, domains):
    found = score(Ensemble([experts[0]] * 2, domains), documents(TOWNS[:3]), 64, 32)
    assert found.ensemble.nats == pytest.approx(found.experts[0].nats, rel=1e-6)
    log_probs, weights = torch.randn(2, 5).log_softmax(-1), torch.tensor([[1.0, 0.0]] * 5)
    assert torch.equal(mixture(log_probs, weights), log_probs[0].double())


def write(ensemble, prompts, top_k=None):
    first, *others = ensemble.experts
    done = generate_batch(
        first.model, [first.codec.encode(text) for text in prompts], 10, vocab_size=first.vocab_size,
        others=[expert.model for expert in others],
        weigh=lambda texts: ensemble.weights([first.codec.decode(ids) for ids in texts]),
    )  # fmt: skip
    return [one.ids for one in done]


@pytest.mark.parametrize("top_k", [None, 1])
def test_side_by_side_every_text_is_written_as_alone(experts, domains, top_k):
    ensemble = Ensemble(experts, domains, top_k=top_k)
    prompts = ["The river", "3 + 4 =", "The old market of the town", "7"]
    together = write(ensemble, prompts)
    assert together == [write(ensemble, [prompt])[0] for prompt in prompts]
    codec = experts[0].codec
    for prompt, ids in zip(prompts, together, strict=True):
        text = codec.encode(prompt)
        for token in ids:
            weights = ensemble.weights([codec.decode(text)])[0]
            alone = [e.model.logits(e.model(torch.tensor([text])).hidden[0, -1]).double() for e in experts]
            p = sum(w * logits.softmax(-1) for w, logits in zip(weights, alone, strict=True))
            assert int(p.argmax()) == token
            text = [*text, token]
    assert all(expert.model.training is False for expert in experts)


def test_the_command_scores_and_continues(run_folder, domains, tmp_path, capsys):
    domains.save(tmp_path)
    words = ["ensemble", run_folder, run_folder, "--domains", tmp_path]
    assert cli(*words, "--text", TOWNS[0], "--text", SUMS[0], "--json") == 0
    found = json.loads(capsys.readouterr().out)
    nats = [found["ensemble"]["nats"], found["uniform"]["nats"], *(expert["nats"] for expert in found["experts"])]
    assert len(nats) == 4 and np.ptp(nats) < 1e-3 * nats[0]
    assert cli(*words, "--text", TOWNS[0]) == 0
    assert "mean weights" in capsys.readouterr().out
    assert cli("perplexity", run_folder, "--text", TOWNS[0], "--text", SUMS[0], "--json") == 0
    (model,) = json.loads(capsys.readouterr().out)["models"]
    assert model["corpora"][-1]["nats"] == pytest.approx(nats[0], rel=1e-4)
    assert cli(*words, "--prompt", "The river", "--max_new_tokens", 5) == 0
    together = capsys.readouterr().out
    assert together.startswith("The river")
    assert cli("generate", run_folder, "--prompt", "The river", "--max_new_tokens", 5) == 0
    assert together.strip().endswith(capsys.readouterr().out.strip())


def test_mistakes_are_named(experts, domains, run_folder, tmp_path, capsys):
    for options, problem in (
        ({"experts": experts[:1]}, "1 models for 2 domains"),
        ({"temperature": 0.0}, "must be above 0"),
        ({"top_k": 3}, "1 to 2"),
    ):
        with pytest.raises(UserError, match=problem):
            Ensemble(**({"experts": experts, "domains": domains} | options))
    assert cli("ensemble", run_folder, run_folder, "--domains", tmp_path, "--text", "x") == 2
    assert "no domains in it" in capsys.readouterr().err
    with pytest.raises(SystemExit) as stopped:
        cli("ensemble", run_folder, run_folder, "--domains", tmp_path)
    assert stopped.value.code == 2

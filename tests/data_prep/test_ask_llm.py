"""Ask-LLM: a score depends on its own document only; what was scored is not scored again; the best stay."""

import json
import sys
from pathlib import Path

import numpy as np
import pytest
from stages import hashes, manifest, read, run_stage, write

sys.path.insert(0, str(Path(__file__).parents[1] / "inference"))
from model_folders import make_hf_folder

from data_prep.ask_llm import TEMPLATES, YES, Scorer
from data_prep.stages import ask_llm
from llmrecipes.errors import UserError

TEMPLATE = "# {text} # good?"
TEXTS = ["a", "the quick brown fox " * 2, "日本の首都", "x y z", "Hello  world, this is a test.", "q" * 90, ""]
VALUES = {"template": TEMPLATE, "yes": ["a", "b", "t", "h"], "max_tokens": 100, "batch_size": 3}


@pytest.fixture(scope="module")
def model(tmp_path_factory):
    return make_hf_folder(tmp_path_factory.mktemp("model"))


@pytest.fixture(scope="module")
def scorer(model):
    return Scorer(str(model), TEMPLATE, VALUES["yes"], 100)


def test_a_score_does_not_depend_on_its_batch(scorer):
    alone = np.concatenate([scorer.scores([text], 1) for text in TEXTS])
    assert alone.std() > 1e-3  # the texts differ, so that the test can fail
    for size in (2, 3, 7):
        np.testing.assert_allclose(scorer.scores(TEXTS, size), alone, atol=1e-6)
        np.testing.assert_allclose(scorer.scores(TEXTS[::-1], size), alone[::-1], atol=1e-6)


def test_the_mutant_filled_up_on_the_right_depends_on_it(scorer):
    """The source system read the last position of prompts filled up on the right."""
    import torch

    prompts = [scorer.prompt(text) for text in TEXTS[:2]]
    longest = max(map(len, prompts))
    ids = torch.tensor([prompt + [1] * (longest - len(prompt)) for prompt in prompts])
    logits = scorer._model(input_ids=ids).logits[:, -1].double()
    mutant = logits.softmax(-1)[:, scorer._yes].sum(-1).detach().numpy()
    alone = np.concatenate([scorer.scores([text], 1) for text in TEXTS[:2]])
    assert abs(mutant - alone).max() > 1e-3


def test_the_score_is_the_share_of_the_yes_tokens(scorer, model):
    import torch
    from transformers import AutoModelForCausalLM, AutoTokenizer

    tokenizer, plain = AutoTokenizer.from_pretrained(model), AutoModelForCausalLM.from_pretrained(model)
    ids = [tokenizer.bos_token_id, *tokenizer(TEMPLATE.format(text="x y z"), add_special_tokens=False)["input_ids"]]
    shares = plain(torch.tensor([ids])).logits[0, -1].double().softmax(-1)
    yes = [tokenizer.convert_tokens_to_ids(word) for word in VALUES["yes"]]
    assert scorer.scores(["x y z"], 1)[0] == pytest.approx(float(shares[yes].sum()), abs=1e-6)


def test_the_question_survives_long_texts_and_quotations(scorer):
    tail = scorer.prompt("")[-len(scorer._after) :]
    for text in ("z" * 5000, "a ### b"):
        prompt = scorer.prompt(text)
        assert len(prompt) <= 100 and prompt[-len(tail) :] == tail
    assert scorer.prompt("a ### b") == scorer.prompt("a  b")


def test_the_best_fraction_stays_exactly(tmp_path, model):
    texts = [f"document {n} " + "word " * (n % 7) for n in range(30)]
    write(tmp_path / "one" / "a.jsonl", [*texts, b"{"])
    for part in range(3):
        write(tmp_path / "many" / f"{part}.jsonl", texts[part::3][::-1])
    run_stage("ask-llm", input=[str(tmp_path / "one")], output=tmp_path / "all", model=model, **VALUES)
    scores = {record["text"]: record["askllm_score"] for record in read(tmp_path / "all")}
    assert len(scores) == 30
    for name in ("one", "many"):
        run_stage(
            "ask-llm",
            input=[str(tmp_path / name)],
            output=tmp_path / f"{name}-out",
            model=model,
            top_fraction=0.4,
            **VALUES,
        )
    best = sorted(texts, key=scores.get)[-12:]
    for name in ("one", "many"):
        assert sorted(r["text"] for r in read(tmp_path / f"{name}-out")) == sorted(best)
    assert manifest(tmp_path / "one-out")["rejected"]["low_score"]["documents"] == 18


def test_a_killed_run_goes_on_where_it_was(tmp_path, model, monkeypatch):
    texts = [f"document {n} " + "word " * (n % 7) for n in range(20)]
    write(tmp_path / "a.jsonl", texts)
    values = {"input": [str(tmp_path / "a.jsonl")], "model": model, "save_every": 4, "threshold": 0.01, **VALUES}
    run_stage("ask-llm", output=tmp_path / "whole", **values)
    scored, plain = [], Scorer.scores

    def counting(self, prompts, batch_size):
        if len(scored) == 12:
            raise KeyboardInterrupt
        scored.extend(prompts)
        return plain(self, prompts, batch_size)

    monkeypatch.setattr(Scorer, "scores", counting)
    with pytest.raises(KeyboardInterrupt):
        run_stage("ask-llm", output=tmp_path / "killed", **values)
    scored.append("no more interruptions")
    run_stage("ask-llm", output=tmp_path / "killed", **values)
    assert len(scored) == 21  # each document once
    assert hashes(tmp_path / "killed") == hashes(tmp_path / "whole")


def test_conversations_have_the_score_of_their_worst_answer(tmp_path, model, scorer):
    turns = [("user", "hi"), ("assistant", "hello"), ("user", "why?"), ("assistant", "because the fox")]
    messages = [{"role": role, "content": content} for role, content in turns]
    prefixes = ask_llm.answers(messages)
    assert prefixes == ["user: hi\nassistant: hello", "\n".join(f"{r}: {c}" for r, c in turns)]
    write(
        tmp_path / "a.jsonl", [{"messages": messages, "id": 1}, {"messages": "text"}, {"messages": [{"role": "user"}]}]
    )
    run_stage(
        "ask-llm",
        input=[str(tmp_path / "a.jsonl")],
        output=tmp_path / "out",
        model=model,
        conversation=True,
        field="messages",
        **VALUES,
    )
    [first] = read(tmp_path / "out")
    assert first["messages"] == messages
    assert manifest(tmp_path / "out")["rejected"]["no_conversation"]["documents"] == 2
    assert first["askllm_score"] == pytest.approx(scorer.scores(prefixes, 2).min(), abs=1e-6)


def test_templates_and_mistakes(tmp_path, model):
    for name, template in TEMPLATES.items():
        assert template.count("{text}") == 1 and name.rpartition("_")[2] in YES
    write(tmp_path / "a.jsonl", ["x"])
    with pytest.raises(UserError, match="none of 'はい', ' はい' is one token"):
        Scorer(str(model), TEMPLATE, YES["ja"], 100)
    with pytest.raises(UserError, match="the question alone has"):
        Scorer(str(model), TEMPLATE, ["a"], 5)
    with pytest.raises(UserError) as found:
        run_stage(
            "ask-llm", input=["a"], output="o", model="no/such", template="tell me", threshold=1.0, top_fraction=0.5
        )
    assert len(found.value.problems) == 4, json.dumps(found.value.problems)

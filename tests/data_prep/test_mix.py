"""Mixing by tokens: shares are met, nothing is lost, stages keep to their weights, and only hashes decide the order."""

import json
import random

import numpy as np
import pytest
from stages import hashes, manifest, read, run_stage, texts, write

from data_prep.mix_plan import Source, make_plan
from data_prep.stages.mix import MixConfig
from llmrecipes.data.tokenizer import Tokenizer
from llmrecipes.errors import UserError


def source(count, seed, longest=50):
    draw = np.random.default_rng(seed)
    return Source(np.arange(count), draw.integers(1, longest, count), draw.integers(0, 2**62, count))


def test_shares_are_met_all_the_way_to_within_one_document():
    sources = {name: source(3000, seed) for seed, name in enumerate("abc")}
    plan = make_plan(sources, [("s", 60_000, {"a": 5.0, "b": 3.0, "c": 2.0})], max_epochs=4)
    got = {name: found.tokens for (_, name), found in plan.realised.items()}
    for name, share in zip("abc", (0.5, 0.3, 0.2), strict=True):
        assert abs(got[name] - share * 60_000) <= 100
    assert abs(sum(got.values()) - 60_000) < 50 and not plan.warnings


def test_no_document_is_lost_and_none_comes_twice_before_its_turn():
    """The source system dropped the last batch of fewer than 100 records."""
    one = source(137, 3)
    total = int(one.tokens.sum())
    plan = make_plan({"a": one}, [("s", total, {"a": 1.0})], max_epochs=4)
    assert sorted(plan.stages["s"].tolist()) == list(range(137))
    plan = make_plan({"a": one}, [("first", total // 3, {"a": 1.0}), ("rest", total, {"a": 1.0})], max_epochs=4)
    both = np.concatenate([plan.stages["first"], plan.stages["rest"]])
    assert sorted(both[:137].tolist()) == list(range(137))  # the second stage goes on where the first left it


def test_epochs_end_and_differ():
    plan = make_plan({"a": source(20, 1), "b": source(2000, 2)}, [("s", 20_000, {"a": 1.0, "b": 1.0})], max_epochs=2)
    assert plan.realised["s", "a"].documents == 40 and plan.epochs["s", "a"] == 2.0
    assert plan.warnings == ["s: a is used up after 2.0 epochs"]
    big = make_plan({"a": source(50, 1)}, [("s", 10**9, {"a": 1.0})], max_epochs=3)
    order = big.stages["s"]
    assert len(order) == 150 and "only" in big.warnings[-1]
    epochs = [order[:50], order[50:100], order[100:]]
    assert all(sorted(epoch.tolist()) == list(range(50)) for epoch in epochs)
    assert not np.array_equal(epochs[0], epochs[1]) and not np.array_equal(epochs[1], epochs[2])


@pytest.fixture(scope="module")
def world(tmp_path_factory, tokenizer):
    folder = tmp_path_factory.mktemp("world")
    draw, pieces = random.Random(1), Tokenizer(tokenizer)
    made = {}
    for name, count in (("ja", 300), ("en", 200), ("wiki", 60)):
        made[name] = [f"{name} {n}: " + "言葉 and words " * draw.randrange(1, 20) for n in range(count)]
        write(folder / name / "a.jsonl", made[name])
    return folder, made, pieces, tokenizer


def recipe(folder, tokenizer, **more):
    stages = [
        {"name": "general", "tokens": 12_000, "weights": {"ja": 0.5, "en": 0.5}},
        {"name": "final", "tokens": 2_000, "weights": {"wiki": 1.0}},
    ]
    sources = {name: [str(folder / name)] for name in ("ja", "en", "wiki")}
    return {"sources": sources, "stages": stages, "tokenizer": str(tokenizer), "validation": 0.1, **more}


def test_stages_validation_and_the_table(world, tmp_path, capsys):
    folder, made, pieces, tokenizer = world
    run_stage("mix", output=tmp_path / "out", **recipe(folder, tokenizer), shard_mb=0.005)
    found = manifest(tmp_path / "out")
    general, final = texts(tmp_path / "out" / "general"), texts(tmp_path / "out" / "final")
    assert len(list((tmp_path / "out" / "general").iterdir())) > 2
    assert {text.split()[0] for text in general} == {"ja", "en"} and {text.split()[0] for text in final} == {"wiki"}
    for name in ("ja", "en"):
        lengths = [len(pieces.encode(t)) + 1 for t in general if t.startswith(name)]
        assert found["stages"]["general"][name]["tokens"] == sum(lengths)
        # The document that reaches what was planned is the last one.
        assert 0 <= sum(lengths) - 6_000 < max(lengths)
    files = sorted((tmp_path / "out" / "valid").iterdir())
    held = {name: [text for file in files if file.name.startswith(name) for text in texts(file)] for name in made}
    for name, documents in held.items():
        assert 0.02 < len(documents) / len(made[name]) < 0.25
        assert not set(documents) & {*general, *final}
    used = {*general, *final, *(text for documents in held.values() for text in documents)}
    assert used <= {text for documents in made.values() for text in documents}
    assert found["kept"]["documents"] == len(used)
    shown = capsys.readouterr().out
    assert "planned" in shown and "wiki" in shown


def test_sharding_workers_and_kills_change_nothing(world, tmp_path):
    folder, made, _, tokenizer = world
    for name, documents in made.items():
        for part in range(4):
            write(tmp_path / "many" / name / f"{part}.jsonl", documents[part::4][::-1])
    run_stage("mix", output=tmp_path / "one", **recipe(folder, tokenizer))
    run_stage("mix", output=tmp_path / "many-out", **recipe(tmp_path / "many", tokenizer), workers=2)
    assert hashes(tmp_path / "one" / "general") == hashes(tmp_path / "many-out" / "general")
    assert hashes(tmp_path / "one" / "valid") == hashes(tmp_path / "many-out" / "valid")
    for number in range(2):  # an array, run again and again until it says that all is done
        run_stage("mix", output=tmp_path / "killed", **recipe(tmp_path / "many", tokenizer), task=f"{number}/2")
    done = tmp_path / "killed" / ".done"
    for mark in list((done / "files").rglob("*.json"))[:1] + list((done / "spool").rglob("*.json"))[:2]:
        mark.unlink()
    run_stage("mix", output=tmp_path / "killed", **recipe(tmp_path / "many", tokenizer))
    assert hashes(tmp_path / "killed") == hashes(tmp_path / "many-out")


def test_what_is_broken_or_not_reached_is_counted(world, tmp_path):
    _, made, _, tokenizer = world
    write(tmp_path / "in" / "ja" / "a.jsonl", [*made["ja"], b"{", b""])
    write(tmp_path / "in" / "en" / "a.jsonl", [])
    write(tmp_path / "in" / "wiki" / "a.jsonl", made["wiki"])
    run_stage("mix", output=tmp_path / "out", **recipe(tmp_path / "in", tokenizer))
    found = manifest(tmp_path / "out")
    assert found["rejected"]["not_json"]["documents"] == 1
    assert found["rejected"]["not_reached_wiki"]["documents"] > 0
    assert found["stages"]["general"]["en"]["tokens"] == 0  # its share went to ja, and the table says so
    assert len(read(tmp_path / "out" / "general")) == found["stages"]["general"]["ja"]["documents"]


def test_mistakes(world, tmp_path):
    folder, _, _, tokenizer = world
    wrong = recipe(folder, tokenizer)
    wrong["stages"][0]["weights"] = {"ja": 1.0, "fr": 1.0}
    wrong["stages"][1]["name"] = "general"
    wrong["tokenizer"] = "null"
    with pytest.raises(UserError) as found:
        run_stage("mix", output=tmp_path / "out", **wrong)
    assert len(found.value.problems) == 4, found.value.problems
    assert json.dumps(MixConfig.__doc__)

"""The classifier of noise: good documents stay however sure the model is, thresholds by false positives, labelling."""

import csv
import json
import random
from pathlib import Path

import numpy as np
import pytest
from stages import hashes, manifest, read, run_stage, texts, write

from data_prep.noise_model import load_model
from data_prep.noise_report import Share, evaluate_scores, threshold_for
from data_prep.stages.noise import Labels, NoiseTrainConfig, cross_validate, folds_of, read_labels
from data_prep.word_vectors import read_vectors
from llmrecipes.errors import UserError

pytest.importorskip("sklearn", reason="scikit-learn is not installed: pip install 'llmrecipes[data]'")


def labelled(count, seed=0):
    """Made-up good prose and advertisements that share their words' letters."""
    draw, found = random.Random(seed), []
    nouns = ["山", "川", "町", "駅", "本", "犬", "雨", "店", "靴", "鞄", "車", "家"]
    for number in range(count):
        a, b, c = draw.sample(nouns, 3)
        if number % 2:
            text = f"激安{a}通販!{b}ランキング{draw.randrange(99)}位、今なら{c}が送料無料で買える!クリック"
        else:
            text = f"{a}のそばに{b}があり、{draw.randrange(99)}年前から{c}を大切にする人が住んでいたという。"
        found.append({"text": text, "label": "bad" if number % 2 else "good"})
    return found


@pytest.fixture(scope="module")
def model(tmp_path_factory):
    folder = tmp_path_factory.mktemp("noise")
    labels = write(folder / "labels.jsonl", labelled(600))
    run_stage("noise train", labels__files=[str(labels)], output=folder / "model", false_positives=0.01)
    return folder / "model"


def test_accuracy_on_made_up_labels(model):
    report = json.loads((model / "noise.json").read_text())["report"]
    assert report["accuracy"]["hits"] >= 0.9 * report["accuracy"]["total"]
    assert report["false_positives"]["hits"] <= 0.01 * report["false_positives"]["total"]


def test_a_document_that_is_surely_good_stays(model, tmp_path):
    """The source system dropped when the likelier label, whichever it was, had more than 0.9."""
    loaded, settings = load_model(model)
    examples = [record["text"] for record in labelled(40, seed=7)]
    scores = loaded.probability(examples)
    write(tmp_path / "in.jsonl", examples)
    run_stage("noise apply", input=[str(tmp_path / "in.jsonl")], output=tmp_path / "out", model=model)
    kept = texts(tmp_path / "out")
    surest = examples[int(scores.argmin())]
    assert scores.min() < 0.1 and surest in kept
    assert kept == [text for text, score in zip(examples, scores, strict=True) if score < settings["threshold"]]
    assert 10 < len(kept) < 30
    top_label = [text for text, score in zip(examples, scores, strict=True) if max(score, 1 - score) <= 0.9]
    assert surest not in top_label  # the mutant: what that rule would have kept
    assert {record["noise"] for record in read(tmp_path / "out")} == {
        round(float(s), 4) for s in scores if s < settings["threshold"]
    }
    assert manifest(tmp_path / "out")["rejected"]["noise"]["documents"] == 40 - len(kept)


def test_scores_do_not_depend_on_the_batch_or_the_shard(model, tmp_path):
    examples = [record["text"] for record in labelled(60, seed=8)]
    loaded, _ = load_model(model)
    alone = [loaded.probability([text])[0] for text in examples]
    np.testing.assert_allclose(loaded.probability(examples), alone, atol=1e-12)
    write(tmp_path / "a" / "x.jsonl", examples)
    for part in range(3):
        write(tmp_path / "b" / f"{part}.jsonl", examples[part::3])
    for name in ("a", "b"):
        run_stage("noise apply", input=[str(tmp_path / name)], output=tmp_path / f"{name}-out", model=model)
    assert sorted(texts(tmp_path / "a-out")) == sorted(texts(tmp_path / "b-out"))


def test_training_twice_gives_the_same_bytes(model, tmp_path):
    labels = write(tmp_path / "labels.jsonl", labelled(600))
    run_stage("noise train", labels__files=[str(labels)], output=tmp_path / "model", false_positives=0.01)
    assert hashes(tmp_path / "model") == hashes(model)


def test_labelling_finds_the_boundary_and_comes_back(model, tmp_path):
    mixed = [f"{a['text']}{b['text']}" for a, b in zip(labelled(20)[::2], labelled(20)[1::2], strict=True)]
    sure = [record["text"] for record in labelled(100, seed=3)]
    write(tmp_path / "in.jsonl", [*sure, *mixed, *mixed])
    run_stage("noise export", input=[str(tmp_path / "in.jsonl")], output=tmp_path / "todo.csv", model=model, count=10)
    rows = list(csv.DictReader((tmp_path / "todo.csv").read_text().splitlines()))
    distances = [abs(float(row["probability"]) - 0.5) for row in rows]
    assert len({row["text"] for row in rows}) == 10 and distances == sorted(distances)
    assert sum(row["text"] in mixed for row in rows) >= 8
    for row in rows[:6]:
        row["label"] = "bad"
    with (tmp_path / "todo.csv").open("w") as stream:
        table = csv.DictWriter(stream, rows[0])
        table.writeheader()
        table.writerows(rows)
    first = write(tmp_path / "first.jsonl", labelled(20))
    names, is_noise = read_labels(Labels(files=[str(first), str(tmp_path / "todo.csv")]))
    assert len(names) == 26 and is_noise.sum() == 16  # rows without a label are left out


def test_thresholds_by_hand():
    scores = np.array([0.9, 0.8, 0.7, 0.6, 0.5, 0.95, 0.2])
    is_noise = np.array([False, False, False, False, False, True, True])
    threshold = threshold_for(scores, is_noise, 0.2)  # one of five good texts may go
    assert 0.8 < threshold < 0.8001
    report = evaluate_scores(scores, is_noise, threshold)
    assert (report.false_positives.hits, report.recall.hits, report.precision.hits) == (1, 1, 1)
    assert report.accuracy == Share(1, 7)
    low, high = Share(90, 100).interval  # Wilson's, from a table
    assert (round(low, 4), round(high, 4)) == (0.8256, 0.9448)
    assert Share(0, 0).interval == (0.0, 1.0)


def test_folds_are_stratified():
    is_noise = np.array([n % 3 == 0 for n in range(100)])
    fold = folds_of([str(n) for n in range(100)], is_noise, 5, 0)
    for number in range(5):
        assert 19 <= (fold == number).sum() <= 21 and 6 <= is_noise[fold == number].sum() <= 7


def test_mistakes(tmp_path, model):
    labels = write(tmp_path / "l.jsonl", [{"text": "x", "label": "maybe"}, {"text": "x"}, {"label": "bad"}])
    with pytest.raises(UserError) as found:
        read_labels(Labels(files=[str(labels), "no.jsonl"]))
    assert len(found.value.problems) == 3
    with pytest.raises(UserError, match="of both kinds"):
        read_labels(Labels(files=[str(write(tmp_path / "g.jsonl", labelled(1)))]))
    with pytest.raises(UserError, match=r"no noise.json in it; make the model with"):
        run_stage("noise apply", input=[str(labels)], output=tmp_path / "o", model=tmp_path)
    with pytest.raises(UserError, match="exists already"):
        run_stage("noise train", labels__files=[str(labels)], output=model)


def test_fasttext_behind_the_same_interface(tmp_path):
    pytest.importorskip("fasttext", reason="fasttext-community is not installed: pip install 'llmrecipes[data]'")
    pytest.importorskip("fugashi", reason="fugashi is not installed: pip install 'llmrecipes[data]'")
    labels = write(tmp_path / "labels.jsonl", labelled(200))
    for name in ("a", "b"):
        run_stage(
            "noise train", labels__files=[str(labels)], output=tmp_path / name, model="fasttext", false_positives=0.05
        )
    found = [load_model(tmp_path / name)[0].probability([r["text"] for r in labelled(20, 5)]) for name in ("a", "b")]
    assert np.array_equal(*found)
    assert ((found[0] > 0.5) == [n % 2 == 1 for n in range(20)]).mean() >= 0.9


@pytest.fixture(scope="module")
def vectors_model(tmp_path_factory):
    """Trained on vectors of 24 words: advertisements' words point one way, the prose's another."""
    pytest.importorskip("fugashi", reason="fugashi is not installed: pip install 'llmrecipes[data]'")
    folder = tmp_path_factory.mktemp("vectors")
    draw = np.random.default_rng(0)
    lines = ["24 8"]
    noise = ("激安", "通販", "ランキング", "位", "今", "送料", "無料", "買える", "買う", "クリック")
    other = ("年", "そば", "山", "川", "町", "駅", "本", "犬", "雨", "店", "靴", "大切", "人", "住む")
    for word in noise + other:
        vector = draw.normal(size=8) + (4 if word in noise else -4)
        lines.append(f"{word} {' '.join(map(str, vector))}")
    (folder / "words.txt").write_text("\n".join(lines))
    labels = write(folder / "labels.jsonl", labelled(120))
    for name in ("model", "again"):
        words = {"model": "vectors", "vectors": str(folder / "words.txt")}
        run_stage("noise train", labels__files=[str(labels)], output=folder / name, false_positives=0.05, **words)
    (folder / "words.txt").unlink()
    return folder / "model"


def test_vectors_behind_the_same_interface(vectors_model, tmp_path):
    """Bytes are those of a second training; loading needs no vectors file; no score depends on the other texts."""
    assert hashes(vectors_model) == hashes(vectors_model.parent / "again")
    model, settings = load_model(vectors_model)
    examples = [record["text"] for record in labelled(40, 5)]
    scores = model.probability(examples)
    assert ((scores > 0.5) == [n % 2 == 1 for n in range(40)]).mean() >= 0.9
    np.testing.assert_allclose([model.probability([text])[0] for text in examples], scores, atol=1e-12)
    model.save(tmp_path / "copy", {"threshold": settings["threshold"], "report": settings["report"]})
    assert hashes(tmp_path / "copy") == hashes(vectors_model)
    assert np.array_equal(load_model(tmp_path / "copy")[0].probability(examples), scores)
    assert np.isfinite(model.probability(["", "zzz", "。", "\n"])).all() and not len(model.probability([]))
    write(tmp_path / "in.jsonl", examples)
    run_stage("noise apply", input=[str(tmp_path / "in.jsonl")], output=tmp_path / "out", model=vectors_model)
    assert texts(tmp_path / "out") == [t for t, s in zip(examples, scores, strict=True) if s < settings["threshold"]]


def test_the_machine_is_scikit_learns(vectors_model):
    """Our sum over support vectors is SVC's decision; without the bias it is not."""
    from sklearn.svm import SVC

    model, _ = load_model(vectors_model)
    draw = np.random.default_rng(1)
    rows, is_noise = draw.normal(size=(60, 61)) / 8, draw.random(60) < 0.3
    model._train(rows, is_noise)
    numbers, machine = model._numbers, SVC(C=2.0, gamma=0.5).fit(rows, is_noise)
    distances = ((rows[:, None] - numbers["support"]) ** 2).sum(2)
    decision = np.exp(-0.5 * distances) @ numbers["weights"]
    np.testing.assert_allclose(decision + numbers["bias"], machine.decision_function(rows), atol=1e-9)
    assert abs(numbers["bias"][0]) > 0.01  # the mutant differs


def test_mistakes_in_vectors(tmp_path):
    for text, match in (
        ("a 1 2\nb 1", "1 numbers where"),
        ("a 1 x", "not a word and numbers"),
        ("2 3\n", "no word vec"),
    ):
        (tmp_path / "v.txt").write_text(text)
        with pytest.raises(UserError, match=match):
            read_vectors(str(tmp_path / "v.txt"))
    with pytest.raises(UserError, match="neither a file nor an installed package"):
        read_vectors("no_such_package")
    with pytest.raises(UserError, match="holds no word vectors"):
        read_vectors("json")
    labels = write(tmp_path / "l.jsonl", labelled(8))
    for wrong in ({"model": "vectors"}, {"vectors": "ja_ginza"}):
        with pytest.raises(UserError, match="vectors: "):
            run_stage("noise train", labels__files=[str(labels)], output=tmp_path / "m", **wrong)


@pytest.mark.real
def test_real_labels_with_vectors(real_corpus):
    """Cross-validated as the recipe does it: measured 0.791, with five other seeds of the folds 0.781 to 0.789."""
    pytest.importorskip("ja_ginza", reason="ja_ginza is not installed: pip install 'llmrecipes[noise]'")
    labels = Labels(files=[str(real_corpus.parent / "noise" / "noise_annotations_ja.jsonl")], noise=["bad"])
    config = NoiseTrainConfig(labels=labels, output="", model="vectors", vectors="ja_ginza")
    report = cross_validate(config, *read_labels(labels), read_vectors("ja_ginza"))
    assert report.accuracy.value >= 0.775 and report.accuracy.total == 1263
    assert report.false_positives.value <= 0.05


@pytest.mark.real
def test_real_labels(real_corpus, tmp_path):
    """Cross-validated on the labels that can be had: the interval reaches the 0.775 of all 1,587."""
    labels = real_corpus.parent / "noise" / "noise_annotations_ja.jsonl"
    pytest.importorskip("fugashi", reason="fugashi is not installed: pip install 'llmrecipes[data]'")
    config = Path(__file__).parents[2] / "recipes" / "data" / "noise_train.yaml"
    from data_prep.commands import run

    words = ["--config", str(config), "--labels.files", json.dumps([str(labels)]), "--output", str(tmp_path / "m")]
    run("noise", ["train", *words])
    report = json.loads((tmp_path / "m" / "noise.json").read_text())["report"]
    accuracy = Share(**report["accuracy"])
    assert accuracy.value >= 0.75 and accuracy.interval[1] >= 0.775
    assert Share(**report["false_positives"]).value <= 0.05

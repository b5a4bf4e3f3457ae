"""Domains without labels: equal sizes, topics apart, points that grow with the text, and what is refused."""

from __future__ import annotations

import json

import numpy as np
import pytest
from helpers import cli

from data_prep.domain_vectors import Domains, domain_weights
from data_prep.stages.domains import assign, fair_sizes, learn

pytest.importorskip("sklearn")


def topics(count: int = 31) -> list[dict]:
    """Towns and sums, in turns, with a field of their own."""
    towns = [f"風崎町を流れる川は{i}本である。The river flows through Kazazaki." for i in range(count)]
    sums = [f"{i} + {i + 1} = {2 * i + 1}: apples, oranges and 計算の練習" for i in range(count)]
    return [{"text": text, "topic": topic} for pair in zip(towns, sums, strict=True) for topic, text in enumerate(pair)]


@pytest.fixture(scope="module")
def made(tmp_path_factory):
    """The folder that the command wrote."""
    folder = tmp_path_factory.mktemp("domains")
    (folder / "texts.jsonl").write_text("".join(json.dumps(record) + "\n" for record in topics()))
    words = ["data", "domains", "--input", folder / "texts.jsonl", "--output", folder / "out", "--clusters", 2]
    assert cli(*words) == 0
    return folder


def lines(folder, number):
    return (folder / f"domain_{number}.jsonl").read_text(encoding="utf-8").splitlines()


def test_topics_are_found_and_sizes_are_equal(made):
    files = [list(map(json.loads, lines(made / "out", n))) for n in (0, 1)]
    assert [len(file) for file in files] == [31, 31]
    assert sorted(len({record["topic"] for record in file}) for file in files) == [1, 1]
    assert all(record["cluster"] == n for n, file in enumerate(files) for record in file)
    assert sorted(r["text"] for file in files for r in file) == sorted(r["text"] for r in topics())
    report = json.loads((made / "out" / "domains.json").read_text())
    assert [entry["documents"] for entry in report] == [31, 31]
    assert {"kazazaki"} <= set(report[0]["terms"]) | set(report[1]["terms"])


def test_sizes_differ_by_one_at_most_over_all_batches(made, monkeypatch, tmp_path):
    """Five domains of 62 documents that come seven at a time."""
    monkeypatch.setattr("data_prep.stages.domains.BATCH", 7)
    words = ["data", "domains", "--input", made / "texts.jsonl", "--output", tmp_path / "five", "--clusters", 5]
    assert cli(*words) == 0
    sizes = [len(lines(tmp_path / "five", n)) for n in range(5)]
    assert sorted(sizes) == [12, 12, 12, 13, 13]
    present, rng = np.zeros(3, int), np.random.default_rng(0)
    for _ in range(50):
        more = fair_sizes(int(rng.integers(1, 5)), present)
        assert (more >= 0).all()
        present = present + more
        assert present.max() - present.min() <= 1


def test_assignment_is_nearly_the_cheapest_there_is():
    """Against the exact one of scipy; the nearest domain with room, document after document, is the mutant."""
    optimize = pytest.importorskip("scipy.optimize")
    rng, seen = np.random.default_rng(0), 0
    for documents, domains in ((50, 3), (203, 5), (400, 8)):
        cost = rng.random((documents, domains)) ** 3 + rng.random(domains) / 2
        sizes = fair_sizes(documents, np.zeros(domains, int))
        chosen = assign(cost, sizes)
        assert (np.bincount(chosen, minlength=domains) == sizes).all()
        exact = np.repeat(cost, sizes, axis=1)
        best = exact[optimize.linear_sum_assignment(exact)].sum()
        assert best - 1e-9 <= cost[np.arange(documents), chosen].sum() <= 1.002 * best
        room, greedy = sizes.copy(), 0.0
        for row in cost:
            place = int(np.where(room > 0, row, np.inf).argmin())
            room[place] -= 1
            greedy += row[place]
        assert greedy > 1.02 * best
        seen += 1
    assert seen == 3


def test_points_of_growing_texts_are_those_of_scikit_learn():
    """In one pass over the text what tf-idf, SVD and normalizing give of each prefix, cut and unknown words too."""
    from sklearn.decomposition import TruncatedSVD
    from sklearn.feature_extraction.text import ENGLISH_STOP_WORDS, TfidfVectorizer
    from sklearn.preprocessing import normalize

    from data_prep.domain_vectors import words

    texts = [record["text"] for record in topics()]
    found, _ = learn(texts, 2, 10, 1000, seed=0)

    def analyze(text):
        return [word for word in words(text) if word not in ENGLISH_STOP_WORDS]

    counter = TfidfVectorizer(analyzer=analyze, max_df=0.7)
    table = counter.fit_transform(texts)
    svd = TruncatedSVD(10, random_state=0).fit(table)
    text = "Kazazaki: 12 apples; 風崎町の計算、unknown words. riv"
    ends = list(range(len(text) + 1))
    peer = normalize(svd.transform(counter.transform([text[:end] for end in ends])))
    points = found.prefix_points(text, ends)
    np.testing.assert_allclose(points, peer, atol=1e-9)
    np.testing.assert_allclose(points, found.points([text[:end] for end in ends]), atol=1e-12)
    assert not points[0].any() and np.linalg.norm(points[-1]) == pytest.approx(1)


def test_weights_are_those_of_the_paper():
    centers = np.array([[1.0, 0.0], [0.0, 1.0], [0.6, 0.8]])
    point = np.array([[1.0, 0.0], [0.0, 0.0]])
    weights = domain_weights(point, centers, temperature=0.5)
    want = np.exp(-np.array([0.0, 2.0, 0.16 + 0.64]) / 0.5)
    np.testing.assert_allclose(weights[0], want / want.sum(), atol=1e-12)
    np.testing.assert_allclose(weights[1], 1 / 3)  # nothing is known yet
    two = domain_weights(point, centers, temperature=0.5, top_k=2)
    np.testing.assert_allclose(two[0], [want[0] / (want[0] + want[2]), 0, want[2] / (want[0] + want[2])], atol=1e-12)
    np.testing.assert_allclose(two[1], 1 / 3)
    np.testing.assert_allclose(domain_weights(point, centers, temperature=1e-4)[0], [1, 0, 0], atol=1e-12)


def test_what_cannot_be_is_said_in_one_line(made, tmp_path, capsys):
    inputs = ["data", "domains", "--input", made / "texts.jsonl"]
    for words, problem in (
        ([*inputs, "--output", tmp_path / "x", "--clusters", 1], "--clusters 1: 2 or more"),
        ([*inputs, "--output", tmp_path / "x", "--clusters", 40], "62 documents are too few"),
        ([*inputs, "--output", made / "out"], "exists already"),
        ([*inputs, "--output", tmp_path, "--overwrite", "true"], "was not written by data domains"),
        ([*inputs, "--output", tmp_path / "x", "--field", "body"], "no field 'body'"),
    ):
        assert cli(*words) == 2
        assert problem in capsys.readouterr().err
    assert not (tmp_path / "x").exists()
    (tmp_path / "damaged").mkdir()
    for name in ("vectors.npz", "vocabulary.json"):
        (tmp_path / "damaged" / name).write_text("x")
    for folder, problem in ((tmp_path, "no domains in it"), (tmp_path / "damaged", "damaged")):
        with pytest.raises(Exception, match=problem):
            Domains.read(folder)

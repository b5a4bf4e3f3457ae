"""Genres: planted topics are found, caps are met exactly, and order and sharding change nothing."""

import random

import numpy as np
import pytest
from stages import hashes, manifest, read, run_stage, write

from data_prep.frame.config import read_config
from data_prep.stages.cluster import ClusterConfig, kept_sizes, top_terms

pytest.importorskip("sklearn", reason="scikit-learn is not installed: pip install 'llmrecipes[data]'")

TOPICS = {
    "料理": ["鍋", "醤油", "野菜", "煮る", "味噌", "弁当", "レシピ", "塩", "砂糖", "包丁"],
    "野球": ["投手", "打者", "試合", "監督", "ホームラン", "球場", "守備", "優勝", "選手", "延長"],
    "天文": ["銀河", "望遠鏡", "惑星", "軌道", "彗星", "観測", "太陽", "衛星", "重力", "恒星"],
}


def documents(sizes, seed=0):
    draw, found = random.Random(seed), []
    for (topic, nouns), size in zip(TOPICS.items(), sizes, strict=True):
        for number in range(size):
            text = "".join(f"{draw.choice(nouns)}と{draw.choice(nouns)}の話です。" for _ in range(15))
            found.append({"text": f"{text}{number}", "topic": topic})
    draw.shuffle(found)
    return found


def agreement(records):
    """Adjusted Rand index of topics and genres."""
    from sklearn.metrics import adjusted_rand_score

    return adjusted_rand_score([record["topic"] for record in records], [record["genre"] for record in records])


@pytest.mark.parametrize("vectors", ["tfidf", "fasttext"])
def test_planted_topics_are_found(tmp_path, vectors, capsys):
    if vectors == "fasttext":
        pytest.importorskip("fasttext", reason="fasttext-community is not installed: pip install 'llmrecipes[data]'")
    write(tmp_path / "in.jsonl", documents((120, 80, 60)))
    values = {"clusters": 6, "genres": 3, "vectors": vectors, "dimensions": 50}
    run_stage("cluster", input=[str(tmp_path / "in.jsonl")], output=tmp_path / "out", **values)
    records = read(tmp_path / "out")
    assert len(records) == 260 and agreement(records) > 0.9
    found = manifest(tmp_path / "out")
    for genre in found["genres"].values():
        assert any(all(term in "".join(nouns) for term in genre["terms"][:4]) for nouns in TOPICS.values()), genre
    assert (tmp_path / "out" / "genres.png").stat().st_size > 5000
    assert "terms" in capsys.readouterr().out


def test_caps_are_exact_and_sharding_changes_nothing(tmp_path):
    made = documents((150, 60, 40))
    write(tmp_path / "one" / "a.jsonl", [*made, b"{"])
    for part in range(5):
        write(tmp_path / "many" / f"{part}.jsonl", made[part::5][::-1])
    values = {"clusters": 6, "genres": 3, "vectors": "tfidf", "max_share": 0.3, "dimensions": 50}
    for name in ("one", "many"):
        run_stage("cluster", input=[str(tmp_path / name)], output=tmp_path / f"{name}-out", **values)
    one, many = (sorted(r["text"] for r in read(tmp_path / f"{name}-out")) for name in ("one", "many"))
    genres = manifest(tmp_path / "one-out")["genres"].values()
    assert one == many and len(one) == sum(g["kept"] for g in genres) < 250
    assert sum(g["documents"] for g in genres) == 250
    assert all(g["kept"] == min(g["documents"], 75) for g in genres)
    for number in range(2):
        run_stage("cluster", input=[str(tmp_path / "many")], output=tmp_path / "array", task=f"{number}/2", **values)
    run_stage("cluster", input=[str(tmp_path / "many")], output=tmp_path / "array", **values)
    assert hashes(tmp_path / "array") == hashes(tmp_path / "many-out")


def test_sizes_by_hand():
    def config(**values):
        words = ["--input=[a]", "--output=b", "--clusters=3", "--genres=3", *(f"--{k}={v}" for k, v in values.items())]
        return read_config(ClusterConfig, words)

    sizes = np.array([1000, 100, 10])
    assert kept_sizes(sizes, config()).tolist() == [1000, 100, 10]
    assert kept_sizes(sizes, config(temperature=0.5)).tolist() == [100, 32, 10]
    assert kept_sizes(sizes, config(temperature=0)).tolist() == [10, 10, 10]
    assert kept_sizes(sizes, config(max_share=0.1)).tolist() == [111, 100, 10]
    assert kept_sizes(sizes, config(caps='{"0": 7}')).tolist() == [7, 100, 10]


def test_terms_by_hand():
    texts = ["apple pie the", "apple tart the", "galaxy star the", "galaxy moon the"]
    assert [terms[0] for terms in top_terms(texts, np.array([0, 0, 1, 1]), 2)] == ["apple", "galaxy"]

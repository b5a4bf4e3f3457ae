"""Duplicates: across files, by characters, against all pairs, and the same for every order and sharding."""

import csv
import gzip
import itertools
import json
import random

import numpy as np
import pytest
from stages import hashes, manifest, run_stage, texts, write

from data_prep.frame.records import Document, read_documents
from data_prep.stages.dedup import MinHash, decide, minhasher, ngram_hashes, sign

pytest.importorskip("rensa", reason="rensa is not installed: pip install 'llmrecipes[data]'")


def shingles(text, n=5):
    packed = "".join(text.split())
    return {packed[i : i + n] for i in range(max(1, len(packed) - n + 1))}


def jaccard(a, b):
    return len(a & b) / len(a | b)


def planted(count=300, seed=0):
    """Documents, of which many are others with sentences dropped, in every degree."""
    draw = random.Random(seed)
    letters = [chr(c) for c in range(0x4E00, 0x5E00)]
    documents = ["。".join("".join(draw.choices(letters, k=12)) for _ in range(30)) for _ in range(count)]
    for text in documents[: count // 2]:
        share = draw.uniform(0, 0.6)
        documents.append("。".join(part for part in text.split("。") if draw.random() > share))
    draw.shuffle(documents)
    return documents


def plan_of(documents, near):
    found = [Document(text, 0, {}, line, text.encode()) for line, text in enumerate(documents)]
    return decide(sign(found, minhasher(near)), np.zeros(len(found), dtype=np.int64), near)


def check_against_all_pairs(documents, plan, near_pairs):
    """Recall over pairs of 0.8 and more; and every removed document resembles the very one that is kept for it."""
    stays = plan.kept == np.arange(len(documents))
    high = [(i, j) for (i, j), similarity in near_pairs.items() if similarity >= 0.8]
    found = sum(not (stays[i] and stays[j]) for i, j in high)
    for document in np.flatnonzero(~stays):
        pair = tuple(sorted((int(document), int(plan.kept[document]))))
        assert near_pairs.get(pair, 0) >= 0.5, (pair, near_pairs.get(pair))
    assert np.all(stays[plan.kept])  # what is kept for others stays itself
    return found, len(high)


def test_against_all_pairs():
    documents = planted(200)
    sets = [shingles(text) for text in documents]
    pairs = {(i, j): jaccard(sets[i], sets[j]) for i, j in itertools.combinations(range(len(sets)), 2)}
    found, high = check_against_all_pairs(documents, plan_of(documents, MinHash()), pairs)
    assert high >= 15 and found >= 0.95 * high, (found, high)
    # The mutant that does not check candidates removes documents that hardly resemble what is kept.
    with pytest.raises(AssertionError):
        check_against_all_pairs(documents, plan_of(documents, MinHash(threshold=0.05, rows=2)), pairs)


@pytest.mark.real
def test_against_all_pairs_of_real_text(real_corpus):
    sparse = pytest.importorskip("scipy.sparse", reason="scipy is not installed: pip install 'llmrecipes[data]'")
    draw, documents = random.Random(5), []
    for name in ("ja_docs", "ja_wiki", "math", "en"):
        found = itertools.islice(read_documents(real_corpus / f"{name}.jsonl.gz", "text", 1e9), 400)
        documents += [document.text[:4000] for document in found]
    for text in draw.sample(documents, 400):
        share = draw.choice((0.02, 0.05, 0.1, 0.2))
        documents.append("".join(part for part in text.splitlines(keepends=True) if draw.random() > share) or text)
    assert len(documents) == 2000
    columns = [np.unique(ngram_hashes("".join(text.split()), 5)) for text in documents]
    _, ids = np.unique(np.concatenate(columns), return_inverse=True)
    ends = np.cumsum([0, *map(len, columns)])
    table = sparse.csr_matrix((np.ones(len(ids), dtype=np.int32), ids, ends))
    common = (table @ table.T).tocoo()
    sizes = np.diff(ends)
    similarity = common.data / (sizes[common.row] + sizes[common.col] - common.data)
    pairs = {
        (int(i), int(j)): float(s)
        for i, j, s in zip(common.row, common.col, similarity, strict=True)
        if i < j and s > 0.3
    }
    plan = plan_of(documents, MinHash())
    found, high = check_against_all_pairs(documents, plan, pairs)
    print(f"{high} pairs of 0.8 and more, {found} found; {(plan.kept != np.arange(2000)).sum()} documents removed")
    assert high >= 250 and found >= 0.95 * high


def test_duplicates_in_different_files_go_and_are_mapped(tmp_path):
    """The source systems looked at one file at a time, and left what stands in two."""
    base = planted(20, 1)[:20]
    longer = base[3] + "。" + "追加の文です"
    write(tmp_path / "in" / "a.jsonl", base)
    write(tmp_path / "in" / "b.jsonl", ["別の文書です。" * 3, base[5], longer])
    run_stage("dedup", input=[str(tmp_path / "in")], output=tmp_path / "out")
    kept = texts(tmp_path / "out")
    assert kept.count(base[5]) == 1 and longer in kept and base[3] not in kept
    found = manifest(tmp_path / "out")
    assert found["rejected"]["equal"]["documents"] >= 1 and found["rejected"]["near_duplicate"]["documents"] >= 1
    rows = list(
        csv.DictReader(gzip.decompress((tmp_path / "out" / "removed.csv.gz").read_bytes()).decode().splitlines())
    )
    assert {"removed_file": "a", "removed_line": "4", "kept_file": "b", "kept_line": "3"}.items() <= next(
        row for row in rows if row["removed_line"] == "4" and row["removed_file"] == "a"
    ).items()
    assert len(rows) == sum(flow["documents"] for flow in found["rejected"].values())


def test_the_better_source_stays_though_it_is_shorter(tmp_path):
    base = planted(10, 2)[:10]
    write(tmp_path / "in" / "web.jsonl", [base[0] + "。広告はこちら", base[1]])
    write(tmp_path / "in" / "wiki.jsonl", [base[0], base[1]])
    run_stage("dedup", input=[str(tmp_path / "in")], output=tmp_path / "out", priority=["wiki", "web"])
    assert texts(tmp_path / "out" / "web.jsonl.zst") == [] and texts(tmp_path / "out" / "wiki.jsonl.zst") == base[:2]


def test_characters_not_bytes():
    """Similar beginnings in bytes: the source system compared the first 256 bytes, 85 Japanese characters."""
    head = "".join(chr(0x3041 + n % 80) for n in range(90))
    plan = plan_of([head + "東京" * 200 + "の話", head + "".join(chr(0x5000 + n) for n in range(400))], MinHash())
    assert plan.kept.tolist() == [0, 1]


def test_only_equal_ones_without_near(tmp_path):
    base = planted(10, 3)[:10]
    write(tmp_path / "in.jsonl", [base[0], base[0] + "\n", base[0] + "。終"])
    run_stage("dedup", input=[str(tmp_path / "in.jsonl")], output=tmp_path / "out", near=None)
    assert len(texts(tmp_path / "out")) == 2


def test_sharding_and_order_change_nothing_and_a_kill_neither(tmp_path):
    documents = planted(200, 4) + ["短い"] * 3 + [""]
    write(tmp_path / "one" / "a.jsonl", documents)
    for part in range(7):
        write(tmp_path / "many" / f"{part}.jsonl", documents[part::7][::-1])
    run_stage("dedup", input=[str(tmp_path / "one")], output=tmp_path / "one-out")
    run_stage("dedup", input=[str(tmp_path / "many")], output=tmp_path / "many-out", workers=2)
    assert sorted(texts(tmp_path / "one-out")) == sorted(texts(tmp_path / "many-out"))
    # What a killed run may leave: some signatures, no plan, some results without their marks.
    for number in (0, 1):
        run_stage("dedup", input=[str(tmp_path / "many")], output=tmp_path / "killed", task=f"{number}/2")
        done = tmp_path / "killed" / ".done"
        (done / "plan.json").unlink(missing_ok=True)
        for mark in list((done / "dedup").glob("*.json"))[:2] if (done / "dedup").is_dir() else []:
            mark.unlink()
    run_stage("dedup", input=[str(tmp_path / "many")], output=tmp_path / "killed")
    assert hashes(tmp_path / "killed") == hashes(tmp_path / "many-out")
    assert manifest(tmp_path / "one-out")["rejected"] == manifest(tmp_path / "many-out")["rejected"]


def test_groups_of_a_plan_are_stable_under_permutation():
    documents = planted(150, 6)
    places = list(range(len(documents)))
    random.Random(9).shuffle(places)
    straight, mixed = plan_of(documents, MinHash()), plan_of([documents[p] for p in places], MinHash())
    kept = {documents[i] for i in np.flatnonzero(straight.kept == np.arange(len(documents)))}
    other = {documents[places[i]] for i in np.flatnonzero(mixed.kept == np.arange(len(documents)))}
    assert kept == other and len(kept) < len(documents)


def test_short_and_empty_files(tmp_path):
    write(tmp_path / "in" / "a.jsonl", ["あ", "い", "あ"])
    write(tmp_path / "in" / "b.jsonl", [])
    run_stage("dedup", input=[str(tmp_path / "in")], output=tmp_path / "out")
    assert texts(tmp_path / "out") == ["あ", "い"]
    assert json.loads((tmp_path / "out" / "manifest.json").read_text())["removed"] == "removed.csv.gz"

"""`llmrecipes data domains`: documents into domains of equal size, without labels, one file for an expert each (c-BTM).

tf-idf, SVD, unit length and balanced k-means (2303.14177), learned on a sample; then every document goes to a domain,
and the sizes of no two differ by more than one.
"""

from __future__ import annotations

import json
import os
import shutil
from collections.abc import Iterator
from contextlib import ExitStack
from pathlib import Path
from typing import Any

import numpy as np

from data_prep.domain_vectors import Domains, distances, words
from data_prep.frame.chance import digest
from data_prep.frame.extras import need
from data_prep.jsonl import Chunk, check_inputs, chunks, parse
from data_prep.stages.cluster import top_terms
from llmrecipes.errors import UserError

BATCH = 50_000  # documents that are given away at once
ROUNDS = 20  # of k-means, as the paper's code
REPORT = "domains.json"


def domains(
    input: list[str],
    output: str,
    clusters: int = 8,
    dimensions: int = 100,
    sample_documents: int = 50_000,
    max_words: int = 50_000,
    max_characters: int = 20_000,
    field: str = "text",
    seed: int = 0,
    overwrite: bool = False,
) -> None:
    """Sorts documents into domains of equal size, without labels: domain_0.jsonl, domain_1.jsonl, ...

    Writes also what `llmrecipes ensemble` weighs experts by (vectors.npz, vocabulary.json), and sizes and typical
    words (domains.json). The lines keep their fields and get one more, `cluster`.

    Args:
        input: JSONL files (plain, .gz, .zst) or Hugging Face dataset folders.
        output: folder to write.
        clusters: number of domains.
        dimensions: of the projection of the tf-idf words.
        sample_documents: how many documents, chosen by hash, words and centres are learned from.
        max_words: the most frequent so many words are known.
        max_characters: how much of a document is looked at.
        field: name of the field that holds the text.
        seed: of the projection and of the first centres.
        overwrite: replace an existing folder.
    """
    paths, folder = check_inputs(input), Path(output)
    if clusters < 2:
        raise UserError(f"--clusters {clusters}: 2 or more")
    if folder.exists() and not (overwrite and (folder / REPORT).is_file()):
        why = "exists already; choose another --output, or say --overwrite true"
        raise UserError(f"{folder}: {why if not overwrite else 'was not written by data domains; it is left alone'}")
    texts = _sample(paths, field, sample_documents, max_characters, seed)
    if len(texts) < clusters * 2:
        raise UserError(f"--clusters {clusters}: {len(texts)} documents are too few")
    found, labels = learn(texts, clusters, dimensions, max_words, seed)
    partial = folder.with_name(f".{folder.name}.{os.getpid()}.tmp")
    partial.mkdir(parents=True)
    try:
        sizes = _write(found, paths, field, max_characters, partial)
        report = [
            {"documents": size, "terms": terms}
            for size, terms in zip(sizes.tolist(), top_terms(texts, labels, clusters), strict=True)
        ]
        found.save(partial)
        (partial / REPORT).write_text(json.dumps(report, ensure_ascii=False, indent=1), encoding="utf-8")
        if folder.exists():
            shutil.rmtree(folder)
        partial.rename(folder)
    finally:
        shutil.rmtree(partial, ignore_errors=True)
    for number, entry in enumerate(report):
        print(f"domain_{number}.jsonl {entry['documents']:>9,} documents  {' '.join(entry['terms'])}")


def _sample(paths: list[Path], field: str, count: int, max_characters: int, seed: int) -> list[str]:
    """The documents with the smallest hashes, in the order of the hashes."""
    found = list[tuple[int, str]]()
    for path in paths:
        for _, text in _records(path, field):
            text = text[:max_characters]
            found.append((digest(text, seed, "domains"), text))
            if len(found) >= 2 * count + 1000:
                found = sorted(found)[:count]
    return [text for _, text in sorted(found)[:count]]


def learn(texts: list[str], clusters: int, dimensions: int, max_words: int, seed: int) -> tuple[Domains, np.ndarray]:
    """Words, projection and centres from texts, and the domain of each, [N]."""
    text_features = need("sklearn.feature_extraction.text", "scikit-learn")
    stop = text_features.ENGLISH_STOP_WORDS
    counter = text_features.TfidfVectorizer(
        analyzer=lambda text: [word for word in words(text) if word not in stop],
        max_features=max_words,
        min_df=1 if len(texts) < 1000 else 3,
        max_df=0.7,
    )
    try:
        table = counter.fit_transform(texts)
    except ValueError:
        raise UserError("data domains: the documents have no words that tell them apart") from None
    size = min(dimensions, table.shape[1] - 1, table.shape[0] - 1)
    if size < 1:
        raise UserError("data domains: the documents have too few different words")
    svd = need("sklearn.decomposition", "scikit-learn").TruncatedSVD(size, random_state=seed).fit(table)
    directions = svd.components_.T * counter.idf_[:, None]
    known = {word: int(row) for word, row in counter.vocabulary_.items()}
    points = Domains(known, directions, np.zeros((clusters, size))).points(texts)
    centers, labels = balanced_kmeans(points, clusters, seed)
    return Domains(known, directions, centers), labels


def balanced_kmeans(points: np.ndarray, clusters: int, seed: int) -> tuple[np.ndarray, np.ndarray]:
    """Centres [K, D] and labels [N] of clusters whose sizes differ by one at most."""
    kmeans = need("sklearn.cluster", "scikit-learn").KMeans(clusters, random_state=seed, n_init=3)
    centers = kmeans.fit(points).cluster_centers_
    labels = np.full(len(points), -1)
    for _ in range(ROUNDS):
        before, labels = labels, assign(distances(points, centers), fair_sizes(len(points), np.zeros(clusters, int)))
        centers = np.stack([points[labels == number].mean(axis=0) for number in range(clusters)])
        if (labels == before).all():
            break
    return centers, labels


def fair_sizes(count: int, present: np.ndarray) -> np.ndarray:
    """How many of ``count`` more documents each domain gets, so that sizes, now ``present`` [K], are even again."""
    total = count + int(present.sum())
    wanted = np.full(len(present), total // len(present))
    wanted[np.argsort(-present, kind="stable")[: total % len(present)]] += 1
    return wanted - present


def assign(cost: np.ndarray, sizes: np.ndarray) -> np.ndarray:
    """A domain for each document, [N]: exactly ``sizes`` [K] of each, at a sum of ``cost`` [N, K] near the smallest.

    Prices for crowded domains rise until nearly as many choose each as may; the few too many move where it costs least.
    """
    cost = cost.astype(np.float64)
    prices, unit = np.zeros(len(sizes)), max(float(cost.std()), 1e-12)
    best, fewest = prices.copy(), len(cost) + 1
    for step in range(200):
        load = np.bincount((cost + prices).argmin(axis=1), minlength=len(sizes))
        if (wrong := int(np.abs(load - sizes).sum())) < fewest:
            best, fewest = prices.copy(), wrong
        if wrong == 0:
            break
        prices = prices + unit / (1 + step / 10) * (load - sizes) / np.maximum(sizes, 1)
    cost += best
    chosen = cost.argmin(axis=1)
    load = np.bincount(chosen, minlength=len(sizes))
    extra = cost - cost[np.arange(len(cost)), chosen][:, None]
    over, under = np.flatnonzero(load > sizes), np.flatnonzero(load < sizes)
    candidates = np.flatnonzero(np.isin(chosen, over))
    moves = extra[np.ix_(candidates, under)]
    for flat in np.argsort(moves, axis=None, kind="stable").tolist():
        document, to = candidates[flat // len(under)], under[flat % len(under)]
        if load[chosen[document]] > sizes[chosen[document]] and load[to] < sizes[to]:
            load[chosen[document]] -= 1
            load[to] += 1
            chosen[document] = to
    assert (load == sizes).all()
    return chosen


def _write(found: Domains, paths: list[Path], field: str, max_characters: int, folder: Path) -> np.ndarray:
    """Every document into its domain's file; returns their sizes."""
    sizes = np.zeros(len(found.centers), int)
    with ExitStack() as owned:
        files = [
            owned.enter_context((folder / f"domain_{number}.jsonl").open("w", encoding="utf-8"))
            for number in range(len(sizes))
        ]
        for batch in _batches(paths, field):
            points = found.points([text[:max_characters] for _, text in batch])
            more = fair_sizes(len(batch), sizes)
            chosen = assign(distances(points, found.centers), more)
            sizes += more
            for (record, _), number in zip(batch, chosen.tolist(), strict=True):
                files[number].write(json.dumps(record | {"cluster": number}, ensure_ascii=False) + "\n")
    return sizes


def _batches(paths: list[Path], field: str) -> Iterator[list[tuple[dict[str, Any], str]]]:
    batch = list[tuple[dict[str, Any], str]]()
    for path in paths:
        for one in _records(path, field):
            batch.append(one)
            if len(batch) == BATCH:
                yield batch
                batch = []
    if batch:
        yield batch


def _records(path: Path, field: str) -> Iterator[tuple[dict[str, Any], str]]:
    """Every document that is not empty, with the fields of its line."""
    for chunk in chunks(path, field):
        parse(chunk, field)  # names every broken line
        for line in chunk.lines:
            record = _record(chunk, line, field)
            if record is not None and record[field].strip():
                yield record, record[field]


def _record(chunk: Chunk, line: bytes, field: str) -> dict[str, Any] | None:
    if chunk.is_text:
        return {field: line.decode()}
    return json.loads(line) if line.strip() else None

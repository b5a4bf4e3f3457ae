"""`llmrecipes data cluster`: documents into genres without labels, and genres that are too large cut down.

Passes: vectors and centroids on a sample (one process), the genre of every document (file by file), how many of each
genre stay (one process), and the results (file by file).
"""

from __future__ import annotations

import hashlib
import json
import os
import re
from collections import Counter
from collections.abc import Callable, Iterator
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any, Literal

import numpy as np

from data_prep.frame.chance import digest
from data_prep.frame.config import Finding, StageConfig
from data_prep.frame.extras import need
from data_prep.frame.map import BATCH_CHARACTERS, Judge, Verdict, map_pass
from data_prep.frame.records import Broken, Document, partial_name, read_documents, write_json
from data_prep.frame.shards import Advance, Shard, find_shards, open_output, run_shards
from data_prep.jsonl import fingerprint
from data_prep.stages.dedup import save_arrays
from llmrecipes.errors import UserError

# Runs of one script, as in data_prep.rules.repetition; single hiragana and signs say nothing about a genre.
_WORDS = re.compile("[\u3041-\u309f]{2,}|[\u30a1-\u30ff]+|[\u3400-\u4dbf\u4e00-\u9fff\u3005]+|[A-Za-z\u00c0-\u024f]+")


@dataclass(frozen=True, kw_only=True)
class ClusterConfig(StageConfig):
    """Recipe of `data cluster`.

    Args:
        clusters: fine clusters, of mini-batch k-means over documents.
        genres: coarse ones, of k-means over the centroids of the fine; null keeps the fine ones.
        vectors: fasttext trains word vectors on the sample; tfidf needs no training, and tells genres less well.
        dimensions: of the vectors.
        sample_documents: how many documents, chosen by hash, the vectors and centroids are learned from.
        max_characters: how much of a document is looked at.
        max_share: no genre may have more than this share of the documents that were read; null for no cap.
        caps: at most so many documents of a genre, by its number.
        temperature: 1 keeps sizes as they are, 0 makes all genres as small as the smallest.
        chart: file name of a chart of sizes before and after, in the output folder.
    """

    clusters: int = 1000
    genres: int | None = 20
    vectors: Literal["fasttext", "tfidf"] = "fasttext"
    dimensions: int = 100
    sample_documents: int = 20_000
    max_characters: int = 2000
    max_share: float | None = None
    caps: dict[str, int] = field(default_factory=dict)
    temperature: float = 1.0
    chart: str = "genres.png"

    def problems(self) -> Iterator[Finding]:
        """Counts that cannot be."""
        yield from super().problems()
        if self.genres is not None and self.genres > self.clusters:
            yield ("genres",), f"genres: {self.genres} are more than {self.clusters} clusters", "write fewer, or null"
        if self.sample_documents < self.clusters:
            yield ("sample_documents",), "sample_documents: fewer than clusters", "write ten times clusters or more"
        if not 0 <= self.temperature <= 1:
            yield ("temperature",), f"temperature: {self.temperature} is not between 0 and 1", "write 1 to keep sizes"
        for genre in self.caps:
            if not genre.isdecimal() or int(genre) >= (self.genres or self.clusters):
                yield ("caps", genre), f"caps: {genre!r} is no number of a genre", "name one of manifest.json"


def cluster(config: ClusterConfig) -> None:
    """Clusters, caps, and writes genres.json (sizes and top terms), a table and a chart."""
    shards = find_shards(config.input)
    output = open_output("cluster", config, shards)
    inputs = hashlib.sha256("".join(sorted(fingerprint(shard.path) for shard in shards)).encode()).hexdigest()
    centroids = output / ".done" / "centroids.json"
    if not (centroids.is_file() and json.loads(centroids.read_text())["inputs"] == inputs):
        _learn(config, shards, output)
        write_json(centroids, {"inputs": inputs})
    found = run_shards(_assign, "assign", config, shards, output)
    if found is None:
        print("run the same command again when the other tasks are done: the caps need all sizes")
        return
    genres = _plan(config, shards, output)
    more = {"genres": {str(number): entry for number, entry in enumerate(genres)}}
    if map_pass("cluster", config, make_judge, shards, output, more) is not None:
        _chart(genres, output / config.chart)
        print(_table(genres))


def words(text: str) -> list[str]:
    """Runs of one script, in lower case."""
    return _WORDS.findall(text.lower())


Embed = Callable[[list[str]], np.ndarray]


def _learn(config: ClusterConfig, shards: list[Shard], output: Path) -> None:
    """Vectors, centroids, the genre of each centroid, and the top terms of each genre, from a sample."""
    sklearn = need("sklearn.cluster", "scikit-learn")
    texts = _sample(config, shards)
    if len(texts) < config.clusters:
        raise UserError(f"clusters: {config.clusters} of {len(texts)} documents cannot be; write fewer")
    _train_vectors(config, texts, output)
    rows = _embed(config, output)(texts)
    fine = sklearn.MiniBatchKMeans(config.clusters, random_state=config.seed, n_init=3, batch_size=4096).fit(rows)
    genre = np.arange(config.clusters)
    if config.genres is not None and config.genres < config.clusters:
        sizes = np.bincount(fine.labels_, minlength=config.clusters)
        coarse = sklearn.KMeans(config.genres, random_state=config.seed, n_init=10)
        genre = coarse.fit(fine.cluster_centers_, sample_weight=np.maximum(sizes, 1)).labels_
    save_arrays(
        output / ".done" / "centroids.npz", {"centers": fine.cluster_centers_.astype(np.float32), "genre": genre}
    )
    write_json(output / ".done" / "terms.json", top_terms(texts, genre[fine.labels_], int(genre.max()) + 1))


def _sample(config: ClusterConfig, shards: list[Shard]) -> list[str]:
    """The documents with the smallest hashes: the same for every order and sharding."""
    found = list[tuple[int, str]]()
    for shard in shards:
        for document in read_documents(shard.path, config.field, config.max_document_mb * 1e6):
            if not isinstance(document, Broken):
                text = document.text[: config.max_characters]
                found.append((digest(text, config.seed, "clusters"), text))
                if len(found) >= 2 * config.sample_documents + 1000:
                    found = sorted(found)[: config.sample_documents]
    return [text for _, text in sorted(found)[: config.sample_documents]]


def top_terms(texts: list[str], genre: np.ndarray, num_genres: int, count: int = 8) -> list[list[str]]:
    """For each genre the words whose share of its documents most exceeds that of all, rare ones damped."""
    inside = [Counter[str]() for _ in range(num_genres)]
    for text, number in zip(texts, genre, strict=True):
        inside[number].update(set(words(text)))
    everywhere = sum(inside, Counter[str]())
    sizes = np.bincount(genre, minlength=num_genres)
    found = []
    for number, counts in enumerate(inside):
        scores = {
            word: (n / max(1, sizes[number]) - everywhere[word] / len(texts)) * np.log1p(n)
            for word, n in counts.items()
        }
        found.append(sorted(scores, key=lambda word: (-scores[word], word))[:count])
    return found


def _train_vectors(config: ClusterConfig, texts: list[str], output: Path) -> None:
    if config.vectors == "tfidf":
        return
    import tempfile

    fasttext = need("fasttext", "fasttext-community")
    with tempfile.NamedTemporaryFile("w", suffix=".txt", encoding="utf-8") as file:
        file.writelines(" ".join(words(text)) + "\n" for text in texts)
        file.flush()
        # One thread: with more, the same text gives other vectors (its seed is fixed).
        model = fasttext.train_unsupervised(
            file.name, dim=config.dimensions, minn=0, maxn=0, minCount=3, thread=1, verbose=0
        )
    target = output / ".done" / "vectors.bin"
    partial = partial_name(target)
    model.save_model(str(partial))
    partial.replace(target)


def _embed(config: ClusterConfig, output: Path) -> Embed:
    """A function from texts to vectors of length 1 [D, dimensions]."""
    normalize = need("sklearn.preprocessing", "scikit-learn").normalize
    if config.vectors == "tfidf":
        hashing = need("sklearn.feature_extraction.text", "scikit-learn").HashingVectorizer(
            analyzer=words, n_features=1 << 18, alternate_sign=False
        )
        project = need("sklearn.random_projection", "scikit-learn").SparseRandomProjection(
            config.dimensions, dense_output=True, random_state=config.seed
        )
        project.fit(hashing.transform(["a"]))
        return lambda texts: normalize(project.transform(hashing.transform(texts)))
    model = need("fasttext", "fasttext-community").load_model(str(output / ".done" / "vectors.bin"))
    return lambda texts: normalize(np.stack([model.get_sentence_vector(" ".join(words(text))) for text in texts]))


def _assign(config: ClusterConfig, shard: Shard, output: Path, advance: Advance) -> dict[str, Any]:
    """Line, cluster, genre, hash and characters of every document of a file."""
    embed = _embed(config, output)
    with np.load(output / ".done" / "centroids.npz") as saved:
        centers, genre = saved["centers"], saved["genre"]
    rows, batch, size = list[np.ndarray](), list[Document](), 0

    def finish() -> None:
        if batch:
            vectors = embed([document.text[: config.max_characters] for document in batch])
            nearest = (vectors @ centers.T - (centers**2).sum(axis=1) / 2).argmax(axis=1)
            hashes = [digest(document.raw, config.seed, "cap") >> 1 for document in batch]
            lines = [document.line for document in batch]
            rows.append(
                np.array([lines, nearest, genre[nearest], hashes, [len(d.text) for d in batch]], dtype=np.int64)
            )

    for document in read_documents(shard.path, config.field, config.max_document_mb * 1e6, advance):
        if isinstance(document, Broken):
            continue
        batch.append(document)
        size += len(document.text)
        if size >= BATCH_CHARACTERS:
            finish()
            batch, size = [], 0
    finish()
    table = np.concatenate(rows, axis=1) if rows else np.zeros((5, 0), dtype=np.int64)
    file = output / ".done" / "genres" / f"{shard.name}.npz"
    file.parent.mkdir(parents=True, exist_ok=True)
    save_arrays(file, {"table": table})
    return {"documents": table.shape[1]}


def kept_sizes(sizes: np.ndarray, config: ClusterConfig) -> np.ndarray:
    """How many documents of each genre stay [G]: by temperature, then the share, then the caps; exact."""
    kept = sizes.astype(np.float64)
    if config.temperature < 1 and sizes.any():
        smallest = sizes[sizes > 0].min()
        kept = np.where(sizes > 0, smallest * (np.maximum(sizes, 1) / smallest) ** config.temperature, 0)
    if config.max_share is not None:
        kept = np.minimum(kept, config.max_share * sizes.sum())
    for genre, cap in config.caps.items():
        kept[int(genre)] = min(kept[int(genre)], cap)
    return np.minimum(np.round(kept), sizes).astype(np.int64)


def _plan(config: ClusterConfig, shards: list[Shard], output: Path) -> list[dict[str, Any]]:
    """For each genre its sizes, terms, and the largest hash of a document that stays."""
    tables = []
    for shard in shards:
        with np.load(output / ".done" / "genres" / f"{shard.name}.npz") as saved:
            tables.append(saved["table"])
    _, _, genre, hashes, characters = np.concatenate(tables, axis=1)
    terms = json.loads((output / ".done" / "terms.json").read_text())
    sizes = np.bincount(genre, minlength=len(terms))
    kept = kept_sizes(sizes, config)
    found = []
    for number in range(len(terms)):
        inside = np.sort(hashes[genre == number])
        limit = int(inside[kept[number] - 1]) if kept[number] else -1
        found.append(
            {
                "documents": int(sizes[number]),
                "characters": int(characters[genre == number].sum()),
                "kept": int(kept[number]),
                "terms": terms[number],
                "limit": limit,
            }
        )
    write_json(output / ".done" / "limits.json", [entry.pop("limit") for entry in found])
    return found


def make_judge(config: ClusterConfig, shard: Shard) -> Judge:
    """The judge of one file's documents: the genre is written into those that stay."""
    output = Path(config.output)
    with np.load(output / ".done" / "genres" / f"{shard.name}.npz") as saved:
        line, fine, genre, hashes, _ = saved["table"].tolist()
    limits = json.loads((output / ".done" / "limits.json").read_text())
    known = dict(zip(line, zip(fine, genre, hashes, strict=True), strict=True))

    def judge(document: Document) -> Verdict:
        cluster, number, key = known[document.line]
        if key > limits[number]:
            return Verdict(document.text, f"over_cap_of_genre_{number}")
        return Verdict(document.text, added={"cluster": cluster, "genre": number})

    return lambda documents: [judge(document) for document in documents]


def _table(genres: list[dict[str, Any]]) -> str:
    total, kept = sum(g["documents"] for g in genres), sum(g["kept"] for g in genres)
    lines = [f"{'genre':>5} {'documents':>10} {'share':>7} {'kept':>10} {'share':>7}  terms"]
    for number in sorted(range(len(genres)), key=lambda n: -genres[n]["documents"]):
        g = genres[number]
        lines.append(
            f"{number:>5} {g['documents']:>10,} {g['documents'] / max(1, total):>7.1%} {g['kept']:>10,} "
            f"{g['kept'] / max(1, kept):>7.1%}  {' '.join(g['terms'][:6])}"
        )
    return "\n".join(lines)


def _chart(genres: list[dict[str, Any]], path: Path) -> None:
    """Documents of each genre before and after, the largest first."""
    from matplotlib.backends.backend_agg import FigureCanvasAgg
    from matplotlib.figure import Figure

    figure = Figure(figsize=(8, 4))
    axes = figure.add_subplot()
    order = sorted(range(len(genres)), key=lambda n: -genres[n]["documents"])
    places = np.arange(len(order))
    axes.bar(places - 0.2, [genres[n]["documents"] for n in order], 0.4, label="before")
    axes.bar(places + 0.2, [genres[n]["kept"] for n in order], 0.4, label="after")
    axes.set_xticks(places, [str(n) for n in order], fontsize=6)
    axes.set_xlabel("genre")
    axes.set_ylabel("documents")
    axes.legend()
    figure.tight_layout()
    partial = path.with_name(f".{path.name}.{os.getpid()}.tmp")
    FigureCanvasAgg(figure).print_figure(partial, format="png", metadata={"Software": None})
    partial.replace(path)

"""`llmrecipes data noise train | evaluate | apply | export`: a classifier of advertisements, word lists and the like.

A document is dropped only when the probability of *noise* is at or above a threshold, which is chosen so that few good
documents go. (A source system compared the probability of whichever label came first, and dropped the best documents.)
"""

from __future__ import annotations

import csv
import heapq
import json
from collections.abc import Iterator
from dataclasses import dataclass, field
from pathlib import Path
from typing import Literal

import numpy as np

from data_prep.frame.chance import digest
from data_prep.frame.config import Finding, StageConfig
from data_prep.frame.map import BATCH_CHARACTERS, Judge, Verdict, run_map
from data_prep.frame.records import Broken, Document, read_documents
from data_prep.frame.shards import Shard, find_shards
from data_prep.noise_model import NoiseModel, load_model, new_model
from data_prep.noise_report import Report, evaluate_scores, threshold_for
from data_prep.word_vectors import WordVectors, read_vectors
from llmrecipes.errors import UserError


@dataclass(frozen=True, kw_only=True)
class Labels:
    """Where labelled texts are.

    Args:
        files: JSONL, or CSV as `noise export` writes it, once the labels are filled in.
        text: field with the text.
        label: field with the label; records without one are left out.
        noise: values of the label that mean noise.
        good: values that mean good text.
    """

    files: list[str]
    text: str = "text"
    label: str = "label"
    noise: list[str] = field(default_factory=lambda: ["bad", "noise", "1"])
    good: list[str] = field(default_factory=lambda: ["good", "0"])


@dataclass(frozen=True, kw_only=True)
class NoiseTrainConfig:
    """Recipe of `data noise train` and `data noise evaluate`.

    Args:
        labels: the labelled texts.
        output: folder for the model and report.json.
        model: tfidf is TF-IDF and logistic regression; vectors is the mean of word vectors and support vectors, better
            by two points, and needs fugashi and `vectors`; fasttext is the source systems' choice.
        vectors: for model vectors, a word2vec text file (or .gz) or an installed spaCy package (ja_ginza).
        words: tfidf also looks at words and pairs of words; better by a point, needs fugashi, and is slower.
        ngrams: tfidf looks at runs of 1 to so many characters.
        false_positives: share of good documents that may be dropped; decides the threshold.
        folds: of cross-validation.
        seed: of the folds and the trainer.
        overwrite: replace a model that is there.
    """

    labels: Labels
    output: str
    model: Literal["tfidf", "vectors", "fasttext"] = "tfidf"
    vectors: str | None = None
    words: bool = False
    ngrams: int = 3
    false_positives: float = 0.05
    folds: int = 5
    seed: int = 0
    overwrite: bool = False

    def problems(self) -> Iterator[Finding]:
        """Shares and counts that cannot be."""
        if not 0 < self.false_positives < 1:
            yield ("false_positives",), "false_positives: a share between 0 and 1", "write 0.05"
        if self.folds < 2:
            yield ("folds",), "folds: cross-validation needs at least 2", "write 5"
        if (self.model == "vectors") != (self.vectors is not None):
            what = "name a word2vec text file, or ja_ginza after pip install 'llmrecipes[noise]'"
            yield (
                ("vectors",),
                f"vectors: {self.vectors} with model {self.model}",
                what if not self.vectors else "write null",
            )


@dataclass(frozen=True, kw_only=True)
class NoiseApplyConfig(StageConfig):
    """Recipe of `data noise apply`.

    Args:
        model: folder that `noise train` wrote.
        threshold: smallest probability of noise that drops a document; null takes the one chosen in training.
        max_characters: how much of a document is looked at.
        score_field: name of a field to write the probability into; null for none.
    """

    model: str
    threshold: float | None = None
    max_characters: int = 2000
    score_field: str | None = "noise"

    def problems(self) -> Iterator[Finding]:
        """A threshold that is no probability."""
        yield from super().problems()
        if self.threshold is not None and not 0 < self.threshold <= 1:
            yield ("threshold",), f"threshold: {self.threshold} is no probability", "write 0.9, or null"


@dataclass(frozen=True, kw_only=True)
class NoiseExportConfig:
    """Recipe of `data noise export`.

    Args:
        input: JSONL files or folders of documents to choose from.
        output: CSV to fill in: text, probability of noise, and an empty label.
        model: folder that `noise train` wrote.
        count: how many documents.
        field: name of the field that holds the text.
        max_characters: how much of a document is looked at and shown.
        max_document_mb: a longer line is skipped.
    """

    input: list[str]
    output: str
    model: str
    count: int = 200
    field: str = "text"
    max_characters: int = 2000
    max_document_mb: float = 50.0


def train(config: NoiseTrainConfig) -> None:
    """Cross-validates, chooses the threshold, trains on all labels and writes model and report."""
    folder = Path(config.output)
    if folder.exists() and not config.overwrite:
        raise UserError(f"{folder}: exists already; choose another output or say --overwrite true")
    texts, is_noise = read_labels(config.labels)
    vectors = read_vectors(config.vectors) if config.vectors else None
    report = cross_validate(config, texts, is_noise, vectors)
    model = new_model(config.model, config.words, config.ngrams, config.seed, vectors)
    model.fit(texts, is_noise)
    model.save(folder, {"threshold": report.threshold, "report": report.to_json()})
    print(report.table())
    print(f"{folder}: trained on {len(texts):,} labels")


def evaluate(config: NoiseTrainConfig) -> None:
    """A model that is there, on labels it has not seen: the labels of this recipe."""
    model, settings = load_model(Path(config.output))
    texts, is_noise = read_labels(config.labels)
    report = evaluate_scores(model.probability(texts), is_noise, settings["threshold"])
    print(report.table())


def apply(config: NoiseApplyConfig) -> None:
    """Drops documents that are noise with at least the threshold's probability."""
    load_model(Path(config.model))  # says what is wrong before any process starts
    run_map("noise apply", config, make_judge)


def make_judge(config: NoiseApplyConfig, _: Shard) -> Judge:
    """The judge: good documents stay, however sure the model is of them."""
    model, settings = load_model(Path(config.model))
    threshold = settings["threshold"] if config.threshold is None else config.threshold

    def judge(documents: list[Document]) -> list[Verdict]:
        scores = model.probability([document.text[: config.max_characters] for document in documents])
        return [
            Verdict(
                document.text,
                "noise" if score >= threshold else None,
                added={config.score_field: round(float(score), 4)} if config.score_field else {},
            )
            for document, score in zip(documents, scores, strict=True)
        ]

    return judge


def export(config: NoiseExportConfig) -> None:
    """Writes the documents nearest to the boundary, which are the ones worth labelling; chance decides no tie."""
    model, _ = load_model(Path(config.model))
    best = list[tuple[float, int, str, float]]()
    seen = set[int]()
    for text in _all_texts(config):
        for name, score in _scored(model, text):
            key = digest(name)
            if key in seen:
                continue
            entry = (-abs(score - 0.5), -key, name, score)
            if len(best) < config.count:
                heapq.heappush(best, entry)
                seen.add(key)
            elif entry > best[0]:
                seen.discard(-heapq.heapreplace(best, entry)[1])
                seen.add(key)
    output = Path(config.output)
    output.parent.mkdir(parents=True, exist_ok=True)
    with output.open("w", encoding="utf-8", newline="") as stream:
        table = csv.writer(stream)
        table.writerow(("label", "probability", "text"))
        table.writerows(("", f"{score:.4f}", text) for _, _, text, score in sorted(best, reverse=True))
    print(f"{output}: {len(best)} documents; write good or bad into the column label, and name it in labels.files")


def _all_texts(config: NoiseExportConfig) -> Iterator[list[str]]:
    batch, size = list[str](), 0
    for shard in find_shards(config.input):
        for document in read_documents(shard.path, config.field, config.max_document_mb * 1e6):
            if isinstance(document, Broken):
                continue
            batch.append(document.text[: config.max_characters])
            size += len(batch[-1])
            if size >= BATCH_CHARACTERS:
                yield batch
                batch, size = [], 0
    yield batch


def _scored(model: NoiseModel, texts: list[str]) -> Iterator[tuple[str, float]]:
    yield from zip(texts, map(float, model.probability(texts)), strict=True)


def read_labels(labels: Labels) -> tuple[list[str], np.ndarray]:
    """Texts, and whether each is noise [N]; of texts labelled twice the last label counts.

    Raises:
        UserError: a file is missing, a label unknown, or one of the two classes is empty.
    """
    found, problems = dict[str, bool](), list[str]()
    values = {**dict.fromkeys(labels.noise, True), **dict.fromkeys(labels.good, False)}
    for name in labels.files:
        if not Path(name).is_file():
            problems.append(f"{name}: no such file")
            continue
        for line, record in _records(Path(name)):
            text, label = record.get(labels.text), record.get(labels.label)
            if not isinstance(text, str):
                problems.append(f"{name}:{line}: no field {labels.text!r} with a text")
            elif label is None or str(label).strip() == "":
                continue
            elif str(label).strip() not in values:
                problems.append(f"{name}:{line}: the label {label!r} is none of {', '.join(values)}")
            else:
                found[text] = values[str(label).strip()]
    if not problems and len(set(found.values())) < 2:
        problems.append(f"{', '.join(labels.files)}: labels of both kinds are needed, noise and good")
    if problems:
        raise UserError(*problems[:20])
    return list(found), np.array(list(found.values()))


def _records(path: Path) -> Iterator[tuple[int, dict[str, object]]]:
    with path.open(encoding="utf-8", newline="") as stream:
        if path.suffix == ".csv":
            yield from ((number, dict(row)) for number, row in enumerate(csv.DictReader(stream), start=2))
            return
        for number, line in enumerate(stream, start=1):
            if line.strip():
                try:
                    record = json.loads(line)
                except ValueError:
                    raise UserError(f"{path}:{number}: not JSON; mend or remove the line") from None
                yield number, record if isinstance(record, dict) else {}


def cross_validate(
    config: NoiseTrainConfig, texts: list[str], is_noise: np.ndarray, vectors: WordVectors | None
) -> Report:
    """Each text scored by a model that has not seen it; the threshold is chosen on these scores."""
    smallest = int(min(is_noise.sum(), (~is_noise).sum()))
    if smallest < config.folds:
        raise UserError(f"labels: {smallest} texts of the rarer kind are too few for {config.folds} folds")
    fold = folds_of(texts, is_noise, config.folds, config.seed)
    scores = np.zeros(len(texts))
    for number in range(config.folds):
        model = new_model(config.model, config.words, config.ngrams, config.seed, vectors)
        model.fit([text for text, f in zip(texts, fold, strict=True) if f != number], is_noise[fold != number])
        scores[fold == number] = model.probability([t for t, f in zip(texts, fold, strict=True) if f == number])
    return evaluate_scores(scores, is_noise, threshold_for(scores, is_noise, config.false_positives))


def folds_of(texts: list[str], is_noise: np.ndarray, folds: int, seed: int) -> np.ndarray:
    """The fold of each text [N], the same share of noise in each; by hash, so that order hardly matters."""
    fold = np.zeros(len(texts), dtype=np.int64)
    keys = np.array([digest(text, seed, "fold") for text in texts], dtype=np.uint64)
    for kind in (True, False):
        members = np.flatnonzero(is_noise == kind)
        fold[members[np.argsort(keys[members])]] = np.arange(len(members)) % folds
    return fold

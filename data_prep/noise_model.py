"""Classifiers of texts behind one interface; their files hold numbers and text, never code."""

from __future__ import annotations

import itertools
import json
from pathlib import Path
from typing import Any, Protocol

import numpy as np

from data_prep.frame.extras import need
from data_prep.frame.records import write_json
from data_prep.noise_vectors import VectorsModel
from data_prep.word_vectors import WordVectors
from llmrecipes.errors import UserError


class NoiseModel(Protocol):
    """Tells noise from good text."""

    def fit(self, texts: list[str], is_noise: np.ndarray) -> None:
        """Trains on texts and whether each is noise [N]."""

    def probability(self, texts: list[str]) -> np.ndarray:
        """P(noise) of each text [N]; of no other class."""

    def save(self, folder: Path, settings: dict[str, Any]) -> None:
        """Writes the model, and `settings` with it."""


def new_model(kind: str, words: bool, ngrams: int, seed: int, vectors: WordVectors | None = None) -> NoiseModel:
    """An untrained model; `vectors` is for the kind of that name."""
    if vectors is not None:
        return VectorsModel(vectors, seed)
    return TfidfModel(ngrams, words, seed) if kind == "tfidf" else FastTextModel(seed)


def load_model(folder: Path) -> tuple[NoiseModel, dict[str, Any]]:
    """A model, and the settings it was saved with.

    Raises:
        UserError: the folder holds none.
    """
    file = folder / "noise.json"
    if not file.is_file():
        raise UserError(f"{folder}: no noise.json in it; make the model with llmrecipes data noise train")
    settings = json.loads(file.read_text())
    kinds: dict[str, Any] = {"tfidf": TfidfModel, "fasttext": FastTextModel, "vectors": VectorsModel}
    return kinds[settings["kind"]].load(folder, settings), settings


class TfidfModel:
    """TF-IDF of runs of characters (and of words), logistic regression."""

    def __init__(self, ngrams: int, words: bool, seed: int) -> None:
        self._ngrams, self._words, self._seed = ngrams, words, seed
        self._vectorizers = [self._vectorizer(False), *([self._vectorizer(True)] if words else [])]
        self._weights, self._bias = np.zeros(0), 0.0

    def _vectorizer(self, words: bool) -> Any:
        text = need("sklearn.feature_extraction.text", "scikit-learn")
        if words:
            return text.TfidfVectorizer(analyzer=_words_and_pairs(), sublinear_tf=True, min_df=2)
        return text.TfidfVectorizer(analyzer="char", ngram_range=(1, self._ngrams), sublinear_tf=True, min_df=2)

    def fit(self, texts: list[str], is_noise: np.ndarray) -> None:
        """Trains; liblinear's solution does not depend on chance beyond the seed."""
        linear, sparse = need("sklearn.linear_model", "scikit-learn"), need("scipy.sparse", "scipy")
        rows = sparse.hstack([vectorizer.fit_transform(texts) for vectorizer in self._vectorizers]).tocsr()
        model = linear.LogisticRegression(C=4.0, solver="liblinear", max_iter=1000, random_state=self._seed)
        model.fit(rows, is_noise)
        assert list(model.classes_) == [False, True]
        self._weights, self._bias = model.coef_[0], float(model.intercept_[0])

    def probability(self, texts: list[str]) -> np.ndarray:
        """P(noise) [N]."""
        if not texts:
            return np.zeros(0)
        logits, start = np.full(len(texts), self._bias), 0
        for vectorizer in self._vectorizers:
            rows = vectorizer.transform(texts)
            logits += rows @ self._weights[start : start + rows.shape[1]]
            start += rows.shape[1]
        return 1 / (1 + np.exp(-logits))

    def save(self, folder: Path, settings: dict[str, Any]) -> None:
        """noise.json (settings and vocabularies) and noise.npz (numbers)."""
        folder.mkdir(parents=True, exist_ok=True)
        numbers = {f"idf{i}": v.idf_ for i, v in enumerate(self._vectorizers)}
        np.savez(folder / "noise.npz", weights=self._weights, bias=np.array([self._bias]), **numbers)
        vocabularies = [[str(term) for term in v.get_feature_names_out()] for v in self._vectorizers]
        kind = {"kind": "tfidf", "ngrams": self._ngrams, "words": self._words, "seed": self._seed}
        write_json(folder / "noise.json", {**kind, **settings, "vocabularies": vocabularies})

    @classmethod
    def load(cls, folder: Path, settings: dict[str, Any]) -> TfidfModel:
        """What `save` wrote."""
        model = cls(settings["ngrams"], settings["words"], settings["seed"])
        with np.load(folder / "noise.npz") as numbers:
            model._weights, model._bias = numbers["weights"], float(numbers["bias"][0])
            for i, (vectorizer, terms) in enumerate(zip(model._vectorizers, settings["vocabularies"], strict=True)):
                vectorizer.vocabulary = {term: place for place, term in enumerate(terms)}
                vectorizer.idf_ = numbers[f"idf{i}"]
        return model


def _words_and_pairs() -> Any:
    from data_prep.rules.segment import tagger

    parse = tagger()

    def analyze(text: str) -> list[str]:
        words = [word.surface for word in parse(text)]
        return words + [f"{first} {second}" for first, second in itertools.pairwise(words)]

    return analyze


class FastTextModel:
    """fastText on words: the source systems' model, with settings fit for a thousand labels (defaults reach 0.57)."""

    def __init__(self, seed: int) -> None:
        self._seed = seed
        self._model: Any = None

    def fit(self, texts: list[str], is_noise: np.ndarray) -> None:
        """Trains on one thread: with more, the same seed gives other models."""
        import tempfile

        fasttext = need("fasttext", "fasttext-community")
        with tempfile.NamedTemporaryFile("w", suffix=".txt", encoding="utf-8") as file:
            for text, noise in zip(self._segmented(texts), is_noise, strict=True):
                file.write(f"__label__{'noise' if noise else 'good'} {text}\n")
            file.flush()
            self._model = fasttext.train_supervised(
                file.name, lr=0.5, epoch=30, wordNgrams=2, bucket=50_000, thread=1, seed=self._seed, verbose=0
            )

    def probability(self, texts: list[str]) -> np.ndarray:
        """P(noise) [N], whichever label comes first."""
        found = np.zeros(len(texts))
        for place, text in enumerate(self._segmented(texts)):
            labels, shares = self._model.predict(text, k=2)
            found[place] = dict(zip(labels, shares, strict=True)).get("__label__noise", 0.0)
        return np.clip(found, 0, 1)

    def _segmented(self, texts: list[str]) -> list[str]:
        from data_prep.rules.segment import tagger

        parse = tagger()
        return [" ".join(word.surface for word in parse(text.replace("\n", " "))) for text in texts]

    def save(self, folder: Path, settings: dict[str, Any]) -> None:
        """noise.json (settings) and noise.bin (fastText's own format)."""
        folder.mkdir(parents=True, exist_ok=True)
        self._model.save_model(str(folder / "noise.bin"))
        write_json(folder / "noise.json", {"kind": "fasttext", "seed": self._seed, **settings})

    @classmethod
    def load(cls, folder: Path, settings: dict[str, Any]) -> FastTextModel:
        """What `save` wrote."""
        model = cls(settings["seed"])
        model._model = need("fasttext", "fasttext-community").load_model(str(folder / "noise.bin"))
        return model

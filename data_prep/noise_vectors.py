"""A classifier of noise by what words mean: their vectors' mean and signs of noise, a support vector machine."""

from __future__ import annotations

import json
import unicodedata
from collections import Counter
from pathlib import Path
from typing import Any

import numpy as np

from data_prep.frame.extras import need
from data_prep.frame.records import write_json
from data_prep.noise_signs import signs
from data_prep.rules.segment import parser
from data_prep.word_vectors import WordVectors
from llmrecipes.errors import UserError

_GAMMA, _COST, _SIGNS = 0.5, 2.0, 0.8  # width and cost of the machine, weight of the signs; chosen in docs/log.md
_LIMIT = 4.0  # standard deviations; what is further out is an accident
_CALIBRATION = 5  # folds that turn distances into probabilities
_BATCH = 256  # texts whose kernel is held at once


class VectorsModel:
    """Mean of word vectors weighted by rarity, beside signs; RBF support vectors; Platt's probabilities."""

    def __init__(self, vectors: WordVectors, seed: int) -> None:
        self._vectors, self._seed = vectors, seed
        self._parse = parser()
        self._documents, self._frequency = 0, dict[str, int]()
        self._numbers = dict[str, np.ndarray]()

    def fit(self, texts: list[str], is_noise: np.ndarray) -> None:
        """Trains.

        Raises:
            UserError: too few texts of a kind to turn distances into probabilities.
        """
        if (rarer := int(min(is_noise.sum(), (~is_noise).sum()))) < _CALIBRATION:
            raise UserError(f"labels: {rarer} texts of the rarer kind to train on; model vectors needs {_CALIBRATION}")
        read = [self._read(text) for text in texts]
        self._documents = len(texts)
        self._frequency = dict(sorted(Counter(word for words, _ in read for word in set(words)).items()))
        means = np.stack([self._mean(words) for words, _ in read])
        found = np.stack([signs_ for _, signs_ in read])
        # Each block's distances count by its weight, however many numbers it has: vectors 1, signs _SIGNS.
        vector, sign = np.sqrt(means.shape[1]), np.sqrt(found.shape[1]) / _SIGNS
        self._numbers = {
            "center": np.hstack([means.mean(0), found.mean(0)]),
            "scale": np.hstack([np.full(means.shape[1], np.sqrt(means.var(0).mean()) + 1e-9), found.std(0) + 1e-9]),
            "divide": np.hstack([np.full(means.shape[1], vector), np.full(found.shape[1], sign)]),
        }
        self._train(self._scaled(np.hstack([means, found])), is_noise)

    def _train(self, rows: np.ndarray, is_noise: np.ndarray) -> None:
        svm, calibration = need("sklearn.svm", "scikit-learn"), need("sklearn.calibration", "scikit-learn")
        folds = need("sklearn.model_selection", "scikit-learn").StratifiedKFold(
            _CALIBRATION, shuffle=True, random_state=self._seed
        )
        machine = svm.SVC(C=_COST, gamma=_GAMMA)
        both = calibration.CalibratedClassifierCV(machine, cv=folds, ensemble=False).fit(rows, is_noise)
        (fitted,) = both.calibrated_classifiers_
        (sigmoid,) = fitted.calibrators
        self._numbers |= {
            "support": fitted.estimator.support_vectors_,
            "weights": fitted.estimator.dual_coef_[0],
            "bias": fitted.estimator.intercept_,
            "sigmoid": np.array([sigmoid.a_, sigmoid.b_]),
        }

    def probability(self, texts: list[str]) -> np.ndarray:
        """P(noise) [N]."""
        found = np.zeros(len(texts))
        for start in range(0, len(texts), _BATCH):
            read = [self._read(text) for text in texts[start : start + _BATCH]]
            rows = self._scaled(np.stack([np.hstack([self._mean(words), signs_]) for words, signs_ in read]))
            support, (slope, offset) = self._numbers["support"], self._numbers["sigmoid"]
            distances = (rows**2).sum(1)[:, None] + (support**2).sum(1) - 2 * rows @ support.T
            decision = np.exp(-_GAMMA * distances) @ self._numbers["weights"] + self._numbers["bias"]
            found[start : start + _BATCH] = 1 / (1 + np.exp(slope * decision + offset))
        return found

    def _read(self, text: str) -> tuple[list[str], np.ndarray]:
        """The words that have a vector, and the signs [53]."""
        text = unicodedata.normalize("NFKC", text)
        words = self._parse(text)
        rows = self._vectors.rows
        known = [w.surface if w.surface in rows else w.lemma for w in words if w.surface in rows or w.lemma in rows]
        return known, signs(text, words)

    def _mean(self, words: list[str]) -> np.ndarray:
        """The vectors' mean [size], rare words counting more; 0 without a known word."""
        if not words:
            return np.zeros(self._vectors.matrix.shape[1])
        counts = np.array([self._frequency.get(word, 0) for word in words])
        weights = np.log((2 + self._documents) / (1 + counts))
        mean: np.ndarray = weights @ self._vectors.matrix[[self._vectors.rows[word] for word in words]].astype(float)
        return mean / weights.sum()

    def _scaled(self, rows: np.ndarray) -> np.ndarray:
        standard = (rows - self._numbers["center"]) / self._numbers["scale"]
        found: np.ndarray = standard.clip(-_LIMIT, _LIMIT) / self._numbers["divide"]
        return found

    def save(self, folder: Path, settings: dict[str, Any]) -> None:
        """noise.json (settings), words.json (words, rows and frequencies) and noise.npz (all vectors, numbers)."""
        folder.mkdir(parents=True, exist_ok=True)
        numbers: dict[str, Any] = {"matrix": self._vectors.matrix, **self._numbers}
        np.savez(folder / "noise.npz", **numbers)
        words = {"documents": self._documents, "frequency": self._frequency, "rows": self._vectors.rows}
        write_json(folder / "words.json", words)
        write_json(folder / "noise.json", {"kind": "vectors", "seed": self._seed, **settings})

    @classmethod
    def load(cls, folder: Path, settings: dict[str, Any]) -> VectorsModel:
        """What `save` wrote; the package or file the vectors came from is not needed."""
        words = json.loads((folder / "words.json").read_text())
        with np.load(folder / "noise.npz") as numbers:
            model = cls(WordVectors(words["rows"], numbers["matrix"]), settings["seed"])
            model._numbers = {name: numbers[name] for name in numbers.files if name != "matrix"}
        model._documents, model._frequency = words["documents"], words["frequency"]
        return model

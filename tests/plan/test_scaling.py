from __future__ import annotations

import json

import numpy as np
import pytest

from llmrecipes.errors import UserError
from llmrecipes.plan.scaling import _law, draw, fit, read_points, show_fit

# Of 2203.15556, table A3.
PLANTED = np.array([1.69, 406.4, 0.34, 410.7, 0.28])


def points(noise: float = 0.0, sizes=(5e7, 2e8, 1e9, 4e9)) -> np.ndarray:
    random = np.random.default_rng(1)
    grid = [(n, d) for n in sizes for d in (1e9, 4e9, 2e10, 1e11)]
    return np.array([(n, d, _law(PLANTED, n, d) * (1 + noise * random.standard_normal())) for n, d in grid])


def test_planted_constants_are_found():
    found = fit(points(), resamples=0)
    assert found.values == pytest.approx(PLANTED, rel=0.02)
    assert found.error < 1e-4


def test_the_uncertainty_covers_what_was_planted():
    found = fit(points(noise=0.002), resamples=20)
    for n, d in ((7e9, 2e11), (1e9, 1e12)):
        value, low, high = found.loss(n, d)
        assert low <= value <= high
        assert low - 0.02 < _law(PLANTED, n, d) < high + 0.02
    quiet = fit(points(noise=0.0002), resamples=20)
    widths = [np.ptp(f.draws[:, 0]) for f in (found, quiet)]
    assert widths[0] > 2 * widths[1]  # more noise, less certainty
    best = found.optimal(6 * 1e9 * 2e10)
    assert best is not None and 0.2e9 < best[0] < 5e9


def test_one_model_size(tmp_path):
    found = fit(points(sizes=(1e9,)), resamples=3)
    assert found.values[[1, 2]].tolist() == [0, 0]
    assert found.values[4] == pytest.approx(0.28, rel=0.02)
    assert found.optimal(1e20) is None
    assert "one model size" in show_fit(found, 1e9, 1e12)
    draw(found, tmp_path / "fit.png")
    assert (tmp_path / "fit.png").stat().st_size > 5000


def test_files(tmp_path):
    file = tmp_path / "a.jsonl"
    file.write_text("\n".join(json.dumps(dict(zip(("params", "tokens", "loss"), p, strict=True))) for p in points()))
    assert read_points(file) == pytest.approx(points())
    table = tmp_path / "a.csv"
    table.write_text("params,tokens,loss\n" + "\n".join(",".join(map(str, p)) for p in points()))
    assert read_points(table) == pytest.approx(points())
    bad = {
        "": "0 points",
        "params,tokens\n1,2": "point 1",
        "params,tokens,loss\n1,2,x": "point 1",
        "params,tokens,loss\n1e9,1e9,3\n": "at least 3",
        "params,tokens,loss\n1e9,-1,3\n": "above 0",
    }
    for text, message in bad.items():
        table.write_text(text)
        with pytest.raises(UserError, match=message):
            read_points(table)
    with pytest.raises(UserError, match="cannot be read"):
        read_points(tmp_path / "none.csv")

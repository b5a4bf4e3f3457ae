"""Scores equal those of llm-jp-eval (char_f1_cases.json: fuzzywuzzy 0.18.0 without python-Levenshtein)."""

from __future__ import annotations

import json
import random
from difflib import SequenceMatcher
from pathlib import Path

import pytest

from llmrecipes.evaluate.average import CATEGORIES, average
from llmrecipes.evaluate.figures import correlation, mean, rate, ratio
from llmrecipes.evaluate.metrics import (
    begins_with,
    char_f1,
    contains,
    exact_match_figure,
    last_number,
    parse_float,
    pearson,
    set_f1,
    spearman,
)

CASES = json.loads((Path(__file__).parent / "char_f1_cases.json").read_text(encoding="utf-8"))


def test_char_f1_is_that_of_fuzzywuzzy():
    assert len(CASES) == 200
    for answer, reference, score in CASES:
        assert char_f1(answer, reference) == score / 100, (answer, reference)
    unsorted = [round(100 * SequenceMatcher(None, a, b).ratio()) for a, b, _ in CASES]
    assert sum(score != other for other, (_, _, score) in zip(unsorted, CASES, strict=True)) > 50  # the mutant


def test_set_f1():
    assert set_f1("a\nb", "b\na") == 1
    assert set_f1("a\na \n c", "a\nb") == pytest.approx(0.5)
    assert set_f1("x", "a\nb") == 0
    # Recall over the reference's lines counts hits among the answer's lines: 1 of 2 lines twice the same.
    assert set_f1("a", "a\na") == pytest.approx(2 / 3)


def test_pearson_is_over_all_pairs_and_not_zero():
    """Regression: pearson was computed, then 0 returned; and a pair at a time, where it is undefined."""
    assert pearson(["3", "4.5", "1", "5点", "x"], ["2", "5", "0", "4", "1"]) == pytest.approx(0.7957207052264225)
    assert pearson(["1", "1"], ["1", "2"]) == 0 and pearson(["1"], ["1"]) == 0
    assert parse_float("5点") == 5 and parse_float("x") == -2 and parse_float("-3") == 3


def the_originals_set_f1(y_true, y_pred):
    """As it stands in llm-jp-eval 1.3.0."""
    set_y_true = [x.strip() for x in y_true.split("\n")]
    set_y_pred = list({x.strip() for x in y_pred.split("\n")})
    set_pre = sum([1 if y in set_y_true else 0 for y in set_y_pred]) / len(set_y_pred)
    set_rec = sum([1 if y in set_y_true else 0 for y in set_y_pred]) / len(set_y_true)
    return 2 * (set_pre * set_rec) / (set_pre + set_rec) if (set_pre + set_rec) != 0 else 0


def test_a_table_of_cases_equals_the_originals():
    """set_f1 as published; pearson and spearman of scipy, which the original calls, with nan as 0."""
    stats = pytest.importorskip("scipy.stats")
    draw = random.Random(0)
    lines = ["東京 LOC", "大阪 LOC ", "a", "", "b"]
    for _ in range(300):
        a, b = ("\n".join(draw.choices(lines, k=draw.randint(1, 5))) for _ in range(2))
        assert set_f1(a, b) == the_originals_set_f1(b, a)
    seen = 0
    for _ in range(100):
        n = draw.randint(2, 30)
        answers = [draw.choice(["0", "1.5", "3", "5", "4点", "x", "2.5"]) for _ in range(n)]
        references = [str(draw.choice([0.0, 1.0, 2.2, 5.0])) for _ in range(n)]
        xs, ys = [parse_float(a) for a in answers], [float(r) for r in references]
        if len(set(xs)) > 1 and len(set(ys)) > 1:
            seen += 1
            assert pearson(answers, references) == pytest.approx(stats.pearsonr(xs, ys).statistic, abs=1e-12)
            assert spearman(answers, references) == pytest.approx(stats.spearmanr(xs, ys).statistic, abs=1e-12)
        else:
            assert pearson(answers, references) == spearman(answers, references) == 0
    assert seen > 80


def test_numbers_and_pieces():
    assert exact_match_figure("7.0", "7") == 1 and exact_match_figure("seven", "7") == 0
    assert last_number("3 x 4 = 1,200", "1200") == 1 and last_number("", "1") == 0
    assert contains("It is 12.", "12") == 1 and contains("It is 120", "12") == 0 and contains("1.12", "1") == 0
    assert begins_with("花筏川である。", "花筏川") == 1 and begins_with("120人", "12") == 0


def test_every_task_counts_in_the_average():
    """Regression: an average over columns from the third on left the first task out."""
    found = average([("MC", 1.0), ("RC", 0.0), ("RC", 0.5)], strict=False)
    assert found.value == pytest.approx((1.0 + 0.25) / 2)
    assert found.missing == [name for name in CATEGORIES if name not in ("MC", "RC")]
    assert "not measured: NLI" in found.sentence()
    assert average([("MC", 0.9)], strict=True).value == pytest.approx(0.1)  # of 9, as the original
    assert average([], strict=False).value is None


def test_intervals():
    figure = rate(8, 10)  # Wilson, as in statsmodels.stats.proportion.proportion_confint(8, 10, method="wilson")
    assert (figure.low, figure.high) == pytest.approx((0.490162, 0.943318), abs=1e-6)
    assert rate(0, 5).low == 0 and rate(5, 5).high == 1 and mean([]).value is None
    assert mean([0, 1, 1]).interval == "wilson" and mean([0.5, 1]).interval == "bootstrap"
    spread = ratio([float(i % 7) for i in range(200)], [1.0] * 200)
    half = 1.96 * 1.98 / 200**0.5  # of the normal distribution
    assert spread.high - spread.low == pytest.approx(2 * half, rel=0.1)
    assert correlation(0.5, 103).low == pytest.approx(0.3393, abs=1e-3)

"""Two axes and the radar: what stands in the figure is what was measured, and what was not measured is not there."""

from __future__ import annotations

import math
from pathlib import Path

import pytest
from matplotlib.figure import Figure

from llmrecipes.errors import UserError
from llmrecipes.evaluate.report import radar, scatter
from llmrecipes.evaluate.report.gather import Run


def figure(value, low=None, high=None):
    return {"value": value, "n": 8, "low": low, "high": high, "interval": "bootstrap"}


def run(name, average=None, mark=None, categories=None, **tasks):
    """A run with one evaluation: the average of llm-jp-eval, MT-Bench, and other tasks by name."""
    found = [
        {
            "task": task,
            "kind": "questions",
            "metric": "contains",
            "figures": {"contains": figure(value), "exact": figure(0.1)},
        }
        for task, value in tasks.items()
    ]
    if mark is not None or categories is not None:
        parts = {key: figure(value) for key, value in (categories or {}).items()}
        score = {"score": figure(mark, *((None, None) if mark is None else (mark - 1, mark + 0.5)))}
        bench = {"task": "bench", "kind": "mt_bench", "metric": "score", "figures": score}
        found.append(bench | {"breakdowns": {"category": parts}})
    return Run(name, Path(name), summaries=[{"name": "demo", "average": {"value": average}, "tasks": found}])


@pytest.fixture
def drawn(monkeypatch):
    """The figure that was drawn last, instead of a file."""
    kept = []

    def keep(draw, size, path):
        kept.append(Figure(figsize=size))
        draw(kept[-1])

    monkeypatch.setattr(radar, "save", keep)
    monkeypatch.setattr(scatter, "save", keep)
    return kept


# ---- two axes


def points(axis):
    """Where each point stands, with the ends of its bars, by the colour of what is drawn."""
    found = []
    for container in axis.containers:
        data, _, bars = container.lines
        (x,), (y,) = data.get_data()
        across, along = (bar.get_segments()[0] for bar in bars)
        found.append((x, y, *across[:, 0], *along[:, 1], data.get_marker()))
    return found


def test_points_are_the_runs_with_both_figures(drawn, tmp_path):
    published = tmp_path / "published.csv"
    published.write_text("model,year,mt_bench,llm_jp_eval\nGPT $4,2023,8.75,0.8\nhalf,2024,,0.5\n")
    runs = [
        run("_a", 0.4, 6.0),
        run("only average", 0.9),
        run("neither", x=0.2),
        run("b", 0.5, 2.0),
        run("c", mark=3.0),
    ]
    ((heading, text, path),) = scatter.draw_scatter(runs, tmp_path, published)
    assert (heading, path) == ("mt_bench against llm_jp_eval", tmp_path / "scatter.png")
    (axis,) = drawn[-1].axes
    assert points(axis) == [
        (0.8, 8.75, 0.8, 0.8, 8.75, 8.75, "s"),  # published ones have no interval
        (0.4, 6.0, 0.4, 0.4, 5.0, 6.5, "o"),
        (0.5, 2.0, 0.5, 0.5, 1.0, 2.5, "o"),
    ]
    # A formula is none, and a name is not hidden for its first letter.
    assert [(t.get_text(), *t.xy) for t in axis.texts] == [("GPT \\$4", 0.8, 8.75), ("a", 0.4, 6.0), ("b", 0.5, 2.0)]
    assert (axis.get_xlabel(), axis.get_ylabel()) == ("llm_jp_eval", "mt_bench")
    assert text.startswith("bars: 95% intervals; grey: published.csv; ")
    assert "only average is not there, it has no mt_bench; c is not there, it has no llm_jp_eval" in text
    assert "neither" not in text


def test_any_two_figures(drawn, tmp_path):
    runs = [run("a", x=0.25, y=0.75), run("b", x=0.5)]
    assert scatter.draw_scatter(runs, tmp_path, None) == []
    ((_, text, _),) = scatter.draw_scatter(runs, tmp_path, None, ("x.exact", "y"))
    assert points(drawn[-1].axes[0]) == [(0.1, 0.75, 0.1, 0.1, 0.75, 0.75, "o")]
    assert "no reference models (--reference FILE.csv)" in text and "b is not there, it has no y" in text


def test_reference_files_that_cannot_be_drawn(tmp_path):
    file = tmp_path / "models.csv"
    runs = [run("a", 0.4, 6.0)]
    cases = {
        "model,mt_bench\nx,1\n": ":1: no column llm_jp_eval; it has model, mt_bench",
        "model,llm_jp_eval,mt_bench\nx,a,1\ny,nan,2\n": ":2: a and 1: not two numbers",
    }
    for text, said in cases.items():
        file.write_text(text)
        with pytest.raises(UserError) as caught:
            scatter.draw_scatter(runs, tmp_path, file)
        assert caught.value.problems[0].endswith(said)
    assert caught.value.problems[1].endswith(":3: nan and 2: not finite")
    with pytest.raises(UserError, match="no such file"):
        scatter.draw_scatter(runs, tmp_path, tmp_path / "none.csv")
    file.write_text("model,llm_jp_eval,mt_bench\nx,1,1\n")
    with pytest.raises(UserError, match=r"no run has both figures; there are: x, x\.contains, x\.exact"):
        scatter.draw_scatter([run("b", x=0.1)], tmp_path, file)


# ---- radar


def test_radar_draws_the_marks_of_each_category(drawn, tmp_path):
    whole = {"math": 2.0, "coding": 3.0, "writing": 9.0, "own": 5.0}
    partly = {"math": None, "coding": 1.0, "writing": 4.0}
    runs = [run("whole", mark=4.0, categories=whole), run("partly", mark=2.0, categories=partly), run("never", 0.5)]
    ((heading, text, path),) = radar.draw_radar(runs, tmp_path)
    assert (heading, path) == ("MT-Bench by category", tmp_path / "radar.png")
    (axis,) = drawn[-1].axes
    # FastChat's order, others behind; the first at the top, clockwise.
    assert [t.get_text() for t in axis.get_xticklabels()] == ["writing", "math", "coding", "own"]
    assert list(axis.get_xticks()) == pytest.approx([0, math.pi / 2, math.pi, 3 * math.pi / 2])
    assert axis.get_theta_offset() == pytest.approx(math.pi / 2) and axis.get_theta_direction() == -1
    assert axis.get_ylim() == (0, 10)
    first, second = axis.get_lines()
    assert list(first.get_ydata()) == [9.0, 2.0, 3.0, 5.0, 9.0]  # closed
    assert [None if math.isnan(y) else y for y in second.get_ydata()] == [4.0, None, 1.0, None, 4.0]  # never as 0
    assert len(axis.patches) == 1, "a line with gaps has no inside"
    assert [t.get_text() for t in axis.get_legend().get_texts()] == ["whole", "partly"]
    assert text.endswith("no mark, a gap in the line, partly: math, own") and "whole:" not in text


def test_radar_needs_three_categories(drawn, tmp_path):
    assert radar.draw_radar([run("a", mark=2.0, categories={"math": 2.0, "coding": 3.0})], tmp_path) == []
    assert radar.draw_radar([run("a", 0.5)], tmp_path) == [] and not drawn
    twice = run("a", mark=2.0, categories={"math": 2.0, "coding": 3.0, "stem": 1.0})
    twice.summaries.append({**twice.summaries[0], "name": "later"})
    radar.draw_radar([twice], tmp_path)
    assert [t.get_text() for t in drawn[-1].axes[0].get_legend().get_texts()] == ["a / demo", "a / later"]

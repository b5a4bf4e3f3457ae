"""Times by the clock, in recipes and in ``check``."""

from __future__ import annotations

import pytest

from llmrecipes.recipe import TimeSpan


@pytest.mark.parametrize(
    ("text", "seconds", "shown"),
    [
        ("3h50m", 13800, "3h50m"), ("90m", 5400, "1h30m"), ("2d", 172800, "2d"), ("1d 12h", 129600, "1d12h"),
        ("45s", 45, "45s"), ("1.5h", 5400, "1h30m"), ("0.5s", 0.5, "0.5s"), ("2H", 7200, "2h"),
    ],
)  # fmt: skip
def test_read_and_written(text, seconds, shown):
    span = TimeSpan.parse(text)
    assert span.seconds == seconds and str(span) == shown
    assert TimeSpan.parse(shown) == span and TimeSpan.parse(span) is span


@pytest.mark.parametrize("text", ["", "90", 90, "3:50", "1m2h", "-1h", "h", "1h30", "soon", "3h 50", "1w"])
def test_refused_with_an_example(text):
    with pytest.raises(ValueError, match=r"is not a time: write days, hours, minutes, seconds as '3h50m'"):
        TimeSpan.parse(text)


def test_no_time_is_refused():
    with pytest.raises(ValueError, match="'0m' is no time at all"):
        TimeSpan.parse("0m")


@pytest.mark.parametrize(
    ("written", "message"),
    [
        (
            "'3:50'",
            "stop.time_limit: '3:50' is not a time: write days, hours, minutes, seconds as '3h50m', '90m' or '2d'",
        ),
        ("90", "stop.time_limit: 90 is not a time: write days, hours, minutes, seconds as '3h50m', '90m' or '2d'"),
        ("[1h]", "stop.time_limit: expected a time such as '3h50m', not a list"),
    ],
)
def test_check_reports_a_bad_time(problems_of, written, message):
    (problem,) = problems_of(("samples:", f"stop: {{time_limit: {written}}}\nsamples:"))
    assert problem.endswith(message), problem


def test_check_knows_the_section(problems_of):
    assert problems_of(("samples:", "stop: {time_limit: 3h50m, file: null}\nsamples:")) == []
    (problem,) = problems_of(("samples:", "stop: {time_limt: 3h50m}\nsamples:"))
    assert "unknown key 'stop.time_limt'" in problem and "did you mean 'time_limit'?" in problem

"""``metrics.jsonl``: survives a kill, is rewound on resume, stays one monotone file."""

from __future__ import annotations

import json

import pytest

from llmrecipes.callbacks.metrics_file import MetricsFile, read_metrics, rewind_metrics


def write(path, steps, tail=""):
    path.write_text("".join(json.dumps({"step": s, "loss": s / 7}) + "\n" for s in steps) + tail)


def steps_of(path):
    return [record["step"] for record in read_metrics(path)]


def test_each_record_is_on_disk_at_once_at_full_precision(tmp_path):
    file = MetricsFile(tmp_path / "run" / "metrics.jsonl")
    values = [0.1 + 0.2, 1e-300, 4.174813270568848]
    for step, value in enumerate(values):
        file.append({"step": step, "loss": value, "名": "あ"})
        assert [r["loss"] for r in read_metrics(tmp_path / "run" / "metrics.jsonl")] == values[: step + 1]
    file.close()
    file = MetricsFile(tmp_path / "run" / "metrics.jsonl")
    file.append({"step": 9})
    file.close()
    text = (tmp_path / "run" / "metrics.jsonl").read_text(encoding="utf-8")
    assert text.count("\n") == 4
    assert "あ" in text


@pytest.mark.parametrize("tail", ['{"step": 4, "lo', '{"step"', "{", '{"step": 4, "loss": 0.5', "\0\0\0\n"])
def test_a_last_line_cut_short_is_passed_over_and_removed(tmp_path, tail):
    path = tmp_path / "metrics.jsonl"
    write(path, [1, 2, 3], tail)
    assert steps_of(path) == [1, 2, 3]
    rewind_metrics(path, 5, None)
    write(tmp_path / "expected", [1, 2, 3])
    assert path.read_bytes() == (tmp_path / "expected").read_bytes()


@pytest.mark.parametrize(
    ("present", "saved", "expected"),
    [
        ([1, 2, 3, 4, 5, 6, 7], [1, 2, 3, 4, 5], [1, 2, 3, 4, 5]),  # what came after the checkpoint is done again
        ([1, 2, 3, 4, 5, 5, 6], [1, 2, 3, 4, 5], [1, 2, 3, 4, 5, 5]),  # its validation, logged after it was written
        ([1, 2], [1, 2, 3, 4, 5], [1, 2, 3, 4, 5]),  # the file lost lines: the checkpoint has a copy
        (None, [1, 2, 3, 4, 5], [1, 2, 3, 4, 5]),
        ([1, 2, 3, 6, 7], None, [1, 2, 3]),
        (None, None, []),
        ([], [], []),
    ],
)
def test_rewinding(tmp_path, present, saved, expected):
    path, copy = tmp_path / "metrics.jsonl", tmp_path / "copy.jsonl"
    for file, steps in ((path, present), (copy, saved)):
        if steps is not None:
            write(file, steps)
    rewind_metrics(path, 5, copy if saved is not None else None)
    assert steps_of(path) == expected
    write(tmp_path / "expected", expected)
    assert path.read_bytes() == (tmp_path / "expected").read_bytes()
    assert {p.name for p in tmp_path.iterdir()} <= {"metrics.jsonl", "copy.jsonl", "expected"}


def test_reading_what_is_not_there(tmp_path):
    assert list(read_metrics(tmp_path / "absent")) == []

"""The picture of a run is drawn for what a run can leave behind."""

from __future__ import annotations

import json
import math
import struct

import pytest

from llmrecipes.callbacks import draw_loss_curve


def metrics(folder, steps, moe=False, valid=True, **changes):
    lines = []
    for s in range(1, steps + 1):
        record = {"step": s, "tokens": 128 * s, "loss": 4 - s / steps, "grad_norm": 1.0 + s % 3, "lr": 1e-3}
        if moe:
            record |= {"max_violation": [0.1 * s, 0.2], "expert_load": [[0.5, 0.5]] * 2, "aux_loss": 1.0}
        lines.append(record | changes)
        if valid and s % 2 == 0:
            lines.append({"step": s, "val_loss/日本語": 3.9, "val_loss/en": 3.7, "val_loss": 3.8})
    path = folder / "metrics.jsonl"
    path.write_text("".join(json.dumps(line) + "\n" for line in lines))
    return path


def size_of_png(path):
    data = path.read_bytes()
    assert data[:8] == b"\x89PNG\r\n\x1a\n"
    assert data[-8:-4] == b"IEND"
    assert len(data) > 10_000
    return struct.unpack(">II", data[16:24])


@pytest.mark.filterwarnings("error")  # names that the machine's fonts lack are nobody's business
@pytest.mark.parametrize("moe", [False, True], ids=["dense", "moe"])
def test_a_picture(tmp_path, moe):
    assert draw_loss_curve(metrics(tmp_path, 12, moe), tmp_path / "loss.png") is True
    width, height = size_of_png(tmp_path / "loss.png")
    assert (width, height) == (1080, 864 if moe else 672)


def test_two_records_without_validation_are_enough(tmp_path):
    assert draw_loss_curve(metrics(tmp_path, 2, valid=False), tmp_path / "loss.png") is True
    assert size_of_png(tmp_path / "loss.png")[0] == 1080


@pytest.mark.parametrize("steps", [0, 1])
def test_fewer_than_two_records_are_no_curve(tmp_path, steps):
    assert draw_loss_curve(metrics(tmp_path, steps), tmp_path / "loss.png") is False
    assert draw_loss_curve(tmp_path / "absent.jsonl", tmp_path / "loss.png") is False
    assert not (tmp_path / "loss.png").exists()


@pytest.mark.filterwarnings("error")
def test_odd_values_do_not_stop_it(tmp_path):
    """A gradient norm of zero on a logarithmic axis; values that are not finite."""
    assert draw_loss_curve(metrics(tmp_path, 4, grad_norm=0.0, loss=math.inf), tmp_path / "loss.png") is True
    size_of_png(tmp_path / "loss.png")

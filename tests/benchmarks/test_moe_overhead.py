"""The experts' overhead: measured on tiny layers, and what counts as saved."""

from __future__ import annotations

import json

import pytest
import torch
from torch import nn

from benchmarks import moe_overhead
from benchmarks.moe_overhead import Found, Shape, measure, row, saved_bytes
from benchmarks.table import markers

TINY = Shape(4, 2, 16, fp32=1.08, bf16=1.3)


@pytest.mark.parametrize("dtype", ["fp32", "bf16"])
def test_both_layers_are_timed_in_every_round(dtype):
    found = measure(TINY, dtype, dim=32, tokens=48, rounds=2, steps=1)
    assert len(found.dense) == len(found.experts) == 2
    assert all(time > 0 for time in (*found.dense, *found.experts))


def test_saved_is_activations_only_and_each_once():
    class Twice(nn.Linear):
        def forward(self, x):
            hidden = super().forward(x)
            return hidden * hidden  # saves hidden twice; the map saves its input and its weight

    layer, x = Twice(8, 16), torch.randn(4, 8, requires_grad=True)
    assert saved_bytes(layer, x, "fp32") == 4 * 16 * 4


def test_autocasts_copies_of_weights_are_no_activations():
    layer, x = nn.Linear(8, 16, bias=False), torch.randn(4, 8, dtype=torch.bfloat16, requires_grad=True)
    assert saved_bytes(layer, x, "bf16") == 0


def test_row_says_which_aims_are_missed():
    text = row(Found(TINY, "fp32", [1.0, 2.0, 1.0], [1.2, 2.0, 1.1], 2**20, 2**21))
    assert "| 1.10 (1.00-1.20) | <= 1.08: NO |" in text
    assert text.endswith("| 1.0 | 2.0 | <= dense: NO |")


def test_table_goes_between_its_own_markers(tmp_path, monkeypatch):
    monkeypatch.setattr(moe_overhead, "SHAPES", (TINY,))
    document, results = tmp_path / "page.md", tmp_path / "found.json"
    begin, end = markers(moe_overhead.NAME)
    document.write_text(f"{begin}\n{end}\nafter\n")
    words = ["--rounds", "1", "--steps", "1", "--tokens", "48", "--dim", "32"]
    monkeypatch.setattr("sys.argv", ["moe_overhead", *words, "--table", str(document), "--results", str(results)])
    moe_overhead.main()
    assert document.read_text().count("4, top 2, width 16") == 2
    assert [one["dtype"] for one in json.loads(results.read_text())] == ["fp32", "bf16"]

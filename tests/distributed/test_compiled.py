"""Compiled blocks compute what the others do (fp64, no dropout: compiled code draws other numbers)."""

from __future__ import annotations

import shutil
from dataclasses import replace

import pytest
from fp64_module import Fp64Module
from trainings import Setting, train_on, worst

needs_compiler = pytest.mark.skipif(shutil.which("g++") is None, reason="torch.compile needs a C++ compiler")
CASES = [
    (1, Setting("moe-loss", None, 2, steps=2, dropout=0.0)),
    (2, Setting("dense", "full_shard", 2, steps=2, dropout=0.0, recompute="selective")),
    pytest.param(1, Setting("prmoe", None, 2, steps=2, dropout=0.0), marks=pytest.mark.release),
]


@needs_compiler
@pytest.mark.parametrize(("ranks", "setting"), CASES)
def test_compiled_blocks_follow_the_same_trajectory(ranks, setting, shards):
    compiled = train_on(ranks, replace(setting, compiled=True), shards)[0]
    assert worst(compiled, train_on(ranks, setting, shards)[0]) < 1e-10


class OneBlock(Fp64Module):
    """Mutant: code compiled once and bound to the first block's weights."""

    def build_model(self):
        model = super().build_model()
        for block in model.layers[1:]:
            block.forward = model.layers[0].forward
        return model


@needs_compiler
def test_mutant_blocks_that_share_weights_are_noticed(shards):
    ranks, setting = CASES[0]
    shared = train_on(ranks, replace(setting, compiled=True), shards, OneBlock)[0]
    assert worst(shared, train_on(ranks, setting, shards)[0]) > 1e-3

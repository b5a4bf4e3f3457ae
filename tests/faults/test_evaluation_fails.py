"""An evaluation that raises: the checkpoint is there already, and the training goes on."""

from __future__ import annotations

from pathlib import Path

import pytest
from broken_runs import differences, fit
from helpers import trajectory, write_recipe
from report import Case

from llmrecipes.modules import PretrainModule


def evaluation_fails(bad_rank: int, *steps: int):
    """The model raises when it is evaluated after these steps, on one rank."""

    def inject(rank: int) -> None:
        real = PretrainModule.loss_terms

        def loss_terms(self, batch):
            if not self.training and rank == bad_rank and self.trainer.global_step in steps:
                saved = sorted(p.name for p in Path(self.trainer.default_root_dir, "checkpoints").glob("step=*"))
                assert saved[-1] == f"step={self.trainer.global_step:06d}", "evaluated before it was saved"
                raise RuntimeError("no memory for the logits")
            return real(self, batch)

        PretrainModule.loss_terms = loss_terms

    return inject


@pytest.mark.parametrize(("ranks", "bad_rank"), [(1, 0), (2, 0), (2, 1)])
def test_the_run_goes_on(tmp_path, little, whole, ranks, bad_rank):
    case = Case(9, "evaluation that raises", ranks)
    write_recipe(tmp_path, little(ranks))
    text = fit(tmp_path, ranks=ranks, inject=evaluation_fails(bad_rank, 6, 12))
    for step in (6, 12):
        (said,) = [line for line in text.splitlines() if f"step {step}: the evaluation failed" in line]
        assert "RuntimeError: no memory for the logits" in said
        case.add()
    assert "Traceback" not in text
    steps = [r for r in trajectory(whole(ranks)) if r["step"] not in (6, 12) or "val_loss" not in r]
    assert trajectory(tmp_path / "run") == steps
    assert differences(tmp_path / "run", whole(ranks), ranks) == ["metrics"]
    case.write()

"""An evaluation that raises: the checkpoint is there already, and the training goes on."""

from __future__ import annotations

import time
from pathlib import Path

import pytest
from broken_runs import assert_same, differences, fit, launched, steps_to_repeat
from helpers import trajectory, write_recipe
from report import Case

from llmrecipes.modules import PretrainModule


def evaluation_fails(bad_rank: int | None, *steps: int):
    """The loss of the evaluation after these steps raises, on one rank or on all (None): no memory for the logits."""

    def inject(rank: int) -> None:
        real = PretrainModule.loss_terms

        def loss_terms(self, batch):
            terms = real(self, batch)
            if not self.training and bad_rank in (None, rank) and self.trainer.global_step in steps:
                saved = sorted(p.name for p in Path(self.trainer.default_root_dir, "checkpoints").glob("step=*"))
                assert saved[-1] == f"step={self.trainer.global_step:06d}", "evaluated before it was saved"
                raise RuntimeError("no memory for the logits")
            return terms

        PretrainModule.loss_terms = loss_terms

    return inject


@pytest.mark.parametrize(
    ("ranks", "bad_rank"), [(1, None), (2, None), pytest.param(2, 0, marks=pytest.mark.release), (2, 1)]
)
def test_the_run_goes_on(tmp_path, little, whole, ranks, bad_rank):
    case = Case(9, "evaluation that raises", ranks)
    write_recipe(tmp_path, little(ranks))
    text = fit(tmp_path, ranks=ranks, inject=evaluation_fails(bad_rank, 6, 9))
    for step in (6, 9):
        said = [line for line in text.splitlines() if f"step {step}: the evaluation failed" in line]
        assert len(said) == (ranks if bad_rank is None else 1), text
        assert "RuntimeError: no memory for the logits" in said[0]
        case.add()
    assert "Traceback" not in text
    steps = [r for r in trajectory(whole(ranks)) if r["step"] not in (6, 9) or "val_loss" not in r]
    assert trajectory(tmp_path / "run") == steps
    assert differences(tmp_path / "run", whole(ranks), ranks) == ["metrics"]
    case.write()


def test_one_rank_alone_within_the_forward_pass(tmp_path, little, whole):
    """Then the others wait for its share of parameters: the job ends in bounded time, and nothing is lost either."""
    case = Case(9, "evaluation that raises in one rank's forward pass: the job ends", 2)
    write_recipe(tmp_path, little(2, timeout=5))

    def inject(rank: int) -> None:
        real = PretrainModule._forward

        def forward(self, batch):
            if not self.training and rank == 1 and self.trainer.global_step == 6:
                raise RuntimeError("no memory for a block")
            return real(self, batch)

        PretrainModule._forward = forward

    with launched(tmp_path, ranks=2, inject=inject) as job:
        job.until_step(tmp_path / "run", 6)
        started = time.monotonic()
        text = job.expect(1)
        case.add(steps_to_repeat(tmp_path / "run"), time.monotonic() - started)
    assert "no progress for 5 s" in text
    fit(tmp_path, ranks=2)
    assert_same(tmp_path / "run", whole(2), ranks=2)
    case.write()

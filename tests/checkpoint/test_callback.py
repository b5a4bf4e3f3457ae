"""Checkpoints during training: when they are written, what stays, and going on inside Lightning's loops."""

from __future__ import annotations

import json
import math
import time

import lightning.pytorch as L
import pytest
import torch
from states import Saboteur, disk_full
from torch import nn

from llmrecipes.checkpoint import CheckpointError, checkpoints, newest_whole, read_info, write_checkpoint
from llmrecipes.checkpoint import callback as callback_module
from llmrecipes.checkpoint.callback import Checkpoints, Validated, set_loop_position

QUIET = {
    "max_epochs": -1,
    "accelerator": "cpu",
    "logger": False,
    "enable_checkpointing": False,
    "enable_progress_bar": False,
    "enable_model_summary": False,
    "use_distributed_sampler": False,
    "num_sanity_val_steps": 0,
    "check_val_every_n_epoch": None,
}


pytestmark = [
    pytest.mark.filterwarnings("ignore:.*treespec, LeafSpec.*"),
    pytest.mark.filterwarnings("ignore:You defined a `validation_step`.*"),
]


class Small(L.LightningModule):
    """As little of a StepModule as the callback asks for; the n-th validation loss is the n-th of ``losses``."""

    tokens_per_step = 10
    passed_over = False

    def __init__(self, losses=()):
        super().__init__()
        self.automatic_optimization = False
        self.model = nn.Linear(3, 1)
        self.losses, self.validation_loss = list(losses), None
        self.trained, self.validated = [], []

    def configure_optimizers(self):
        return torch.optim.AdamW(self.model.parameters(), lr=0.01)

    def training_step(self, batch, batch_idx):
        optimizer = self.optimizers()
        self.manual_backward(self.model(batch * torch.rand(3)).square().sum())
        optimizer.step()
        optimizer.zero_grad()
        self.trained.append((self.trainer.global_step, batch_idx))

    def validation_step(self, batch, batch_idx):
        self.validation_loss = self.losses.pop(0) if self.losses else None
        self.validated.append(self.trainer.global_step)

    def progress(self):
        return {"step": self.trainer.global_step}

    def saved_tensors(self):
        return dict(self.model.state_dict())

    def settle(self):
        pass


class Ones:
    """An endless stream, or ``length`` batches."""

    def __init__(self, length=None):
        self.length = length

    def __iter__(self):
        return iter([torch.ones(2, 3)] * (self.length or 10_000))


def run(folder, callback, steps, module=None, **trainer):
    module = module or Small()
    trainer = L.Trainer(**QUIET, max_steps=steps, default_root_dir=str(folder), callbacks=[callback], **trainer)
    valid = Ones(1) if module.losses else None
    trainer.fit(module, Ones(), valid)
    return module


def names(folder):
    return [path.name for path in checkpoints(folder / "checkpoints")]


def test_loop_position_goes_on_in_the_middle(tmp_path):
    """Step 3 is done: two more follow, numbered 4 and 5, and validation comes when it would have come."""

    class Jump(L.Callback):
        def on_fit_start(self, trainer, pl_module):
            set_loop_position(trainer, 3)

    module = run(tmp_path, Jump(), 8, Small([1.0] * 9), val_check_interval=2)
    assert module.trained == [(4, 3), (5, 4), (6, 5), (7, 6), (8, 7)]
    assert module.validated == [4, 6, 8]
    whole = run(tmp_path, L.Callback(), 8, Small([1.0] * 9), val_check_interval=2)
    assert whole.trained[3:] == module.trained
    assert whole.validated == [2, 4, 6, 8]


def test_position_at_the_end_trains_nothing(tmp_path):
    class Jump(L.Callback):
        def on_fit_start(self, trainer, pl_module):
            set_loop_position(trainer, 5)

    module = run(tmp_path, Jump(), 5)
    assert module.trained == []
    assert module.trainer.global_step == 5


def test_every_and_at_the_end_in_steps_or_tokens(tmp_path):
    run(tmp_path / "a", Checkpoints(every="3 steps", keep_last=9), 8)
    run(tmp_path / "b", Checkpoints(every="25 tokens", keep_last=9), 8)  # 10 tokens per step: rounded up to 3 steps
    assert names(tmp_path / "a") == names(tmp_path / "b") == ["step=000003", "step=000006", "step=000008"]
    latest = tmp_path / "a" / "checkpoints" / "latest"
    assert latest.resolve().name == "step=000008"
    assert read_info(latest.resolve())["progress"] == {"step": 8}


def test_keep_last_every_and_best(tmp_path):
    losses = [5.0, 4.0, 3.0, 4.0, 5.0, 6.0]  # at steps 2, 4, ... 12; the best at 6
    run(
        tmp_path,
        Checkpoints(every="1 steps", keep_last=2, keep_every="5 steps"),
        12,
        Small(losses),
        val_check_interval=2,
    )
    assert names(tmp_path) == [f"step={s:06d}" for s in (5, 6, 10, 11, 12)]
    validated = json.loads((tmp_path / "checkpoints" / "validated.json").read_text())
    assert validated == {"step": 12, "best_step": 6, "best_loss": 3.0}


def test_the_best_is_saved_when_it_is_not_yet_there(tmp_path):
    losses = [5.0, 4.0, 6.0]
    callback = Checkpoints(every="5 steps", keep_last=1)
    run(tmp_path, callback, 6, Small(losses), val_check_interval=2)
    assert names(tmp_path) == ["step=000004", "step=000006"]
    assert callback.save_seconds > 0
    run(
        tmp_path / "b",
        Checkpoints(every="5 steps", keep_last=1, keep_best=False),
        6,
        Small(losses),
        val_check_interval=2,
    )
    assert names(tmp_path / "b") == ["step=000006"]


def resume(folder, steps, losses=(), **trainer):
    callback = Checkpoints(every="1 steps", keep_last=2)
    callback.resume_from, _ = newest_whole(folder / "checkpoints")
    module = run(folder, callback, steps, Small(losses), **trainer)
    return module, callback


@pytest.mark.parametrize("lost", [None, "set_rng_state", "load_optimizer", "set_loop_position"])
def test_resumed_equals_uninterrupted_and_each_part_of_it_matters(tmp_path, monkeypatch, lost):
    """With a part not restored (the mutants) the parameters, or the number of steps, are others."""
    torch.manual_seed(1)
    whole = run(tmp_path / "whole", Checkpoints(every="1 steps"), 6)
    torch.manual_seed(1)
    run(tmp_path / "halves", Checkpoints(every="1 steps"), 3)
    torch.manual_seed(99)
    if lost:
        monkeypatch.setattr(callback_module, lost, lambda *_: None)
    module, _ = resume(tmp_path / "halves", 6)
    equal = module.trained == whole.trained[3:]
    for part in ("model/shard-00000", "optimizer/shard-00000", "rng-00000"):
        file = f"checkpoints/step=000006/{part}.safetensors"
        equal = equal and (tmp_path / "whole" / file).read_bytes() == (tmp_path / "halves" / file).read_bytes()
    assert equal == (lost is None)


def test_a_validation_that_the_kill_prevented_is_made_up_for(tmp_path):
    run(tmp_path, Checkpoints(every="2 steps"), 4)  # its checkpoint of step 4 came, its validation did not
    module, _ = resume(tmp_path, 8, [4.0, 3.0, 2.0], val_check_interval=4)
    assert module.validated == [4, 8]
    module, _ = resume(tmp_path, 10, [9.0], val_check_interval=4)
    assert module.validated == [10]  # that of step 8 was made; the last step always has one


def test_the_best_is_remembered_over_resumes(tmp_path):
    run(tmp_path, Checkpoints(every="1 steps", keep_last=2), 6, Small([1.0, 5.0, 5.0]), val_check_interval=2)
    resume(tmp_path, 10, [4.0, 4.0], val_check_interval=2)
    assert names(tmp_path) == ["step=000002", "step=000009", "step=000010"]


@pytest.mark.parametrize(
    ("content", "up_to", "expected"),
    [
        (None, 5, Validated()),
        ("", 5, Validated()),
        ('{"step": 4', 5, Validated()),
        ("[1]", 5, Validated()),
        ('{"steps": 4}', 5, Validated()),
        ('{"step": 4, "best_step": 2, "best_loss": 1.5}', 5, Validated(4, 2, 1.5)),
        # The run went back to step 5: what was validated later is validated again, the best before it stays the best.
        ('{"step": 8, "best_step": 2, "best_loss": 1.5}', 5, Validated(-1, 2, 1.5)),
        ('{"step": 8, "best_step": 8, "best_loss": 1.5}', 5, Validated(-1, -1, math.inf)),
    ],
)
def test_what_was_validated_is_read_back(tmp_path, content, up_to, expected):
    if content is not None:
        (tmp_path / "validated.json").write_text(content)
    assert Validated.read(tmp_path, up_to) == expected


def test_falling_back_sets_the_broken_one_aside(tmp_path):
    run(tmp_path, Checkpoints(every="1 steps", keep_last=3), 6)
    root = tmp_path / "checkpoints"
    (root / "step=000006" / "manifest.json").unlink()
    (root / ".tmp-step=000007-1").mkdir()
    resume(tmp_path, 8)
    assert names(tmp_path) == ["step=000007", "step=000008"]
    assert (root / "broken-step=000006").is_dir()
    assert not (root / ".tmp-step=000007-1").exists()


def test_a_full_disk_stops_the_run_and_the_older_one_stays(tmp_path, monkeypatch):
    class Full(L.Callback):
        def on_train_batch_start(self, trainer, pl_module, batch, batch_idx):
            if batch_idx == 4:
                Saboteur(monkeypatch, 5, disk_full)

    trainer = L.Trainer(
        **QUIET, max_steps=8, default_root_dir=str(tmp_path), callbacks=[Checkpoints(every="1 steps"), Full()]
    )
    with pytest.raises(CheckpointError, match="No space left"):
        trainer.fit(Small(), Ones())
    monkeypatch.undo()
    assert newest_whole(tmp_path / "checkpoints")[0].name == "step=000004"
    assert names(tmp_path) == ["step=000003", "step=000004"]


def test_saving_in_the_background_leaves_the_same_run_folder(tmp_path):
    """Checkpoints, what is purged, the best one: nothing depends on when the writing ends."""
    folders = {}
    for name, in_background in (("now", False), ("meanwhile", True)):
        torch.manual_seed(1)
        callback = Checkpoints(every="1 steps", keep_last=2, keep_every="5 steps", async_save=in_background)
        run(tmp_path / name, callback, 12, Small([5.0, 4.0, 3.0, 4.0, 5.0, 6.0]), val_check_interval=2)
        root = tmp_path / name / "checkpoints"
        folders[name] = {str(p.relative_to(root)): p.read_bytes() for p in root.rglob("*") if p.is_file()}
        assert callback.stall_seconds > 0
        assert callback.stall_seconds <= callback.save_seconds + 1e-3 or in_background
        assert (root / "latest").resolve().name == "step=000012"
    assert names(tmp_path / "meanwhile") == [f"step={s:06d}" for s in (5, 6, 10, 11, 12)]
    assert folders["now"] == folders["meanwhile"]


@pytest.mark.parametrize("stop", ["save", "save_now"])
def test_a_save_in_flight_is_finished_when_training_ends(tmp_path, monkeypatch, stop):
    class Stop(L.Callback):
        def on_train_batch_end(self, trainer, pl_module, outputs, batch, batch_idx):
            if trainer.global_step == 3:
                self.path = getattr(callback, stop)(trainer, pl_module)
                self.there = self.path.exists()
                trainer.should_stop = True

    written = []

    def slowly(*args):
        time.sleep(0.1)
        written.append(write_checkpoint(*args))
        return written[-1]

    monkeypatch.setattr(callback_module, "write_checkpoint", slowly)
    callback, ending = Checkpoints(every="100 steps", async_save=True), Stop()
    run_with(tmp_path, [callback, ending], 8)
    assert ending.there == (stop == "save_now")
    assert names(tmp_path) == ["step=000003"]
    assert newest_whole(tmp_path / "checkpoints")[0] == ending.path == written[-1]


def run_with(folder, callbacks, steps):
    trainer = L.Trainer(**QUIET, max_steps=steps, default_root_dir=str(folder), callbacks=callbacks)
    module = Small()
    trainer.fit(module, Ones())
    return module


def test_a_failed_save_in_the_background_stops_the_run_at_the_next_step(tmp_path, monkeypatch):
    module = Small()

    class Full(L.Callback):
        def on_train_batch_start(self, trainer, pl_module, batch, batch_idx):
            if batch_idx >= 3 and (thread := callback._background._thread):
                thread.join()  # it has had its time
            if batch_idx == 3:
                Saboteur(monkeypatch, 5, disk_full)

    callback = Checkpoints(every="1 steps", async_save=True)
    trainer = L.Trainer(**QUIET, max_steps=8, default_root_dir=str(tmp_path), callbacks=[callback, Full()])
    with pytest.raises(CheckpointError, match="No space left"):
        trainer.fit(module, Ones())
    monkeypatch.undo()
    assert [step for step, _ in module.trained] == [1, 2, 3, 4, 5]
    assert newest_whole(tmp_path / "checkpoints")[0].name == "step=000003"


def test_the_note_of_the_best_waits_for_its_checkpoint(tmp_path, monkeypatch):
    """Else a kill in between would leave a best step without a checkpoint, and the former best forgotten."""
    write = Validated.write
    seen = []

    def note(self, root):
        seen.append((self.best_step, newest_whole(root)[0].name))
        write(self, root)

    monkeypatch.setattr(Validated, "write", note)
    callback = Checkpoints(every="100 steps", async_save=True)
    run(tmp_path, callback, 4, Small([5.0, 4.0]), val_check_interval=2)
    assert seen == [(2, "step=000002"), (4, "step=000004")]

"""The one optimizer step: equal gradients for every micro-batch, counts once per step, non-finite steps not applied."""

from __future__ import annotations

import math
from types import SimpleNamespace

import lightning.pytorch as L
import pytest
import torch

from llmrecipes.data.batch import IGNORE, Batch
from llmrecipes.models import ModelConfig, MoEConfig
from llmrecipes.modules import PretrainModule, TrainingStopped
from llmrecipes.optim import AdamW, Constant

ROWS, LENGTH, VOCAB = 8, 24, 96


class OneBatch(L.LightningDataModule):
    """Feeds the same batch at every step."""

    def __init__(self, batch, micro_batch):
        super().__init__()
        self.batch, self.micro_batch = batch, micro_batch
        self.global_batch, self.seq_len, self.start_step = ROWS, LENGTH, 0
        self.tokens_per_step = ROWS * LENGTH

    def train_dataloader(self):
        return Repeat(self.batch)


class Repeat:
    """Lightning takes any iterable but a plain list of batches, which it takes for several loaders."""

    def __init__(self, batch):
        self.batch = batch

    def __iter__(self):
        while True:
            yield self.batch


def ragged_batch(seed=0):
    """Rows with very different numbers of targets: the case that averages of averages get wrong."""
    generator = torch.Generator().manual_seed(seed)
    tokens = torch.randint(0, VOCAB, (ROWS, LENGTH), generator=generator)
    labels = torch.randint(0, VOCAB, (ROWS, LENGTH), generator=generator)
    mask = torch.ones(ROWS, LENGTH, dtype=torch.bool)
    for row in range(ROWS):
        labels[row, 1 + 3 * row :] = IGNORE
        mask[row, 4 + 2 * row :] = False
    return Batch(tokens, labels, [[10, LENGTH - 10]] * ROWS, mask)


MORE = {
    "residual": {"residual": True, "top_k": 1, "renormalize": False},
    "shared": {"shared_ffn_dim": 20},
    "pyramid": {"num_experts": None, "experts_per_layer": [2, 6]},
    "prmoe": {"num_experts": None, "experts_per_layer": [2, 6], "residual": True, "capacity_factor": 0.8},
}


def config(kind):
    moe = None
    if kind != "dense":
        _, balance, *more = kind.split("-")
        options = {"num_experts": 4, "ffn_dim": 24, "balance": balance, "balance_coef": 0.1, "z_loss_coef": 0.01}
        moe = MoEConfig(**(options | {k: v for name in more for k, v in MORE[name].items()}))
    return ModelConfig(vocab_size=VOCAB, dim=32, num_layers=2, num_heads=4, num_kv_heads=2, ffn_dim=48, moe=moe)


def train(kind, micro_batch, steps=1, batch=None, module_class=PretrainModule, clip_norm=None, lr=0.01):
    """Parameters, gradients' norm and figures after some steps in fp64."""
    module = module_class(config(kind), AdamW(lr=lr), Constant(), clip_norm=clip_norm, seed=3)
    trainer = L.Trainer(
        max_steps=steps,
        max_epochs=-1,
        precision="64-true",
        accelerator="cpu",
        logger=False,
        enable_checkpointing=False,
        enable_progress_bar=False,
        enable_model_summary=False,
        use_distributed_sampler=False,
    )
    gradients = {}

    class Keep(L.Callback):
        def on_before_optimizer_step(self, trainer, pl_module, optimizer):
            gradients.update({n: p.grad.clone() for n, p in pl_module.model.named_parameters()})

    trainer.callbacks.append(Keep())
    trainer.fit(module, datamodule=OneBatch(batch or ragged_batch(), micro_batch))
    return SimpleNamespace(gradients=gradients, record=module.last_step, module=module, trainer=trainer)


def worst_difference(a, b):
    assert a.keys() == b.keys()
    return max(float((a[n] - b[n]).abs().max()) for n in a)


DROPLESS = [
    "dense", "moe-loss", "moe-bias", "moe-loss-residual", "moe-loss-shared", "moe-loss-pyramid",
    "moe-bias-pyramid-residual",
]  # fmt: skip


@pytest.mark.parametrize("kind", DROPLESS)
def test_gradients_are_equal_for_every_micro_batch(kind):
    whole = train(kind, ROWS)
    assert sum(g.abs().sum() for g in whole.gradients.values()) > 1
    sizes = (1, 2, 4, 8)
    for size in sizes:
        split = train(kind, size)
        assert worst_difference(split.gradients, whole.gradients) < 1e-12, size
        assert split.record.grad_norm.item() == pytest.approx(whole.record.grad_norm.item(), abs=1e-12)
        for name, value in whole.record.losses.items():
            assert split.record.losses[name].item() == pytest.approx(value.item(), abs=1e-12), name
        if kind != "dense":
            loads = [record.extra["expert_load"] for record in (split.record, whole.record)]
            assert len(loads[0]) == 2 and all(map(torch.equal, *loads))


class MeanOfMeans(PretrainModule):
    """Mutant: each micro-batch is divided by its own count, then averaged, as ``accumulate_grad_batches`` does."""

    def loss_terms(self, batch):
        terms = super().loss_terms(batch)
        share = self.trainer.datamodule.micro_batch / ROWS
        total = self.trainer.datamodule.batch.num_targets
        term = terms["loss"]
        return terms | {"loss": term._replace(sum=term.sum / batch.num_targets * share * total)}


def test_mutant_mean_of_means_differs():
    whole = train("dense", ROWS)
    assert worst_difference(train("dense", ROWS, module_class=MeanOfMeans).gradients, whole.gradients) < 1e-12
    assert worst_difference(train("dense", 2, module_class=MeanOfMeans).gradients, whole.gradients) > 1e-3


def test_running_counts_are_close_but_not_exact():
    """``balance_counts: running`` saves a forward per step; only the balance loss feels it."""
    from dataclasses import replace

    class Running(PretrainModule):
        def __init__(self, config, *args, **kwargs):
            moe = replace(config.moe, balance_counts="running")
            super().__init__(replace(config, moe=moe), *args, **kwargs)

    whole, running = train("moe-loss", ROWS), train("moe-loss", 2, module_class=Running)
    assert 1e-9 < worst_difference(running.gradients, whole.gradients) < 0.2


def test_first_loss_is_ln_vocab():
    for kind in ("dense", "moe-loss"):
        loss = train(kind, ROWS).record.losses["loss"].item()
        assert loss == pytest.approx(math.log(VOCAB), rel=0.02)


def test_bias_moves_once_per_step_whatever_the_micro_batch():
    moved = [
        torch.stack([b.mlp.gate.bias for b in train("moe-bias", size, steps=3, lr=1e-4).module.model.layers])
        for size in (1, 8)
    ]
    assert torch.equal(*moved)
    assert moved[0].abs().max() > 0
    assert moved[0].sum(-1).abs().max() < 1e-6  # centred


def test_expert_load_counts_real_tokens_only():
    record = train("moe-loss", 2).record
    load = torch.stack(record.extra["expert_load"])
    assert load.sum(-1).tolist() == pytest.approx([1.0, 1.0])
    real = ragged_batch().num_tokens
    assert real < ROWS * LENGTH
    pairs = load * real * 2
    assert torch.allclose(pairs, pairs.round(), atol=1e-3)


@pytest.mark.parametrize("value", [float("nan"), float("inf")])
def test_non_finite_step_is_not_applied(value):
    class Poisoned(PretrainModule):
        def loss_terms(self, batch):
            terms = super().loss_terms(batch)
            if self.trainer.global_step == 2:
                self.before = {n: p.detach().clone() for n, p in self.model.named_parameters()}
                terms["loss"] = terms["loss"]._replace(sum=terms["loss"].sum * value)
            return terms

    kept = {}

    class Remember(Poisoned):
        def _refused(self, *args):
            kept.update(model=self)
            return super()._refused(*args)

    with pytest.raises(TrainingStopped, match=r"step 3: .*the step was not applied.*checkpoints"):
        train("dense", 4, steps=5, module_class=Remember)
    model = kept["model"]
    assert model.trainer.global_step == 3  # counted, and without effect
    for name, parameter in model.model.named_parameters():
        assert torch.equal(parameter, model.before[name]), name


def test_clipping_scales_to_the_norm():
    free, clipped = train("dense", 4), train("dense", 4, clip_norm=0.05)
    assert clipped.record.grad_norm.item() == pytest.approx(free.record.grad_norm.item(), rel=1e-12)
    norm = torch.stack([g.norm() for g in clipped.gradients.values()]).norm()
    assert norm.item() == pytest.approx(0.05, rel=1e-4)
    with pytest.raises(AssertionError):
        assert torch.stack([g.norm() for g in free.gradients.values()]).norm().item() == pytest.approx(0.05, rel=1e-4)


def test_what_a_pyramid_with_capacity_records():
    """Loads and drops per layer, of whatever number of experts; with a capacity the split decides what is dropped."""
    records = {size: train("moe-loss-prmoe", size, steps=2, lr=1e-3).record for size in (2, 8)}
    for record in records.values():
        assert [len(load) for load in record.extra["expert_load"]] == [2, 6]
        assert [float(load.sum()) for load in record.extra["expert_load"]] == pytest.approx([1.0, 1.0])
        plain = record.as_json()
        assert [len(load) for load in plain["expert_load"]] == [2, 6]
        assert all(len(plain[name]) == 2 for name in ("max_violation", "load_entropy", "router_entropy"))
        assert len(plain["dropped_fraction"]) == 2 and all(0 < part < 0.6 for part in plain["dropped_fraction"])
    fractions = [record.extra["dropped_fraction"] for record in records.values()]
    assert not torch.equal(*fractions)
    again = train("moe-loss-prmoe", 2, steps=2, lr=1e-3).record.as_json()
    assert again == records[2].as_json()
    assert "dropped_fraction" not in train("moe-loss", 8).record.as_json()


def test_balance_counted_first_sees_the_same_drops():
    """The counting pass of ``balance_counts: step`` draws the same random order as the pass that is trained on."""

    class Watch(PretrainModule):
        def step_sums(self):
            self.known, self.seen = self._routing.known, super().step_sums()["counts"].clone()
            return super().step_sums()

    for balance in ("moe-loss-prmoe", "moe-loss-pyramid"):
        module = train(balance, 2, module_class=Watch).module
        assert torch.equal(module.known, module.seen)

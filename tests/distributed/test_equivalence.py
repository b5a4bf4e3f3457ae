"""One trajectory, however many processes compute it and however they share the model (fp64, 1e-10)."""

from __future__ import annotations

import itertools
from dataclasses import replace

import pytest
from fp64_module import Fp64Module
from ranks import run_ranks
from trainings import Setting, train, train_on, worst

from llmrecipes.modules import base

TOLERANCE = 1e-10
KINDS = ("dense", "moe-loss", "moe-bias")
MICRO_BATCHES = (1, 2)
RECOMPUTE = ("none", "selective", "full")
MODES = ("no_shard", "shard_grad_op", "full_shard", "hybrid_shard", "hybrid_shard_zero2")
# Copies x processes that share one, for the hybrid modes.
MESHES = {1: [1, 1], 2: [2, 1], 4: [2, 2]}


def cases(ranks):
    for mode, micro_batch, recompute, kind in itertools.product(MODES, MICRO_BATCHES, RECOMPUTE, KINDS):
        mesh = MESHES[ranks] if mode.startswith("hybrid") else None
        yield Setting(kind, mode, micro_batch, steps=2, recompute=recompute, mesh=mesh)


def train_all(settings, shards, module_class=Fp64Module):
    """Many trainings in one set of processes: starting them costs more than the steps."""
    return [train(setting, shards, module_class) for setting in settings]


@pytest.fixture(scope="module")
def references(shards):
    """The plain single process, per kind of model and micro-batch; itself the same for all micro-batches."""
    settings = [Setting(kind, None, size, steps=2) for kind in KINDS for size in MICRO_BATCHES]
    (results,) = run_ranks(1, train_all, settings, shards)
    return {(s.kind, s.micro_batch): result for s, result in zip(settings, results, strict=True)}


@pytest.mark.slow
@pytest.mark.parametrize("ranks", [1, 2, 4])
def test_every_strategy_is_the_single_process(ranks, shards, references, stride):
    settings = list(cases(ranks))
    assert len(settings) == 5 * 2 * 3 * 3
    settings = settings[ranks :: stride(14)] if stride(14) > 1 else settings
    assert len(settings) in (90, 7)
    for axis, values in (("mode", MODES), ("micro_batch", MICRO_BATCHES), ("recompute", RECOMPUTE), ("kind", KINDS)):
        assert {getattr(setting, axis) for setting in settings} == set(values)
    per_rank = run_ranks(ranks, train_all, settings, shards, timeout=600)
    for results in per_rank:
        assert len(results) == len(settings)
        for setting, result in zip(settings, results, strict=True):
            difference = worst(result, references[setting.kind, setting.micro_batch])
            assert difference < TOLERANCE, (setting, difference)


def test_experts_divided_among_processes(shards, references):
    settings = [
        Setting("moe-loss", "full_shard", 1, steps=2, expert_parallel=2),
        Setting("moe-loss", "full_shard", 2, steps=2, expert_parallel=4),
        Setting("moe-bias", "full_shard", 1, steps=2, expert_parallel=2, recompute="full"),
        Setting("moe-loss", "no_shard", 1, steps=2, expert_parallel=2),
        Setting("moe-loss", "shard_grad_op", 2, steps=2, expert_parallel=2, recompute="selective"),
        Setting("moe-loss", "hybrid_shard", 1, steps=2, expert_parallel=2, nodes=2),
        Setting("moe-bias", "hybrid_shard_zero2", 2, steps=2, expert_parallel=2, mesh=[2, 2], nodes=2),
    ]
    for nodes in (1, 2):
        some = [s for s in settings if s.nodes == nodes]
        for results in run_ranks(4, train_all, some, shards, nodes=nodes):
            for setting, result in zip(some, results, strict=True):
                difference = worst(result, references[setting.kind, setting.micro_batch])
                assert difference < TOLERANCE, (setting, difference)


@pytest.mark.release
def test_pyramid_with_residual_experts_that_drop(shards):
    """Capacity counts the tokens of a micro-batch, the same whoever computes it; recomputation drops the same."""
    (plain,) = run_ranks(1, train_all, [Setting("prmoe", None, size, steps=2) for size in MICRO_BATCHES], shards)
    dropped = [part for result in plain for record in result["records"] for part in record["dropped_fraction"]]
    assert len(dropped) == 2 * 2 * 2 and min(dropped) > 0.005
    assert worst(*plain) > 1e-5  # another micro-batch, other drops
    settings = {
        2: [
            Setting("prmoe", "full_shard", 1, steps=2, recompute="full"),
            Setting("prmoe", "no_shard", 2, steps=2, recompute="selective"),
        ],
        4: [
            Setting("prmoe", "full_shard", 2, steps=2, expert_parallel=2),
            Setting("prmoe", "hybrid_shard", 1, steps=2, mesh=[2, 2]),
        ],
    }
    for ranks, some in settings.items():
        for results in run_ranks(ranks, train_all, some, shards):
            for setting, result in zip(some, results, strict=True):
                difference = worst(result, plain[MICRO_BATCHES.index(setting.micro_batch)])
                assert difference < TOLERANCE, (setting, difference)


def test_offloaded_parameters_are_the_same(shards, references):
    for mode in ("full_shard", "shard_grad_op"):
        setting = Setting("moe-loss", mode, 2, steps=2, options={"cpu_offload": True})
        for result in train_on(2, setting, shards):
            assert worst(result, references["moe-loss", 2]) < TOLERANCE


@pytest.mark.parametrize("every", [True, pytest.param(False, marks=pytest.mark.release)])
def test_gradients_may_be_reduced_once_or_at_every_micro_batch(every, shards, references):
    for mode, mesh in (("no_shard", None), ("full_shard", None), ("hybrid_shard", [2, 2])):
        setting = Setting("moe-bias", mode, 1, steps=2, mesh=mesh, options={"reduce_every_micro_batch": every})
        for result in train_on(4, setting, shards):
            assert worst(result, references["moe-bias", 1]) < TOLERANCE


class LocalMeans(Fp64Module):
    """Mutant: each rank divides by its own count, as DistributedDataParallel's mean of means does."""

    def _backward(self, terms, counts):
        mine = {name: value / 2 for name, value in counts.items()}
        local = self._batch_counts
        counts = {name: local[name] * (counts[name] / (2 * mine[name])) * 2 for name in counts}
        super()._backward(terms, counts)

    def _gradients(self, step, batch):
        self._batch_counts = batch.counts()
        return super()._gradients(step, batch)


class DoubledByRecompute(Fp64Module):
    """Mutant: loads counted inside the block, where a recomputed forward pass counts again."""

    def configure_model(self):
        super().configure_model()
        self.seen = {}
        for index, block in enumerate(self.model.layers):
            block.mlp.gate.register_forward_hook(lambda m, a, out, i=index: self._count(i, out[2].counts))

    def _count(self, layer, counts):
        self.seen[layer] = self.seen.get(layer, 0) + counts

    def step_sums(self):
        import torch

        sums = super().step_sums()
        counted = torch.cat([self.seen[i] for i in sorted(self.seen)])
        self.seen = {}
        return sums | {"counts": counted}


def test_mutants_differ(shards, references):
    """The comparison has teeth: each of these is a mistake that real trainers made."""
    for result in train_on(2, Setting("dense", "full_shard", 2, steps=2), shards, LocalMeans):
        assert worst(result, references["dense", 2]) > 1e-5
    exact = Setting("moe-bias", "full_shard", 2, steps=2)
    for result in train_on(2, exact, shards, DoubledByRecompute):
        assert worst(result, references["moe-bias", 2]) < TOLERANCE
    doubled = Setting("moe-bias", "full_shard", 2, steps=2, recompute="full")
    for result in train_on(2, doubled, shards, DoubledByRecompute):
        assert worst(result, references["moe-bias", 2]) > 1e-3


def test_mutant_clipping_by_the_local_norm_differs(shards, references, monkeypatch):
    import torch

    from llmrecipes.distributed.clip import clip_grad_norm

    def local(parameters, max_norm, device=None):
        parameters = list(parameters)
        norm = torch.stack([p.grad.to_local().norm() for p in parameters]).norm()
        clip_grad_norm(parameters, None)
        torch._foreach_mul_([p.grad.to_local() for p in parameters], (max_norm / norm).clamp(max=1.0))
        return norm

    monkeypatch.setattr(base, "clip_grad_norm", local)
    for result in train_on(2, Setting("dense", "full_shard", 2, steps=2), shards):
        assert worst(result, references["dense", 2]) > 1e-5


def test_dropout_depends_on_the_sample_not_on_the_rank(shards, references):
    """All of the above runs with dropout on; without the seed of each micro-batch ranks would differ."""

    class Unseeded(Fp64Module):
        def seed_micro_batch(self, step, index):
            pass

    (result,) = train_on(1, Setting("dense", None, 2, steps=2), shards, Unseeded)
    assert worst(result, references["dense", 2]) > 1e-5


@pytest.mark.parametrize("kind", ["dense", "moe-bias"])
def test_bf16_compute_is_close_to_autocast_alone(kind, shards):
    """Parameters gathered in bf16, gradients reduced in fp32, masters in fp32; routers stay in fp32."""
    from llmrecipes.modules import PretrainModule

    plain = Setting(kind, None, 2, steps=3, precision="bf16-mixed", dropout=0.0)
    # Selective: routers are sharded within a block that is computed again, which torch once refused.
    shared = replace(plain, mode="full_shard", recompute="selective")
    (expected,) = train_on(1, plain, shards, PretrainModule)
    for result in train_on(2, shared, shards, PretrainModule):
        for name, parameter in result["parameters"].items():
            assert parameter.dtype.itemsize == 4, name
        for left, right in zip(result["records"], expected["records"], strict=True):
            assert left["loss"] == pytest.approx(right["loss"], rel=2e-2)
            assert left["grad_norm"] == pytest.approx(right["grad_norm"], rel=5e-2)
            assert left["batch"] == right["batch"]

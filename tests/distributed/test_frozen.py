"""Frozen parameters under sharding: not a bit moves, and what is trained moves as in one process (fp64, 1e-10)."""

from __future__ import annotations

import pytest
import torch
from fp64_module import Fp64Module
from ranks import run_ranks
from trainings import Setting, train, whole, worst

from llmrecipes.models import LoraConfig, LoraExperts, ModelConfig
from llmrecipes.modules.trainable import matching, set_trainable

GROUPS = {"one": ["lora"], "per_linear": ["gate", "lm_head"], "per_mlp": ["gate"], "lora_experts": ["lora"]}


class LoraSetting(Setting):
    """The same steps with adapters."""

    def config(self) -> ModelConfig:
        experts = {
            "one": None,
            "per_linear": LoraExperts(num_experts=3, balance="loss", balance_coef=0.1),
            "per_mlp": LoraExperts(num_experts=3, router="per_mlp", balance="bias", bias_rate=0.01),
            "lora_experts": LoraExperts(num_experts=2, null_expert=False),
        }[self.kind]
        lora = LoraConfig(rank=4, alpha=8, dropout=0.2, experts=experts)
        return ModelConfig(
            vocab_size=64, dim=32, num_layers=2, num_heads=4, num_kv_heads=2, ffn_dim=48, dropout=0.1, lora=lora
        )


class Frozen(Fp64Module):
    """Trains a group, keeps what it began with, and looks at every gradient."""

    def build_model(self):
        model = super().build_model()
        experts = self.config.lora.experts
        kind = "one" if experts is None else "lora_experts" if not experts.null_expert else experts.router
        set_trainable(model, GROUPS[kind], [])
        return model

    def init_model(self):
        super().init_model()
        with torch.no_grad():
            for name, p in self.model.named_parameters():
                if name.endswith(".b"):
                    p.fill_(0.01)  # experts that add something: else routers have no gradient
        self.began = {name: whole(p) for name, p in self.model.named_parameters()}

    def configure_optimizers(self):
        optimizer = super().configure_optimizers()

        def look(*_):
            for name, p in self.model.named_parameters():
                assert (p.grad is not None) == p.requires_grad, name

        optimizer.register_step_pre_hook(look)
        return optimizer

    def on_train_end(self):
        for name, p in self.model.named_parameters():
            assert torch.equal(whole(p), self.began[name]) != p.requires_grad, name


def train_all(settings, shards):
    return [train(setting, shards, Frozen) for setting in settings]


@pytest.fixture(scope="module")
def references(shards):
    settings = [LoraSetting(kind, None, 2, steps=2) for kind in GROUPS]
    (results,) = run_ranks(1, train_all, settings, shards)
    return dict(zip(GROUPS, results, strict=True))


def test_two_processes_are_one_and_frozen_is_frozen(shards, references):
    settings = [
        LoraSetting(kind, mode, 2, steps=2, recompute=recompute)
        for kind in GROUPS
        for mode, recompute in (("full_shard", "none"), ("shard_grad_op", "full"), ("no_shard", "selective"))
    ]
    assert len(settings) == 12
    for results in run_ranks(2, train_all, settings, shards):
        for setting, result in zip(settings, results, strict=True):
            assert worst(result, references[setting.kind]) < 1e-10, setting
            assert ("aux_loss" in result["records"][0]) == (setting.kind != "one")


def test_the_groups_mean_what_they_say(references):
    names = list(references["per_mlp"]["parameters"])
    assert matching("gate", names) == {f"layers.{i}.mlp.router.weight" for i in range(2)}
    biases = references["per_mlp"]["buffers"]
    assert all(bias.any() for bias in biases.values()) and len(biases) == 2

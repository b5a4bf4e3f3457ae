"""Short fp64 trainings on any number of forked ranks, for comparison."""

from __future__ import annotations

import os
from dataclasses import dataclass, field

import lightning.pytorch as L
from fp64_module import Fp64Module
from ranks import run_ranks
from torch import Tensor
from torch.distributed.tensor import DTensor

from llmrecipes.data import PackedShards
from llmrecipes.distributed import ShardedStrategy
from llmrecipes.models import ModelConfig, MoEConfig
from llmrecipes.optim import AdamW, WarmupCosine
from llmrecipes.recipe import Duration
from llmrecipes.run.fit import quiet_lightning

VOCAB = 64


@dataclass
class Setting:
    """One way of computing the same steps."""

    kind: str = "dense"
    mode: str | None = None
    micro_batch: int = 2
    steps: int = 3
    recompute: str = "none"
    expert_parallel: int = 1
    mesh: list[int] | None = None
    nodes: int = 1
    precision: str = "32-true"
    dropout: float = 0.1
    compiled: bool = False
    options: dict = field(default_factory=dict)

    def config(self) -> ModelConfig:
        moe = None
        if self.kind == "prmoe":
            moe = MoEConfig(
                experts_per_layer=[2, 6], ffn_dim=24, top_k=1, renormalize=False, residual=True, balance_coef=0.1,
                capacity_factor=1.0, min_capacity=1,
            )  # fmt: skip
        elif self.kind != "dense":
            balance = self.kind.partition("-")[2]
            moe = MoEConfig(num_experts=4, ffn_dim=24, balance=balance, balance_coef=0.1, z_loss_coef=0.01)
        return ModelConfig(
            vocab_size=VOCAB, dim=32, num_layers=2, num_heads=4, num_kv_heads=2, ffn_dim=48, moe=moe,
            dropout=self.dropout,
        )  # fmt: skip

    def strategy(self) -> str | ShardedStrategy:
        if self.mode is None:
            return "auto"
        return ShardedStrategy(
            mode=self.mode,
            activation_checkpointing=self.recompute,
            expert_parallel=self.expert_parallel,
            mesh=self.mesh,
            timeout=60,
            **self.options,
        )


def whole(tensor: Tensor) -> Tensor:
    tensor = tensor.detach()
    return (tensor.full_tensor() if isinstance(tensor, DTensor) else tensor).clone()


def train(setting: Setting, shards: dict, module_class: type = Fp64Module) -> dict:
    """Losses, norms, loads per step, and the last parameters; run on every rank."""
    quiet_lightning()
    module = module_class(
        setting.config(),
        AdamW(lr=0.01),
        WarmupCosine(Duration(2, "steps")),
        clip_norm=0.5,
        seed=3,
        compile=setting.compiled,
    )
    data = PackedShards(
        train={str(shards["a"]): 1.0, str(shards["b"]): 2.0},
        seq_len=32,
        micro_batch=setting.micro_batch,
        global_batch=8,
        split="80,10,10",
        valid_batches=3,
    )
    records = []

    class Keep(L.Callback):
        def on_train_batch_end(self, trainer, pl_module, *args):
            records.append(pl_module.last_step.as_json())

    per_node = int(os.environ.get("LOCAL_WORLD_SIZE", "1"))
    trainer = L.Trainer(
        max_steps=setting.steps,
        max_epochs=-1,
        accelerator="cpu",
        devices=per_node,
        num_nodes=setting.nodes,
        strategy=setting.strategy(),
        precision=setting.precision,
        logger=False,
        enable_checkpointing=False,
        enable_progress_bar=False,
        enable_model_summary=False,
        use_distributed_sampler=False,
        num_sanity_val_steps=0,
        check_val_every_n_epoch=None,
        val_check_interval=setting.steps,
        callbacks=[Keep()],
    )
    trainer.fit(module, datamodule=data)
    return {
        "records": records,
        "validation": module.validation_metrics,
        "parameters": {name: whole(p) for name, p in module.model.named_parameters()},
        "buffers": {name: whole(b) for name, b in module.model.named_buffers()},
    }


def train_on(ranks: int, setting: Setting, shards: dict, module_class: type = Fp64Module) -> list[dict]:
    """The result of each rank; one rank without a strategy is the plain single process."""
    return run_ranks(ranks, train, setting, shards, module_class, nodes=setting.nodes)


def numbers(value: float | list) -> list[float]:
    """One after another; layers may have different numbers of experts."""
    return [number for item in value for number in numbers(item)] if isinstance(value, list) else [float(value)]


def worst(a: dict, b: dict) -> float:
    """The largest difference of any logged figure or parameter of two runs; infinite where texts differ."""
    assert len(a["records"]) == len(b["records"])
    differences = [0.0]
    for left, right in zip([*a["records"], a["validation"]], [*b["records"], b["validation"]], strict=True):
        assert left.keys() == right.keys()
        for name, value in left.items():
            if isinstance(value, str):
                differences.append(0.0 if value == right[name] else float("inf"))
            else:
                pairs = zip(numbers(value), numbers(right[name]), strict=True)
                differences += [abs(mine - theirs) for mine, theirs in pairs]
    for part in ("parameters", "buffers"):
        assert a[part].keys() == b[part].keys()
        differences += [float((a[part][n].double() - b[part][n].double()).abs().max()) for n in a[part]]
    return max(differences)

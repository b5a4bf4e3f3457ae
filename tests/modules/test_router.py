"""From a seed to a trained router through the commands: what is frozen stays, what is trained resumes, domains part."""

from __future__ import annotations

import json
from pathlib import Path

import numpy as np
import pytest
import torch
from helpers import cli, saved_tensors, trajectory, write_recipe
from ranks import run_ranks
from safetensors.torch import load_file

from llmrecipes.convert.folder import read_model
from llmrecipes.data import ShardWriter
from llmrecipes.recipe import read_recipe

LORA = {"rank": 8, "alpha": 16, "dropout": 0.1}


def fit(folder, config, *words):
    return cli("fit", "--config", write_recipe(folder, config, f"{config['name']}.yaml"), "--run_root", folder, *words)


def stage(recipe, kind, name, init_from, domains, steps, lr=0.003, **config):
    made = recipe(steps=steps)
    made["name"] = name
    made["model"]["class_path"] = f"llmrecipes.modules.{kind}"
    init = made["model"]["init_args"]
    init["config"] |= {"dropout": 0.0} | config
    init["init_from"] = str(init_from)
    init["optimizer"]["init_args"]["lr"] = lr
    init["schedule"]["init_args"]["decay"] = f"{steps} steps"
    made["trainer"]["val_check_interval"] = steps
    made["checkpoint"]["every"] = f"{steps} steps"
    made["data"]["init_args"] |= {"micro_batch": 8, "global_batch": 8, "train": dict.fromkeys(domains.values(), 1.0)}
    return made


@pytest.fixture(scope="module")
def domains(tmp_path_factory) -> dict[str, str]:
    """Two domains with words of their own, which a router can tell apart."""
    folder = tmp_path_factory.mktemp("domains")
    generator = np.random.default_rng(1)
    for name, first in (("a", 4), ("b", 34)):
        with ShardWriter(folder / name, 64, eos_id=2, tokenizer_sha256="0" * 64) as writer:
            for _ in range(150):
                start, length = generator.integers(0, 30), generator.integers(20, 80)
                writer.add(np.append(first + (start + 7 * np.arange(length)) % 30, 2))
    return {name: str(folder / name) for name in "ab"}


@pytest.fixture(scope="module")
def world(tmp_path_factory, recipe, domains):
    """Seed, a branch per domain, and both kinds of merge. Read only."""
    folder = tmp_path_factory.mktemp("world")
    seed = recipe(steps=24, micro_batch=8, global_batch=8, train=dict.fromkeys(domains.values(), 1.0))
    seed["name"] = "seed"
    seed["trainer"]["val_check_interval"] = 24
    seed["model"]["init_args"]["config"]["dropout"] = 0.0
    assert fit(folder, seed) == 0
    for name in "ab":
        branch = stage(recipe, "LoraExpertModule", name, folder / "seed", domains, 40, lr=0.01, lora=dict(LORA))
        branch["data"]["init_args"]["train"] = {domains[name]: 1.0}
        assert fit(folder, branch) == 0
    for router in ("per_linear", "per_mlp"):
        words = ["--experts", folder / "a", folder / "b", "--router", router]
        assert cli("merge", "lora", folder / "seed", folder / f"merged_{router}", *words) == 0
    return folder


def router_stage(recipe, world, domains, router, name="router", steps=40, **changes):
    experts = {"num_experts": 2, "top_k": 2, "router": router}
    config = stage(
        recipe, "RouterModule", name, world / f"merged_{router}", domains, steps, 0.05, lora=LORA | {"experts": experts}
    )
    config["model"]["init_args"] |= changes
    return config


@pytest.fixture(scope="module", params=["per_linear", "per_mlp"])
def routed(request, tmp_path_factory, recipe, world, domains) -> tuple[str, Path]:
    """A trained router. Read only."""
    folder = tmp_path_factory.mktemp(request.param)
    assert fit(folder, router_stage(recipe, world, domains, request.param)) == 0
    return request.param, folder / "router"


def val_losses(run):
    return [r for r in trajectory(run) if "val_loss" in r][-1]


def test_only_routers_move_and_only_they_are_saved(world, routed):
    router, run = routed
    before, after = (read_model(f).model.state_dict() for f in (world / f"merged_{router}", run))
    changed = {name for name in before if not torch.equal(before[name], after[name])}
    assert changed == {name for name in before if name.endswith("router.weight")}
    assert len(changed) == (6 if router == "per_linear" else 2)
    (saved,) = (run / "checkpoints" / "step=000040" / "model").glob("*.safetensors")
    assert set(load_file(saved)) == changed | {name for name in before if name.endswith("router.bias")}
    (states,) = (run / "checkpoints" / "step=000040" / "optimizer").glob("*.safetensors")
    assert {name.rpartition(".")[0] for name in load_file(states)} == changed


def test_each_domain_goes_to_its_expert_and_the_loss_falls(world, domains, routed, recipe, tmp_path):
    router, run = routed
    record = json.loads((run / "routing.json").read_text())
    assert record["experts"] == ["0", "1", "seed"] and record["step"] == 40
    assert len(record["routers"]) == (6 if router == "per_linear" else 2)
    assert record["routers"][:2] == (["0.gate", "0.up"] if router == "per_linear" else ["0", "1"])
    shares = {name: torch.tensor(share) for name, share in record["shares"].items()}
    assert set(shares) == {"a", "b"}
    for share in shares.values():
        assert torch.allclose(share.sum(-1), torch.ones(len(share)))
    assert shares["a"].mean(0)[0] > shares["b"].mean(0)[0] and shares["b"].mean(0)[1] > shares["a"].mean(0)[1]
    assert (run / "routing.png").read_bytes().startswith(b"\x89PNG")
    # against the routers that it began with, and the seed
    still = router_stage(recipe, world, domains, router, "untrained", steps=4)
    still["model"]["init_args"]["optimizer"]["init_args"]["lr"] = 1e-30
    assert fit(tmp_path, still) == 0
    trained, untrained, seed = (val_losses(r)["val_loss"] for r in (run, tmp_path / "untrained", world / "seed"))
    assert trained < untrained < seed


def test_branches_are_best_at_home(world):
    a, b, seed = (val_losses(world / name) for name in ("a", "b", "seed"))
    assert a["val_loss/a"] < seed["val_loss/a"] and b["val_loss/b"] < seed["val_loss/b"]


def test_stopped_and_resumed_is_the_uninterrupted_run(world, domains, routed, recipe, tmp_path):
    router, run = routed
    config = router_stage(recipe, world, domains, router)
    assert fit(tmp_path, config, "--trainer.max_steps", "23") == 0
    assert fit(tmp_path, config) == 0
    steps = [[r for r in trajectory(f) if "loss" in r] for f in (tmp_path / "router", run)]
    assert steps[0] == steps[1] and len(steps[0]) == 40
    assert saved_tensors(tmp_path / "router", 40) == saved_tensors(run, 40)


def test_gate_and_head_or_all(world, domains, recipe, tmp_path, capsys):
    """The three sets of the source document; a loss that balances is logged when asked for."""
    before = read_model(world / "merged_per_mlp").model.state_dict()
    for name, groups in (("head", ["gate", "lm_head"]), ("all", ["all"])):
        config = router_stage(recipe, world, domains, "per_mlp", name, steps=4, trainable=groups)
        config["model"]["init_args"]["config"]["lora"]["experts"] |= {"balance": "loss", "balance_coef": 0.1}
        assert fit(tmp_path, config) == 0
        after = read_model(tmp_path / name).model.state_dict()
        changed = {n for n in before if not torch.equal(before[n], after[n])}
        wanted = {n for n in before if n.endswith("router.weight")} | {"head.weight"}
        assert changed == (wanted if name == "head" else {n for n in before if not n.endswith("router.bias")})
        assert "aux_loss" in trajectory(tmp_path / name)[0]
        logged = (tmp_path / name / "log.txt").read_text()
        trained = 2 * 3 * 32 + 64 * 32
        assert (f"{trained:,} trained" in logged) == (name == "head")


def test_the_folder_of_a_merge_says_what_to_train_and_leaves_the_stage_to_the_recipe(world, domains, recipe, tmp_path):
    config = router_stage(recipe, world, domains, "per_mlp")
    config["model"]["init_args"]["config"] = {"vocab_size": 64, "dim": 8, "num_layers": 1, "num_heads": 1, "ffn_dim": 8}
    del config["model"]["init_args"]["init_from"]
    path = write_recipe(tmp_path, config)
    assert cli("check", path, "--config", world / "merged_per_mlp" / "model.yaml") == 0
    merged = read_recipe([path, world / "merged_per_mlp" / "model.yaml"]).data["model"]
    assert merged["class_path"] == "llmrecipes.modules.RouterModule"
    assert merged["init_args"]["config"]["lora"]["experts"]["num_experts"] == 2


def test_two_processes_that_share_the_model_resume_exactly(world, domains, recipe, tmp_path):
    """Sharded, stopped and resumed: the very run, and that of one process up to rounding."""
    config = router_stage(recipe, world, domains, "per_linear", steps=6)
    config["data"]["init_args"]["micro_batch"] = 4
    config["checkpoint"]["every"] = "3 steps"
    alone = tmp_path / "alone"
    alone.mkdir()
    assert fit(alone, config) == 0
    sharded = {"class_path": "llmrecipes.distributed.ShardedStrategy", "init_args": {"mode": "full_shard"}}
    config["trainer"] |= {"devices": 2, "strategy": sharded}
    path = write_recipe(tmp_path, config)
    for name, words in (("whole", [[]]), ("parts", [["--trainer.max_steps", "3"], []])):
        for more in words:
            assert run_ranks(2, cli, "fit", "--config", path, "--run_root", tmp_path / name, *more) == [0, 0]
    runs = [tmp_path / "whole" / "router", tmp_path / "parts" / "router", alone / "router"]
    records = [[r for r in trajectory(run) if "loss" in r] for run in runs]
    assert records[0] == records[1] and len(records[0]) == 6
    assert saved_tensors(runs[0], 6) == saved_tensors(runs[1], 6)
    states = [read_model(run).model.state_dict() for run in (*runs, world / "merged_per_linear")]
    for name, tensor in states[0].items():
        if name.endswith("router.weight"):
            assert (tensor - states[2][name]).abs().max() < 1e-4 and not torch.equal(tensor, states[3][name])
        else:
            assert torch.equal(tensor, states[3][name]), name


def test_a_trained_router_folds_and_is_exported(routed, tmp_path):
    router, run = routed
    assert cli("merge", "fold", run, tmp_path / "folded") == 0
    wanted = 0 if router == "per_mlp" else 2
    assert cli("convert", "to-hf", tmp_path / "folded", tmp_path / "hf", "--max_seq_len", "64") == wanted
    if router == "per_mlp":
        assert read_model(tmp_path / "hf").config.moe.num_experts == 3


def test_mistakes_of_the_recipe(world, domains, recipe, tmp_path, capsys):
    def problems(change):
        config = router_stage(recipe, world, domains, "per_linear")
        change(config["model"]["init_args"])
        assert cli("check", write_recipe(tmp_path, config)) == 2
        return capsys.readouterr().err

    assert "has neither moe nor lora.experts" in problems(lambda init: init["config"].pop("lora"))
    assert "gives the router no gradient" in problems(lambda init: init["config"]["lora"]["experts"].update(top_k=1))
    assert "without init_from" in problems(lambda init: init.pop("init_from"))
    assert "lora.experts differ from" in problems(
        lambda init: init["config"]["lora"]["experts"].update(null_expert=False)
    )
    assert "lora.rank 4 where" in problems(lambda init: init["config"]["lora"].update(rank=4))

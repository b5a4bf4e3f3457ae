"""The recipes for a cluster and for one RTX3090: each fits what its header says, and starts when it is made small."""

from __future__ import annotations

import json
import re
import sys
from pathlib import Path

import pytest
from helpers import REPOSITORY, cli, trajectory, write_recipe

from llmrecipes.plan.estimate import make_plan
from llmrecipes.plan.hardware import parse_gpus
from llmrecipes.plan.job import read_job
from llmrecipes.plan.sizes import model_sizes
from llmrecipes.recipe import read_recipe

sys.path.insert(0, str(Path(__file__).parents[1] / "data"))
sys.path.insert(0, str(Path(__file__).parents[1]))

from chat_tokenizers import byte_level
from test_recipes import TRAINING, command_of

SMALL = [path for path in TRAINING if path.parts[1] == "rtx3090"]
SOME_SMALL = [
    pytest.param(path, marks=[pytest.mark.release] * (path.stem in ("pretrain_dense", "lora_expert", "sft_lora")))
    for path in SMALL
]
CLUSTER = [path for path in TRAINING if len(path.parts) == 2]


@pytest.fixture(autouse=True)
def in_the_repository(monkeypatch):
    monkeypatch.chdir(REPOSITORY)


def plan_of(path: Path, card: str):
    job = read_job(*command_of(path))
    return make_plan(job, parse_gpus(f"{job.ranks}x{card}"), mfu=0.4)


def says_so(path: Path, device: float) -> bool:
    """Whether a recipe's header names the memory that is planned; False where it names none."""
    found = re.search(r"([\d.]+) GB (?:per GPU )?by plan", path.read_text(encoding="utf-8"))
    if found is not None:
        assert float(found[1]) == pytest.approx(device / 1e9, rel=0.05), f"{path}: {found[0]}, {device / 1e9:.2g}"
    return found is not None


def test_all_were_seen():
    assert {path.stem for path in SMALL} == {
        "pretrain_dense",
        "pretrain_moe",
        "lora_expert",
        "router_train",
        "sft_lora",
        "dpo_lora",
    }
    assert len(CLUSTER) == 25


@pytest.mark.parametrize("path", SOME_SMALL, ids=lambda path: path.stem)
def test_fits_a_card_of_24_gb(path):
    found = plan_of(path, "RTX3090")
    assert found.job.ranks == 1 and found.memory.device <= 24e9
    assert found.fits, f"{found.memory.device / 1e9:.1f} GB of {found.usable / 1e9:.1f} that training may fill"
    assert says_so(path, found.memory.device)
    schedule = read_recipe(*command_of(path)).data["model"]["init_args"]["schedule"]["init_args"]
    assert schedule["decay"] is None, "the rate falls over the whole run"


def test_evaluation_fits_a_card_of_24_gb():
    job = read_job([REPOSITORY / "recipes/rtx3090/sft_lora.yaml"])
    weights = 2 * model_sizes(job.config).total
    cache = 8 * 1024 * job.config.num_layers * 2 * job.config.kv_heads * job.config.head_width * 2
    assert weights / 1e9 == pytest.approx(7.7, abs=0.1) and cache / 1e9 == pytest.approx(2.8, abs=0.1)
    assert weights + cache < 12e9


def test_cluster_recipes_fit_cards_of_80_gb(stride):
    said = 0
    for path in CLUSTER[:: stride(12)]:
        found = plan_of(path, "H100-80G")
        assert found.fits, f"{path}: {found.memory.device / 2**30:.1f} GiB"
        said += says_so(path, found.memory.device)
    assert said >= (17 if stride(12) == 1 else 2)


# ---- started, small


@pytest.fixture(scope="module")
def place(tmp_path_factory, shards) -> Path:
    """Everything a small run reads: shards are elsewhere; conversations, pairs and their tokenizer are here."""
    folder = tmp_path_factory.mktemp("place")
    byte_level(folder / "tokenizer")
    lines = [{"question": f"{n} + 1 ?", "answer": "はい" * (1 + n % 4)} for n in range(40)]
    pairs = [{"prompt": x["question"], "chosen": x["answer"], "rejected": "いいえ"} for x in lines]
    (folder / "talks.jsonl").write_text("\n".join(map(json.dumps, lines)))
    (folder / "pairs.jsonl").write_text("\n".join(map(json.dumps, pairs)))
    return folder


def shrunken(path: Path, place: Path, shards: dict) -> dict:
    """The recipe with every size made small, for one process on a CPU; what it is stays."""
    recipe = read_recipe(*command_of(path)).data
    init, data, trainer = recipe["model"]["init_args"], recipe["data"]["init_args"], recipe["trainer"]
    kind = recipe["data"]["class_path"].rpartition(".")[2]
    config = init["config"]
    small = {"dim": 32, "num_heads": 4, "num_kv_heads": 2, "ffn_dim": 48, "max_seq_len": 64, "vocab_multiple": 8}
    config |= {key: value for key, value in small.items() if config.get(key) is not None}
    config |= {"num_layers": 2 * config.get("moe_every", 1), "vocab_size": 64}
    if config.get("moe"):
        config["moe"] |= {"ffn_dim": 16}
        if config["moe"].get("experts_per_layer"):
            config["moe"] |= {"experts_per_layer": [4, 8]}
    if config.get("lora"):
        config["lora"] |= {"rank": 4}
    for key in ("expected_params", "token_budget"):
        init.pop(key, None)
    init["schedule"]["init_args"] |= {"warmup": "1 steps", "decay": None}
    data |= {"micro_batch": 1, "global_batch": 2, "seq_len": 32, "valid_batches": 1, "split": "80,20"}
    if kind == "PackedShards":
        data |= {"train": {str(shards["a"]): 1.0}, "tokenizer": None, "split": "80,10,10"}
    else:
        file = "pairs" if kind == "PreferencePairs" else "talks"
        data |= {"train": {str(place / f"{file}.jsonl"): 1.0}, "tokenizer": str(place / "tokenizer"), "seq_len": 256}
        data |= {"cache": str(place / "cache")}
        config["vocab_size"] = 400
    trainer |= {"max_steps": 2, "accelerator": "cpu", "devices": 1, "num_nodes": 1, "val_check_interval": 2}
    if trainer.get("strategy"):
        trainer["strategy"]["init_args"] |= {"mode": "full_shard", "expert_parallel": 1}
    recipe["checkpoint"] = {"every": "2 steps", "keep_last": 1}
    recipe["logging"] = {"every": 1}
    recipe.pop("samples", None)
    return recipe | {"run_root": str(place / "runs")}


def base_of(recipe: dict, shards: dict) -> dict:
    """A model for the recipe to begin with; adapters are there where routers choose between them."""
    config = json.loads(json.dumps(recipe["model"]["init_args"]["config"]))
    if config.get("lora") and not config["lora"].get("experts"):
        config.pop("lora")
    config["vocab_size"] = 64 if config["vocab_size"] == 64 else 400
    keep = ("optimizer", "schedule")
    init = {key: recipe["model"]["init_args"][key] for key in keep} | {"config": config}
    data = {"train": {str(shards["a"]): 1.0}, "seq_len": 32, "micro_batch": 1, "global_batch": 1, "split": "80,10,10"}
    return recipe | {
        "name": f"base_{recipe['name']}",
        "model": {"class_path": "llmrecipes.modules.PretrainModule", "init_args": init},
        "data": {"class_path": "llmrecipes.data.PackedShards", "init_args": data},
        "trainer": {"max_steps": 2, "accelerator": "cpu"},
    }


def start(path: Path, place: Path, shards: dict) -> None:
    recipe = shrunken(path, place, shards)
    if "init_from" in recipe["model"]["init_args"]:
        base = base_of(recipe, shards)
        assert cli("fit", "--config", write_recipe(place, base, f"{base['name']}.yaml")) == 0, path
        recipe["model"]["init_args"]["init_from"] = str(place / "runs" / base["name"])
    assert cli("fit", "--config", write_recipe(place, recipe, f"{recipe['name']}.yaml")) == 0, path
    records = trajectory(place / "runs" / recipe["name"])
    assert records[-1]["step"] == 2 and any("val_loss" in record for record in records), path


@pytest.mark.parametrize("path", SOME_SMALL, ids=lambda path: path.stem)
def test_the_small_ones_start(path, place, shards):
    start(path, place, shards)


def test_the_large_ones_start_when_made_small(place, shards, stride):
    for path in CLUSTER[:: stride(12)]:
        start(path, place, shards)

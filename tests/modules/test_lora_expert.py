"""A LoRA branch through the command: frozen to the last bit, resumed exactly, saved alone, its base not exchanged."""

from __future__ import annotations

import shutil
from pathlib import Path

import pytest
import torch
from helpers import cli, saved_tensors, trajectory, write_recipe
from safetensors.torch import load_file, save_file

from llmrecipes.convert.folder import read_model

LORA = {"rank": 4, "alpha": 16, "dropout": 0.2, "targets": ".*"}


def fit(folder, config, *words):
    return cli("fit", "--config", write_recipe(folder, config, f"{config['name']}.yaml"), "--run_root", folder, *words)


def branch(recipe, base, name="lora", steps=8):
    """A LoRA branch of the base run; the fixture's dropout is on, and the adapters have their own."""
    config = recipe(steps=steps)
    config["name"] = name
    config["model"]["class_path"] = "llmrecipes.modules.LoraExpertModule"
    init = config["model"]["init_args"]
    init["config"] |= {"lora": dict(LORA)}
    init["init_from"] = str(base)
    init["schedule"]["init_args"]["decay"] = "8 steps"
    return config


@pytest.fixture(scope="module")
def base(tmp_path_factory, recipe) -> Path:
    """A run of four steps, to be adapted. Read only."""
    folder = tmp_path_factory.mktemp("base")
    assert fit(folder, recipe(steps=4)) == 0
    return folder / "dense"


@pytest.fixture(scope="module")
def whole(tmp_path_factory, recipe, base) -> Path:
    """Eight steps of adapters in one go. Read only."""
    folder = tmp_path_factory.mktemp("whole")
    assert fit(folder, branch(recipe, base)) == 0
    return folder / "lora"


def adapter_names(names):
    return {name for name in names if ".lora." in name}


def test_only_adapters_move_and_only_they_are_saved(base, whole, capsys):
    before, after = (read_model(run).model.state_dict() for run in (base, whole))
    assert all(torch.equal(after[name], before[name]) for name in before)
    added = adapter_names(after)
    assert after.keys() - before.keys() == added and len(added) == 2 * 7 * 2
    assert all(after[name].any() for name in added)
    recorded = [r for r in trajectory(whole) if "val_loss" in r][-1]
    capsys.readouterr()
    assert cli("validate", "--config", whole / "recipe.yaml", "--run_root", whole.parent) == 0
    assert f"val_loss {recorded['val_loss']:.4f}" in capsys.readouterr().out.replace("  ", " ")
    (step,) = (whole / "checkpoints").glob("step=000008")
    (saved,) = (step / "model").glob("*.safetensors")
    assert load_file(saved).keys() == added
    (states,) = (step / "optimizer").glob("*.safetensors")
    assert adapter_names(load_file(states)) == set(load_file(states)) and len(load_file(states)) == 3 * len(added)


def test_the_first_loss_is_that_of_the_base(base, recipe, tmp_path):
    """B = 0: dropout off, the same data and the same first figures as going on with the base itself."""
    config = branch(recipe, base, steps=3)
    config["model"]["init_args"]["config"]["dropout"] = 0.0
    plain = branch(recipe, base, "plain", steps=3)
    plain["model"]["class_path"] = "llmrecipes.modules.PretrainModule"
    plain["model"]["init_args"]["config"] |= {"lora": None, "dropout": 0.0}
    for one in (config, plain):
        shards = list(one["data"]["init_args"]["train"])
        one["data"]["init_args"] |= {"train": {shards[0]: 1.0}, "valid_from": shards}
        one["checkpoint"] |= {"validate_first": True, "every": "2 steps"}
    assert fit(tmp_path, config) == fit(tmp_path, plain) == 0
    first, other = (next(r for r in trajectory(tmp_path / name) if "loss" in r) for name in ("lora", "plain"))
    assert first["loss"] == other["loss"] and first["batch"] == other["batch"]
    assert first["grad_norm"] != other["grad_norm"]
    before, beneath = (trajectory(tmp_path / name)[0] for name in ("lora", "plain"))
    assert before == beneath and before["step"] == 0, "what the run begins with, before anything moved"
    assert before.keys() == {"step", "val_loss", "val_loss/a", "val_loss/b"}, "also where nothing is trained"
    saved = sorted(path.name for path in (tmp_path / "lora" / "checkpoints").glob("step=*"))
    assert saved == ["step=000002", "step=000003"], "none of step 0"
    assert fit(tmp_path, config, "--trainer.max_steps", "4") == 0
    assert [r["step"] for r in trajectory(tmp_path / "lora") if "val_loss" in r] == [0, 3, 4]


def test_stopped_and_resumed_is_the_uninterrupted_run(base, whole, recipe, tmp_path):
    config = branch(recipe, base)
    assert fit(tmp_path, config, "--trainer.max_steps", "5") == 0
    assert fit(tmp_path, config) == 0
    steps = [[r for r in trajectory(run) if "loss" in r] for run in (tmp_path / "lora", whole)]
    assert steps[0] == steps[1] and len(steps[0]) == 8
    assert saved_tensors(tmp_path / "lora", 8) == saved_tensors(whole, 8)


def test_a_base_that_changed_is_refused(base, recipe, tmp_path, capsys):
    mine = tmp_path / "base"
    mine.mkdir()
    assert cli("convert", "consolidate", base, mine / "model") == 0
    config = branch(recipe, mine / "model")
    assert fit(tmp_path, config, "--trainer.max_steps", "5") == 0
    file = mine / "model" / "model.safetensors"
    state = load_file(file)
    state["norm.weight"][0] += 1
    save_file(state, file)
    capsys.readouterr()
    assert fit(tmp_path, config) == 2
    assert "base.sha256" in capsys.readouterr().err
    assert cli("convert", "consolidate", tmp_path / "lora", tmp_path / "out") == 2
    assert "which have changed since" in capsys.readouterr().err
    shutil.rmtree(mine)
    assert cli("convert", "to-peft", tmp_path / "lora", tmp_path / "out") == 2
    assert "holds what was trained only" in capsys.readouterr().err


def test_an_adapter_over_an_adapted_model_reads_through_all_of_them(whole, recipe, tmp_path):
    """A chain: base, adapters, and the same adapters trained further by a second run."""
    config = branch(recipe, whole, "further", steps=3)
    assert fit(tmp_path, config) == 0
    first, second = (read_model(run).model.state_dict() for run in (whole, tmp_path / "further"))
    assert first.keys() == second.keys()
    changed = {name for name in first if not torch.equal(first[name], second[name])}
    assert changed == adapter_names(first)
    assert cli("convert", "consolidate", tmp_path / "further", tmp_path / "one") == 0
    one = read_model(tmp_path / "one").model.state_dict()
    assert all(torch.equal(one[name], second[name]) for name in second)
    assert cli("convert", "to-peft", tmp_path / "further", tmp_path / "peft") == 0
    assert len(load_file(tmp_path / "peft" / "adapter_model.safetensors")) == 28


def test_mistakes_of_the_recipe(base, recipe, tmp_path, capsys):
    def problems(change):
        config = branch(recipe, base)
        change(config["model"]["init_args"])
        assert cli("check", write_recipe(tmp_path, config)) == 2
        return capsys.readouterr().err

    assert "has no lora" in problems(lambda init: init["config"].pop("lora"))
    assert "without init_from" in problems(lambda init: init.pop("init_from"))
    assert "is 1 steps of 128 tokens" in problems(lambda init: init.update(token_budget="100 tokens"))
    assert "matches no linear map" in problems(lambda init: init["config"]["lora"].update(targets="nothing"))
    assert "lora.rank 0 is less than 1" in problems(lambda init: init["config"]["lora"].update(rank=0))
    assert "did you mean 'dropout'" in problems(lambda init: init["config"]["lora"].update(droput=0.1))
    config = branch(recipe, base)
    config["model"]["init_args"]["token_budget"] = "1000 tokens"
    assert cli("check", write_recipe(tmp_path, config)) == 0
    config["model"]["init_args"]["trainable"] = ["loar"]
    assert fit(tmp_path, config) == 2
    assert "'loar' is no parameter of this model" in capsys.readouterr().err

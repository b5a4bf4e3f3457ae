"""The Trainer's loggers get what ``metrics.jsonl`` gets."""

from __future__ import annotations

import csv
import json
import os
import socket

import pytest
from helpers import cli, trajectory, write_recipe

from llmrecipes.callbacks.logging import flatten
from llmrecipes.run.wandb_run import give_run_id, why_offline


def fit_with(folder, recipe, logger, **arguments):
    recipe["trainer"]["logger"] = {"class_path": f"lightning.pytorch.loggers.{logger}", "init_args": arguments}
    path = write_recipe(folder, recipe)
    assert cli("fit", "--config", path, "--run_root", folder / "runs") == 0
    return trajectory(folder / "runs" / recipe["name"])


def test_csv(tmp_path, recipe):
    records = fit_with(tmp_path, recipe(moe=True, steps=4), "CSVLogger", save_dir=str(tmp_path / "csv"))
    (path,) = (tmp_path / "csv").rglob("metrics.csv")
    with path.open(encoding="utf-8") as file:
        rows = [{k: float(v) for k, v in row.items() if v} for row in csv.DictReader(file)]
    assert len(rows) == len(records) == 5  # four steps and a validation
    for row, record in zip(rows, records, strict=True):
        expected = flatten(record)
        assert {k: row[k] for k in expected} == expected
    assert "expert_load/1/3" in rows[0]


@pytest.fixture
def no_account(tmp_path, monkeypatch):
    for key in [key for key in os.environ if key.startswith("WANDB_")]:
        monkeypatch.delenv(key)
    monkeypatch.setenv("NETRC", str(tmp_path / "no_netrc"))
    monkeypatch.setenv("WANDB_SILENT", "true")
    monkeypatch.setenv("WANDB_CONSOLE", "off")


def test_wandb_is_offline_unless_it_can_be_online(no_account, tmp_path, monkeypatch):
    """Without a key or a network a run goes on, and says why once."""
    assert "no key" in why_offline({})
    assert why_offline({"offline": True}) is None  # the user said so: nothing to say
    with socket.socket() as server:
        server.bind(("127.0.0.1", 0))
        monkeypatch.setenv("WANDB_BASE_URL", f"http://127.0.0.1:{server.getsockname()[1]}")
        monkeypatch.setenv("WANDB_API_KEY", "0" * 40)
        assert "does not answer" in why_offline({})  # nobody listens
        server.listen()
        assert why_offline({}) is None
        monkeypatch.delenv("WANDB_API_KEY")
        (tmp_path / "no_netrc").write_text("machine 127.0.0.1 login user password 123\n")
        assert why_offline({}) is None
    monkeypatch.setenv("WANDB_MODE", "disabled")
    assert why_offline({}) is None
    trainer = {"logger": {"class_path": "lightning.pytorch.loggers.WandbLogger"}}
    monkeypatch.delenv("WANDB_MODE")
    give_run_id(trainer, tmp_path, fresh=False)
    assert trainer["logger"]["init_args"]["offline"] is True


@pytest.mark.slow
def test_wandb_offline(tmp_path, with_words, monkeypatch, no_account):
    """No account, no network: the records, tables and pictures are in files that ``wandb sync`` takes later."""
    wandb = pytest.importorskip("wandb")
    monkeypatch.chdir(tmp_path)
    recipe = with_words(moe=True, steps=4)
    recipe["samples"] = {"every": 2, "prompts": ["w5 w6"]}
    try:
        records = fit_with(tmp_path, recipe, "WandbLogger", project="test", save_dir=str(tmp_path))
    finally:
        wandb.finish()
        wandb.teardown()
    (path,) = tmp_path.glob("wandb/offline-run-*/run-*.wandb")
    content = path.read_bytes()
    seen = 0
    for record in records:
        for name, value in flatten(record).items():
            assert name.encode() in content
            assert repr(value).encode() in content, (name, value)
            seen += 1
    assert seen > 4 * 15
    media = {
        path.relative_to(path.parents[1]).parts[0] for path in tmp_path.glob("wandb/offline-run-*/files/media/*/*")
    }
    assert media == {"table", "images"}  # the samples; the loss curve
    tables = sorted(tmp_path.glob("wandb/offline-run-*/files/media/table/samples_*.json"))
    assert len(tables) == 2  # after steps 2 and 4
    assert all(json.loads(table.read_text())["columns"] == ["prompt", "text"] for table in tables)


@pytest.mark.slow
def test_a_resumed_run_is_one_wandb_run(tmp_path, recipe, monkeypatch):
    wandb = pytest.importorskip("wandb")
    monkeypatch.setenv("WANDB_MODE", "offline")
    monkeypatch.setenv("WANDB_SILENT", "true")
    monkeypatch.setenv("WANDB_CONSOLE", "off")
    monkeypatch.chdir(tmp_path)
    recipe = recipe(steps=6)
    recipe["model"]["init_args"]["schedule"]["init_args"]["decay"] = "6 steps"
    arguments = {"project": "test", "save_dir": str(tmp_path), "offline": True}
    identities = []
    for steps in (3, 6):
        recipe["trainer"]["max_steps"] = steps
        try:
            fit_with(tmp_path, recipe, "WandbLogger", **arguments)
        finally:
            wandb.finish()
            wandb.teardown()
        identities.append((tmp_path / "runs" / "dense" / "wandb_id").read_text().strip())
    assert identities[0] == identities[1]
    runs = {path.name.removeprefix("run-").removesuffix(".wandb") for path in tmp_path.glob("wandb/*/run-*.wandb")}
    assert runs == {identities[0]}
    assert "wandb_id" not in (tmp_path / "runs" / "dense" / "recipe.yaml").read_text()

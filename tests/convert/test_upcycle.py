"""Dense to mixture: equal logits where the formula says so, experts that differ as asked, and training that goes on."""

from __future__ import annotations

import pytest
import torch
from helpers import cli, trajectory, write_recipe
from ranks import run_ranks
from safetensors.torch import load_file, save_file

from llmrecipes.convert import config_to_hf, to_hf_state_dict
from llmrecipes.convert.commands import main
from llmrecipes.convert.folder import read_model
from llmrecipes.errors import UserError
from llmrecipes.models import Decoder, ModelConfig, init_weights

SIZES = {"vocab_size": 64, "dim": 32, "num_layers": 2, "num_heads": 4, "num_kv_heads": 2, "max_seq_len": 64}


def dense_folder(path, **options):
    """A Hugging Face folder with weights large enough that a difference shows."""
    import json

    config = ModelConfig(**(SIZES | {"ffn_dim": 40, "init_std": 0.2} | options))
    decoder = Decoder(config)
    init_weights(decoder, 3)
    path.mkdir()
    (path / "config.json").write_text(json.dumps(config_to_hf(config)))
    save_file(to_hf_state_dict(config, decoder.state_dict()), path / "model.safetensors")
    return path


def logits(folder, dtype=torch.float64):
    model = read_model(folder, dtype).model
    tokens = torch.randint(0, 64, (2, 40), generator=torch.Generator().manual_seed(0))
    with torch.no_grad():
        return model.logits(model(tokens).hidden)


def upcycle(src, dst, **options):
    words = [word for key, value in options.items() for word in (f"--{key}", str(value))]
    assert main(["upcycle", str(src), str(dst), *words]) == 0
    return read_model(dst)


EXACT = [
    {"experts": 4, "top_k": 2},
    {"experts": 8, "top_k": 3, "router": "zero"},
    {"experts": 3, "top_k": 3, "seed": 5},
    {"experts": 4, "top_k": 1, "renormalize": "false", "router": "zero"},
    {"experts": 6, "top_k": 4, "renormalize": "false", "router": "zero"},
]


@pytest.mark.parametrize("options", EXACT, ids=str)
@pytest.mark.parametrize("dense", [{}, {"qkv_bias": True}, {"qk_norm": True, "tie_embeddings": True}], ids=str)
def test_logits_equal_the_dense_models(tmp_path, dense, options, capsys):
    source = dense_folder(tmp_path / "hf", **dense)
    made = upcycle(source, tmp_path / "moe", **options)
    assert "logits equal the dense model's to" in capsys.readouterr().out
    assert made.config.moe.num_experts == options["experts"]
    # 6 / 4 times a weight is rounded where the weight is stored
    bounds = {torch.float32: 1e-6, torch.float64: 1e-6 if options["experts"] == 6 else 1e-12}
    for dtype, bound in bounds.items():
        expected = logits(source, dtype)
        assert (logits(tmp_path / "moe", dtype) - expected).abs().max() < bound * max(1.0, expected.abs().max().item())


def test_mutants_where_the_formula_does_not_hold(tmp_path, capsys):
    source = dense_folder(tmp_path / "hf")
    cases = [
        {"renormalize": "false"},  # a router with opinions, and weights that do not sum to one
        {"noise": 0.1},
        {"drop": 0.5},
    ]
    for n, options in enumerate(cases):
        upcycle(source, tmp_path / f"moe{n}", experts=4, **options)
        assert "logits differ from the dense model's by" in capsys.readouterr().out
        assert (logits(tmp_path / f"moe{n}") - logits(source)).abs().max() > 1e-3


def test_drop_upcycling_draws_anew_what_it_says_and_nothing_else(tmp_path):
    """2502.19261: the same units in gate, up and down; mean and spread of what they replace; others bit-equal."""
    source = dense_folder(tmp_path / "hf", dim=128, ffn_dim=400, num_layers=1)
    dense = read_model(source).model.state_dict()
    moe = upcycle(source, tmp_path / "moe", experts=4, drop=0.25, seed=7).model.state_dict()
    up, down = moe["layers.0.mlp.experts.gate_up_proj"], moe["layers.0.mlp.experts.down_proj"]
    base_up, base_down = dense["layers.0.mlp.gate_up.weight"], dense["layers.0.mlp.down.weight"]
    drawn = set()
    for e in range(4):
        gate_changed, up_changed = (up[e] != base_up).any(1).split(400)
        down_changed = (down[e] != base_down).any(0)
        assert torch.equal(gate_changed, up_changed) and torch.equal(gate_changed, down_changed)
        assert gate_changed.sum() == 100
        for new, old in ((up[e][:400], base_up[:400]), (up[e][400:], base_up[400:]), (down[e].t(), base_down.t())):
            assert abs(new[gate_changed].std() / old[gate_changed].std() - 1) < 0.03
            assert abs(new[gate_changed].mean() - old[gate_changed].mean()) < 0.01
        drawn.add(tuple(gate_changed.tolist()))
    assert len(drawn) == 4
    again = upcycle(source, tmp_path / "again", experts=4, drop=0.25, seed=7).model.state_dict()
    assert all(torch.equal(again[name], tensor) for name, tensor in moe.items())
    whole = upcycle(source, tmp_path / "none", experts=4, drop=0.0).model.state_dict()
    assert all(torch.equal(e, base_down) for e in whole["layers.0.mlp.experts.down_proj"])


def test_noise_is_as_large_as_asked(tmp_path):
    source = dense_folder(tmp_path / "hf", dim=128, ffn_dim=400, num_layers=1)
    base = read_model(source).model.state_dict()["layers.0.mlp.down.weight"]
    noisy = upcycle(source, tmp_path / "moe", noise=0.1).model.state_dict()["layers.0.mlp.experts.down_proj"]
    assert noisy.shape[0] == 8
    for expert in noisy:
        assert abs((expert - base).std() / base.std() - 0.1) < 0.003
    assert not torch.equal(noisy[0], noisy[1])


def test_mistakes_are_told(tmp_path):
    source = dense_folder(tmp_path / "hf")
    for words, problem in (
        (["--top_k", "1"], "gives the router no gradient"),
        (["--top_k", "9"], "--top_k 9: must be between 1 and --experts 8"),
        (["--experts", "1", "--top_k", "1", "--renormalize", "false"], "--experts 1"),
        (["--drop", "1.5"], "--drop 1.5"),
        (["--noise", "-1"], "--noise -1"),
    ):
        with pytest.raises(UserError, match=problem):
            main(["upcycle", str(source), str(tmp_path / "out"), *words])
    upcycle(source, tmp_path / "moe")
    with pytest.raises(UserError, match="8 experts already; it must be dense"):
        main(["upcycle", str(tmp_path / "moe"), str(tmp_path / "out")])
    biased = dense_folder(tmp_path / "biased", qkv_bias=True, bias=True)
    with pytest.raises(UserError, match="biases"):
        main(["upcycle", str(biased), str(tmp_path / "out")])
    assert not (tmp_path / "out").exists()


@pytest.fixture
def start_from(tmp_path, recipe):
    """Trains some steps from a folder, by the command that converting prints; returns the run folder."""

    def run(folder, steps=4, *more):
        path = write_recipe(tmp_path, recipe(steps=steps))
        words = ["fit", "--config", path, "--config", folder / "model.yaml", "--run_root", tmp_path, *more]
        assert cli(*words) == 0
        return tmp_path / "dense"

    return run


@pytest.mark.slow
def test_a_run_goes_on_from_an_upcycled_model_and_is_exported(tmp_path, start_from, recipe):
    source = dense_folder(tmp_path / "hf")
    upcycle(source, tmp_path / "moe", experts=4)
    run = start_from(tmp_path / "moe", 4, "--model.optimizer.lr", "0.01")
    records = [r for r in trajectory(run) if "loss" in r]
    assert "aux_loss" in records[0]
    assert abs(records[0]["loss"] - first_loss(source, tmp_path, recipe)) < 1e-3
    trained = read_model(run)
    assert trained.config.moe.num_experts == 4
    before = load_file(tmp_path / "moe" / "model.safetensors")
    after = trained.model.state_dict()
    assert not torch.equal(after["layers.0.mlp.gate.weight"], before["layers.0.mlp.gate.weight"])
    assert main(["to-hf", str(run), str(tmp_path / "mixtral")]) == 0
    import transformers

    loaded, report = transformers.AutoModelForCausalLM.from_pretrained(
        tmp_path / "mixtral", output_loading_info=True, dtype=torch.float32
    )
    assert loaded.config.model_type == "mixtral"
    assert not any(report[kind] for kind in ("missing_keys", "unexpected_keys", "mismatched_keys"))
    assert (logits(tmp_path / "mixtral") - logits(run)).abs().max() < 1e-9


def first_loss(source, tmp_path, recipe):
    """Of a run that begins with the dense model itself."""
    assert main(["from-hf", str(source), str(tmp_path / "dense_model")]) == 0
    path = write_recipe(tmp_path, recipe(steps=4), "dense.yaml")
    words = ["--config", tmp_path / "dense_model" / "model.yaml", "--run_root", tmp_path / "other"]
    assert cli("fit", "--config", path, *words) == 0
    return next(r["loss"] for r in trajectory(tmp_path / "other" / "dense") if "loss" in r)


def test_a_run_may_begin_with_another_run_and_a_wrong_folder_is_named(tmp_path, start_from, recipe, capsys):
    assert main(["from-hf", str(dense_folder(tmp_path / "hf")), str(tmp_path / "ours")]) == 0
    run = start_from(tmp_path / "ours", 3)
    weights = read_model(run).model.state_dict()
    other = recipe(steps=3)
    other["name"] = "second"
    init = other["model"]["init_args"]
    init["config"] = SIZES | {"ffn_dim": 40, "init_std": 0.2}
    init["init_from"] = str(run)
    init["optimizer"]["init_args"]["lr"] = 1e-30
    path = write_recipe(tmp_path, other, "second.yaml")
    assert cli("fit", "--config", path, "--run_root", tmp_path) == 0
    again = read_model(tmp_path / "second").model.state_dict()
    assert all(torch.equal(again[name], tensor) for name, tensor in weights.items())
    init["init_from"] = str(tmp_path / "ours")
    init["config"] |= {"ffn_dim": 44}
    capsys.readouterr()
    assert cli("fit", "--config", write_recipe(tmp_path, other, "third.yaml"), "--run_root", tmp_path) == 2
    assert "ffn_dim 44 where" in capsys.readouterr().err
    init["init_from"] = str(tmp_path / "hf")
    assert cli("check", write_recipe(tmp_path, other, "third.yaml")) == 2
    assert "is a Hugging Face folder - llmrecipes convert from-hf" in capsys.readouterr().err


@pytest.mark.slow
def test_two_processes_begin_with_their_slices_of_the_same_weights(tmp_path, recipe):
    """One process and two that share the parameters: the same run, from the same folder."""
    assert main(["from-hf", str(dense_folder(tmp_path / "hf")), str(tmp_path / "ours"), "--vocab_multiple", "128"]) == 0
    records = []
    for ranks in (1, 2):
        plain = recipe(steps=3)
        plain["name"] = f"on{ranks}"
        plain["trainer"] |= {
            "devices": ranks,
            "strategy": {"class_path": "llmrecipes.distributed.ShardedStrategy", "init_args": {"mode": "full_shard"}},
        }
        path = write_recipe(tmp_path, plain, f"on{ranks}.yaml")
        words = ["fit", "--config", path, "--config", tmp_path / "ours" / "model.yaml", "--run_root", tmp_path]
        assert run_ranks(ranks, cli, *words) == [0] * ranks
        records.append([r["loss"] for r in trajectory(tmp_path / f"on{ranks}") if "loss" in r])
    assert len(records[0]) == 3
    assert records[0] == pytest.approx(records[1], rel=1e-6)
    consolidated = tmp_path / "whole"
    assert main(["consolidate", str(tmp_path / "on2"), str(consolidated)]) == 0
    assert (logits(consolidated) - logits(tmp_path / "on2")).abs().max() == 0
    assert main(["to-hf", str(consolidated), str(tmp_path / "out")]) == 0
    assert load_file(tmp_path / "out" / "model.safetensors")["lm_head.weight"].shape == (64, 32)

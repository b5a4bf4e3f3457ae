"""Branches into one model: held to one expert it is that branch, equal experts are the dense model, folds are exact."""

from __future__ import annotations

import itertools
import shutil

import pytest
import torch
from branches import gap, logits, lora_branch, seed_model, whole_branch, write
from helpers import cli
from peft_peer import base_model
from safetensors.torch import load_file, save_file

from llmrecipes.convert.folder import read_model
from llmrecipes.models import Decoder
from llmrecipes.models.moe import Router


@pytest.fixture(scope="module")
def seed(tmp_path_factory):
    return seed_model(tmp_path_factory.mktemp("seed") / "model")


@pytest.fixture(scope="module")
def branches(tmp_path_factory, seed):
    """Three LoRA branches of the seed."""
    folder = tmp_path_factory.mktemp("branches")
    return [lora_branch(folder / str(i), seed, i + 1) for i in range(3)]


@pytest.fixture(scope="module")
def wholes(tmp_path_factory, seed):
    """Three branches of the seed, trained as a whole."""
    folder = tmp_path_factory.mktemp("wholes")
    return [whole_branch(folder / str(i), seed, i + 1) for i in range(3)]


def sharpen(folder, target, std=1.0):
    """The same with routers that have opinions."""
    loaded = read_model(folder)
    generator = torch.Generator().manual_seed(8)
    with torch.no_grad():
        for module in loaded.model.modules():
            if isinstance(module, Router):
                module.weight.copy_(torch.randn(module.weight.shape, generator=generator) * std)
    return write(target, loaded.model)


@pytest.mark.parametrize(("router", "null"), list(itertools.product(("per_linear", "per_mlp"), (True, False))))
def test_held_to_one_expert_it_is_that_branch(seed, branches, router, null, tmp_path, capsys):
    words = ["--experts", *branches, "--router", router, "--null_expert", str(null).lower()]
    assert cli("merge", "lora", seed, tmp_path / "moe", *words) == 0
    assert f"({3 + null} compared)" in capsys.readouterr().out
    config = read_model(tmp_path / "moe").config
    assert (config.lora.experts.num_experts, config.lora.experts.router) == (3, router)
    everyone = [*branches, seed] if null else branches
    for expert, folder in enumerate(everyone):
        assert gap(logits(tmp_path / "moe", expert=expert), logits(folder)) < 1e-12
    assert min(gap(logits(a), logits(b)) for a, b in itertools.combinations(everyone, 2)) > 1e-2  # mutant: another
    routers = [t for n, t in read_model(tmp_path / "moe").model.state_dict().items() if n.endswith("router.weight")]
    assert len(routers) == (6 if router == "per_linear" else 2)
    assert all(0.01 < t.std() < 0.03 for t in routers)


def test_equal_branches_are_the_branch_for_any_router(seed, branches, tmp_path):
    for n, router in enumerate(("per_linear", "per_mlp")):
        words = ["--experts", *[branches[0]] * 3, "--router", router, "--null_expert", "false"]
        assert cli("merge", "lora", seed, tmp_path / f"{n}", *words) == 0
        sharp = sharpen(tmp_path / f"{n}", tmp_path / f"{n}sharp")
        assert gap(logits(sharp, torch.float32), logits(branches[0], torch.float32)) < 1e-6
        words = ["--experts", *branches, "--router", router, "--null_expert", "false"]
        assert cli("merge", "lora", seed, tmp_path / f"{n}other", *words) == 0
        assert gap(logits(tmp_path / f"{n}other"), logits(branches[0])) > 1e-2


def test_ranks_and_scales_may_differ(seed, branches, tmp_path):
    mixed = [
        branches[0],
        lora_branch(tmp_path / "a", seed, 5, rank=7, alpha=3),
        lora_branch(tmp_path / "b", seed, 6, rank=2, alpha=9, rank_stabilized=True),
    ]
    assert cli("merge", "lora", seed, tmp_path / "moe", "--experts", *mixed) == 0
    assert read_model(tmp_path / "moe").config.lora.rank == 7
    for expert, folder in enumerate([*mixed, seed]):
        assert gap(logits(tmp_path / "moe", expert=expert), logits(folder)) < 1e-6  # a ratio is rounded into B


def test_adapters_of_peft_and_of_attention(branches, tmp_path):
    base_model().save_pretrained(tmp_path / "hf")
    made = [lora_branch(tmp_path / f"{n}", tmp_path / "hf", n, targets=".*") for n in (1, 2)]
    for n, folder in enumerate(made):
        assert cli("convert", "to-peft", folder, tmp_path / f"peft{n}") == 0
    assert cli("merge", "lora", tmp_path / "hf", tmp_path / "moe", "--experts", tmp_path / "peft0", made[1]) == 0
    for expert, folder in enumerate([*made, tmp_path / "hf"]):
        assert gap(logits(tmp_path / "moe", expert=expert), logits(folder)) < 1e-12
    routers = sum(isinstance(m, Router) for m in read_model(tmp_path / "moe").model.modules())
    assert routers == 14


@pytest.mark.parametrize("router", ["per_linear", "per_mlp"])
@pytest.mark.parametrize("targets", [r".*\.(gate|up|down)_proj", r".*\.1\.mlp\.(up|down)_proj"])
def test_folding_changes_nothing_but_the_form(seed, router, targets, tmp_path):
    made = [lora_branch(tmp_path / f"{n}", seed, n, targets=targets) for n in (1, 2, 3)]
    assert cli("merge", "lora", seed, tmp_path / "moe", "--experts", *made, "--router", router) == 0
    sharp = sharpen(tmp_path / "moe", tmp_path / "sharp")
    assert cli("merge", "fold", sharp, tmp_path / "folded") == 0
    folded = read_model(tmp_path / "folded").config
    assert folded.lora is None and folded.moe.num_experts == 4 and folded.moe.router == router
    assert folded.dense_layers == ([0] if "1" in targets else None)
    # weights are rounded to fp32 where they are stored
    assert gap(logits(tmp_path / "folded"), logits(sharp)) < 1e-5
    assert gap(logits(tmp_path / "folded"), logits(tmp_path / "moe")) > 1e-3  # mutant: other routers


def test_one_adapter_folds_into_a_dense_model_that_is_exported(seed, branches, tmp_path):
    assert cli("merge", "fold", branches[0], tmp_path / "dense") == 0
    assert gap(logits(tmp_path / "dense"), logits(branches[0])) < 1e-6
    assert gap(logits(seed), logits(branches[0])) > 1e-2
    assert cli("convert", "to-hf", tmp_path / "dense", tmp_path / "hf") == 0
    assert gap(logits(tmp_path / "hf"), logits(branches[0])) < 1e-6


def test_a_router_per_network_is_exported_as_a_mixtral(seed, branches, tmp_path, capsys):
    import transformers

    words = ["--experts", *branches, "--router", "per_mlp"]
    assert cli("merge", "lora", seed, tmp_path / "moe", *words) == 0
    assert cli("convert", "to-hf", tmp_path / "moe", tmp_path / "hf") == 2
    assert "llmrecipes merge fold" in capsys.readouterr().err
    sharp = sharpen(tmp_path / "moe", tmp_path / "sharp")
    assert cli("merge", "fold", sharp, tmp_path / "folded") == 0
    assert cli("convert", "to-hf", tmp_path / "folded", tmp_path / "hf") == 0
    loaded, report = transformers.AutoModelForCausalLM.from_pretrained(
        tmp_path / "hf", output_loading_info=True, dtype=torch.float32
    )
    assert loaded.config.model_type == "mixtral" and loaded.config.num_local_experts == 4
    assert not any(report[kind] for kind in ("missing_keys", "unexpected_keys", "mismatched_keys"))
    assert gap(logits(tmp_path / "hf"), logits(sharp)) < 1e-5


@pytest.mark.parametrize("others", ["average", "seed"])
@pytest.mark.parametrize("router", ["per_mlp", "per_linear"])
def test_whole_networks_side_by_side(seed, wholes, others, router, tmp_path):
    words = ["--experts", *wholes, "--router", router, "--others", others, "--seed_expert", "true"]
    assert cli("merge", "btx", seed, tmp_path / "moe", *words) == 0
    merged = read_model(tmp_path / "moe")
    assert merged.config.moe.num_experts == 4 and merged.config.moe.router == router
    state, originals = merged.model.state_dict(), [read_model(f).model.state_dict() for f in (*wholes, seed)]
    for name in originals[0]:
        if ".mlp." in name:
            continue
        mean = torch.stack([s[name].double() for s in originals]).mean(0).float()
        assert torch.equal(state[name], mean if others == "average" else originals[3][name]), name
    # B2: where branches differ in their networks only, the mixture held to one is that branch
    for expert, folder in enumerate((*wholes, seed)):
        loaded = read_model(folder)
        around = {n: t for n, t in state.items() if ".mlp." not in n}
        loaded.model.load_state_dict(loaded.model.state_dict() | around)
        own = write(tmp_path / f"own{expert}", loaded.model)
        assert gap(logits(tmp_path / "moe", expert=expert), logits(own)) < 1e-12
        assert gap(logits(tmp_path / "moe", expert=(expert + 1) % 4), logits(own)) > 1e-3
    if router == "per_mlp":
        assert cli("convert", "to-hf", tmp_path / "moe", tmp_path / "hf") == 0
        assert gap(logits(tmp_path / "hf"), logits(tmp_path / "moe")) < 1e-12
    else:
        assert cli("convert", "to-hf", tmp_path / "moe", tmp_path / "hf") == 2


def test_equal_networks_are_the_dense_model(seed, wholes, tmp_path):
    """B1: for any router, per network and per linear map."""
    for n, router in enumerate(("per_mlp", "per_linear")):
        assert cli("merge", "btx", seed, tmp_path / f"{n}", "--experts", *[wholes[0]] * 3, "--router", router) == 0
        sharp = sharpen(tmp_path / f"{n}", tmp_path / f"{n}sharp")
        assert gap(logits(sharp, torch.float32), logits(wholes[0], torch.float32)) < 1e-6


def test_lora_branches_are_averaged_as_products(seed, tmp_path):
    """B3: with adapters on attention the average of B A is meant, not that of B and A."""
    made = [lora_branch(tmp_path / f"{n}", seed, n, targets=".*") for n in (1, 2)]
    assert cli("merge", "btx", seed, tmp_path / "moe", "--experts", *made) == 0
    state = read_model(tmp_path / "moe").model.state_dict()
    base = read_model(seed).model.state_dict()["layers.0.attention.out.weight"]
    pairs = [[read_model(f).model.state_dict()[f"layers.0.attention.out.lora.o.{x}"] for x in "ba"] for f in made]
    right = base + 2.0 * torch.stack([b @ a for b, a in pairs]).mean(0)
    wrong = base + 2.0 * torch.stack([b for b, _ in pairs]).mean(0) @ torch.stack([a for _, a in pairs]).mean(0)
    found = state["layers.0.attention.out.weight"]
    assert (found - right).abs().max() < 1e-6
    assert (found - wrong).abs().max() > 0.05


def test_a_merged_model_generates_and_is_consolidated_like_any_other(seed, branches, tmp_path):
    assert cli("merge", "lora", seed, tmp_path / "moe", "--experts", *branches) == 0
    from llmrecipes.models import generate

    model = read_model(tmp_path / "moe").model
    written = generate(model, [5, 6, 7], 8, temperature=0.0)
    assert len(written) == 8
    ids = torch.tensor([[5, 6, 7]])
    for _ in range(8):  # the cache changes nothing
        with torch.no_grad():
            ids = torch.cat([ids, model.logits(model(ids).hidden)[:, -1:].argmax(-1)], 1)
    assert ids[0, 3:].tolist() == written


def test_a_wrong_merge_is_not_kept(seed, branches, tmp_path, monkeypatch, capsys):
    """Mutant: the check before anything is kept notices two adapters exchanged."""
    from llmrecipes.convert import merge_lora

    stack = merge_lora._stack
    monkeypatch.setattr(merge_lora, "_stack", lambda *words: stack(*words).flip(0))
    assert cli("merge", "lora", seed, tmp_path / "moe", "--experts", *branches) == 2
    assert "the logits of expert 0 differ" in capsys.readouterr().err
    assert not (tmp_path / "moe").exists()


def test_mistakes_are_told(seed, branches, wholes, tmp_path, capsys):
    other = seed_model(tmp_path / "other", dim=40)
    moved = tmp_path / "moved"
    shutil.copytree(branches[0], moved)
    state = load_file(moved / "model.safetensors")
    state["norm.weight"][0] += 1
    save_file(state, moved / "model.safetensors")
    few = lora_branch(tmp_path / "few", seed, 1, targets=r".*up_proj")
    attention = lora_branch(tmp_path / "attention", seed, 1, targets=".*")
    out = tmp_path / "out"
    cases = [
        (["lora", seed, out, "--experts", wholes[0]], "must have one adapter"),
        (["lora", branches[0], out, "--experts", branches[1]], "must be a model without adapters"),
        (["lora", other, out, "--experts", branches[0]], "is a model of other sizes"),
        (["lora", seed, out, "--experts", moved], "was trained over another model"),
        (["lora", seed, out, "--experts", branches[0], few], "is on other linear maps"),
        (["lora", seed, out, "--experts", *branches, "--top_k", "5"], "top_k 5 is not between 1 and 4"),
        (["lora", seed, out, "--experts", attention, "--router", "per_mlp"], "per_mlp beside adapters on self_attn"),
        (["btx", seed, out, "--experts", wholes[0]], "1 expert is no mixture"),
        (["btx", seed, out, "--experts", *wholes, "--top_k", "4"], "--top_k 4: must be between 1 and the 3"),
        (["btx", other, out, "--experts", *wholes], "is a model of other sizes"),
        (["fold", seed, out], "has no adapters"),
        (["fold", tmp_path / "nowhere", out], "no such folder"),
        (["flod", seed, out], "did you mean 'fold'"),
    ]
    for words, problem in cases:
        assert cli("merge", *words) == 2, words
        assert problem in capsys.readouterr().err, words
    assert cli("merge", "lora", seed, tmp_path / "both", "--experts", attention, branches[0]) == 2
    assert cli("merge", "lora", seed, tmp_path / "both", "--experts", attention, attention) == 0
    assert cli("merge", "fold", tmp_path / "both", out) == 2
    assert "adapters of attention" in capsys.readouterr().err
    assert not out.exists()
    assert isinstance(read_model(seed).model, Decoder)

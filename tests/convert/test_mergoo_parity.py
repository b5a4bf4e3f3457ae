"""A merged model equals mergoo's composed one: adapters and whole maps, with a router per linear map."""

from __future__ import annotations

import json
import re
from pathlib import Path

import pytest
import torch
from branches import write
from helpers import REPOSITORY, cli
from mergoo_peer import ADAPTER, CASES, NUM_EXPERTS, SIZES, tokens
from peers import peer_packages, run_with_peer
from safetensors.torch import load_file, save_file

from llmrecipes.convert.folder import read_model

GOLDEN = REPOSITORY / "tests" / "golden" / "mergoo"


def llama_folder(folder: Path, case: str, state: dict) -> Path:
    folder.mkdir()
    hf = SIZES | {"intermediate_size": CASES[case]["ffn"], "model_type": "llama", "architectures": ["LlamaForCausalLM"]}
    hf |= {
        "rms_norm_eps": 1e-6,
        "rope_theta": 10000.0,
        "hidden_act": "silu",
        "attention_bias": False,
        "mlp_bias": False,
    }
    (folder / "config.json").write_text(json.dumps(hf))
    save_file({n: t.contiguous().clone() for n, t in state.items()}, folder / "model.safetensors")
    return folder


def merged(folder: Path, case: str, golden: dict) -> Path:
    """What `llmrecipes merge` makes of the same parts, with mergoo's routers."""
    folder.mkdir()
    top_k = CASES[case]["top_k"]
    plain = {n: t for n, t in golden.items() if not re.search(r"lora_|\.gate\.weight|\.experts\.|logits|base_layer", n)}
    if case == "full":
        first = {n.replace(".experts.0.", "."): t for n, t in golden.items() if ".experts.0." in n}
        seed = llama_folder(folder / "seed", case, plain | first)
        paths = []
        for e in range(NUM_EXPERTS):
            own = {n.replace(f".experts.{e}.", "."): t for n, t in golden.items() if f".experts.{e}." in n}
            paths.append(llama_folder(folder / f"{e}", case, plain | own))
        words = ["merge", "btx", seed, folder / "moe", "--experts", *paths, "--router", "per_linear", "--top_k", top_k]
    else:
        base = {n.replace(".base_layer.", "."): t for n, t in golden.items() if ".base_layer." in n}
        seed = llama_folder(folder / "seed", case, plain | base)
        paths = []
        for e in range(NUM_EXPERTS):
            paths.append(folder / f"peft{e}")
            paths[-1].mkdir()
            own = {n: t for n, t in golden.items() if re.search(rf"lora_[AB]\.{e}\.", n)}
            own = {f"base_model.model.{re.sub(rf'[.]{e}[.]weight$', '.weight', n)}": t for n, t in own.items()}
            save_file({n: t.clone() for n, t in own.items()}, paths[-1] / "adapter_model.safetensors")
            adapter = ADAPTER | {"peft_type": "LORA", "target_modules": CASES[case]["maps"]}
            (paths[-1] / "adapter_config.json").write_text(json.dumps(adapter))
        words = ["merge", "lora", seed, folder / "moe", "--experts", *paths, "--null_expert", "false", "--top_k", top_k]
    assert cli(*words) == 0
    loaded = read_model(folder / "moe")
    with torch.no_grad():
        for name, parameter in loaded.model.named_parameters():
            if name.endswith("router.weight"):
                parameter.copy_(golden[theirs(name)])
    return write(folder / "routed", loaded.model)


def theirs(router: str) -> str:
    """mergoo's name of a router of ours."""
    layer = re.match(r"layers\.(\d+)\.", router).group(1)
    part = re.search(r"\.(\w+)\.router\.weight$", router).group(1).removesuffix("_proj")
    where = "mlp" if part in ("gate", "up", "down") else "self_attn"
    return f"model.layers.{layer}.{where}.{part}_proj.gate.weight"


def logits(folder):
    model = read_model(folder).model
    with torch.no_grad():
        return model.logits(model(tokens()).hidden)


@pytest.mark.parametrize("case", CASES)
def test_merged_logits_equal_mergoos_composed_model(case, tmp_path):
    assert len(list(GOLDEN.glob("*.safetensors"))) == len(CASES)
    golden = load_file(GOLDEN / f"{case}.safetensors")
    expected = golden["logits"]
    folder = merged(tmp_path / "same", case, golden)
    assert (logits(folder) - expected).abs().max() < 1e-5 * expected.abs().max()
    # mutant: the routers of gate and up exchanged
    swapped = dict(golden)
    for layer in (0, 1):
        names = [f"model.layers.{layer}.mlp.{part}_proj.gate.weight" for part in ("gate", "up")]
        swapped[names[0]], swapped[names[1]] = golden[names[1]], golden[names[0]]
    wrong = merged(tmp_path / "swapped", case, swapped)
    assert (logits(wrong) - expected).abs().max() > 1e-2 * expected.abs().max()


@pytest.mark.oracle
@pytest.mark.slow
def test_the_golden_files_are_what_mergoo_computes(tmp_path, tmp_path_factory):
    packages = peer_packages(tmp_path_factory, "mergoo==0.0.10")
    run_with_peer(packages, Path(__file__).parent / "mergoo_peer.py", tmp_path)
    seen = 0
    for path in sorted(tmp_path.glob("*.safetensors")):
        live, golden = load_file(path), load_file(GOLDEN / path.name)
        assert live.keys() == golden.keys()
        for name in live:
            bound = 1e-5 * golden[name].abs().max() if name == "logits" else 0
            assert (live[name] - golden[name]).abs().max() <= bound, name
        seen += 1
    assert seen == len(CASES)

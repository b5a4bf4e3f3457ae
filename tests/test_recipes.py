"""Every recipe in the repository: its header, its values against the real signatures, its promises."""

from __future__ import annotations

import math
import re
import shlex
from dataclasses import replace
from pathlib import Path

import pytest
import yaml
from helpers import REPOSITORY

from llmrecipes.recipe import check, read_recipe
from llmrecipes.recipe.rules.model import build_config

ROOT = REPOSITORY / "recipes"
EVERY_FILE = sorted(p.relative_to(REPOSITORY) for p in ROOT.rglob("*") if p.suffix in (".yaml", ".yml"))
# Recipes of data preparation and of evaluation are of other kinds; their commands read them.
# Below eval/lm_eval stand descriptions of tasks in the harness's own form.
HARNESS = [path for path in EVERY_FILE if path.parts[1:3] == ("eval", "lm_eval")]
EVALUATION = [path for path in EVERY_FILE if path.parts[1] == "eval" or path.stem == "evaluate"]
EVALUATION = [path for path in EVALUATION if path not in HARNESS]
TRAINING = [path for path in EVERY_FILE if path.parts[1] not in ("data", "sweep", "eval") and path not in EVALUATION]
HEADER = ("Purpose", "Command", "Hardware", "Expect", "Next")


@pytest.fixture(autouse=True)
def in_the_repository(monkeypatch):
    """Commands in headers are typed at the top of the repository."""
    monkeypatch.chdir(REPOSITORY)


def header(path: Path) -> dict[str, str]:
    """The comment block at the top, by its words."""
    found: dict[str, str] = {}
    word = None
    for line in path.read_text(encoding="utf-8").splitlines():
        if not line.startswith("#"):
            break
        match = re.match(r"# ([A-Z][a-z]+) {2,}(\S.*)$", line)
        if match:
            word = match[1]
            assert word not in found, f"{path}: {word} twice"
            found[word] = match[2]
        elif line == "#":
            word = None
        elif word:
            found[word] += " " + line[1:].strip()
    return found


def command_of(path: Path) -> tuple[list[Path], list[str]]:
    """Files and overrides of the command in the header."""
    words = shlex.split(header(path)["Command"])
    assert words[:2] == ["llmrecipes", "fit"], words
    rest, configs, overrides = words[2:], [], []
    while rest:
        key, value = rest.pop(0), rest.pop(0)
        if key == "--config":
            configs.append(Path(value))
        else:
            overrides += [key, value]
    return configs, overrides


def test_all_files_were_seen():
    on_disk = [p for p in ROOT.rglob("*") if p.is_file() and p.suffix in (".yaml", ".yml")]
    assert len(EVERY_FILE) == len(on_disk)
    assert len(TRAINING) >= 41 and len(EVALUATION) >= 3
    names = {str(path) for path in TRAINING}
    for stage in ("dense_pretrain", "moe_pretrain", "router_train"):  # each with its small twin
        assert {f"recipes/{stage}.yaml", f"recipes/cpu/{stage}.yaml"} <= names
    assert {f"recipes/lora_expert_{domain}.yaml" for domain in ("wiki", "math", "novel")} <= names
    assert {"recipes/prmoe_125m.yaml", "recipes/prmoe_350m.yaml", "recipes/cpu/prmoe_pretrain.yaml"} <= names


@pytest.mark.parametrize("path", EVERY_FILE, ids=str)
def test_header_says_what_a_reader_needs(path):
    found = header(path)
    assert tuple(found)[: len(HEADER)] == HEADER
    assert all(len(text) > 10 for text in found.values()), found
    assert path.read_text(encoding="utf-8").startswith("# Purpose ")
    assert re.search(r"\bGB\b", found["Hardware"] + found["Expect"]), "how much memory"
    for mentioned in re.findall(r"recipes/[\w./-]+\.yaml", path.read_text(encoding="utf-8")):
        assert Path(mentioned).is_file(), f"{path} names {mentioned}, which is not there"


@pytest.mark.parametrize("path", TRAINING, ids=str)
def test_command_in_the_header_is_about_the_file(path):
    configs, _ = command_of(path)
    assert configs[-1] == path
    recipe = yaml.safe_load(path.read_text(encoding="utf-8"))
    complete = {"name", "data", "trainer"} <= set(recipe) and "class_path" in recipe.get("model", {})
    assert len(configs) == (1 if complete else 2), "an overlay follows its base"
    for base in configs[:-1]:
        assert len(command_of(base)[0]) == 1


@pytest.mark.parametrize("path", TRAINING, ids=str)
def test_check_finds_nothing(path):
    configs, overrides = command_of(path)
    assert check(configs, overrides, files=False) == []
    assert read_recipe(configs, overrides).notes == []


@pytest.mark.parametrize("path", TRAINING, ids=str)
def test_parsed_against_the_real_signatures(path):
    """By the parser of ``fit`` itself, without building anything."""
    from llmrecipes.run.recipe_cli import RecipeCLI

    class ParseOnly(RecipeCLI):
        def instantiate_classes(self):
            pass

        def _set_seed(self):
            pass

    configs, overrides = command_of(path)
    words = [word for config in configs for word in ("--config", str(config))] + overrides
    settings = ParseOnly("fit", words).settings
    written = read_recipe(configs, overrides).data
    assert settings.trainer.max_steps == written["trainer"]["max_steps"]
    assert settings.model.init_args.config.dim == written["model"]["init_args"]["config"]["dim"]
    assert settings.name == written["name"]


@pytest.mark.parametrize("path", TRAINING, ids=str)
def test_numbers_in_the_header_belong_to_the_recipe(path):
    configs, overrides = command_of(path)
    model = read_recipe(configs, overrides).data["model"]["init_args"]
    if "init_from" in model:
        assert re.search(r"first loss (that of|near that of) ", header(path)["Expect"])
        return
    vocabulary = model["config"]["vocab_size"]
    (found,) = re.findall(r"first loss ln ([\d,]+) = ([\d.]+\d)", header(path)["Expect"])
    assert int(found[0].replace(",", "")) == vocabulary
    digits = len(found[1].partition(".")[2])
    assert float(found[1]) == pytest.approx(math.log(vocabulary), abs=0.51 * 10**-digits)


def model_config(name):
    return build_config(read_recipe([ROOT / name]).data["model"]["init_args"]["config"])


COUNTED = ("dense_pretrain", "moe_pretrain", "prmoe_125m", "prmoe_350m", "lora_expert_wiki", "router_train")


@pytest.mark.parametrize("name", [f"{name}.yaml" for name in COUNTED])
def test_expected_parameters_are_met_and_a_slip_is_noticed(name, tmp_path):
    expected = read_recipe([ROOT / name]).data["model"]["init_args"]["expected_params"]
    assert model_config(name).num_params == expected
    problems = check([ROOT / name], ["--model.init_args.config.vocab_size", "60000"], files=False)
    assert any("not the expected" in str(problem) for problem in problems)


def test_the_source_documents_numbers():
    """The sizes of the published dropless mixture of experts, which reports them itself."""
    config = model_config("moe_pretrain.yaml")
    assert (config.num_params, config.active_params) == (8_955_660_288, 2_915_862_528)
    recipe = read_recipe([ROOT / "moe_pretrain.yaml"]).data
    data = recipe["data"]["init_args"]
    assert data["global_batch"] * data["seq_len"] == 2_359_296
    assert recipe["trainer"]["max_steps"] * data["global_batch"] * data["seq_len"] == 147_456_000_000


def test_the_published_numbers_of_pr_moe():
    """DeepSpeed's PR-MoE-32/64 of 4 B parameters on a GPT of 350 M, and the source documents' small one."""
    small, large = (read_recipe([ROOT / f"prmoe_{size}.yaml"]).data for size in ("125m", "350m"))
    for recipe, rate in ((small, 6e-4), (large, 3e-4)):
        init, data = recipe["model"]["init_args"], recipe["data"]["init_args"]
        tokens = data["global_batch"] * data["seq_len"]
        assert abs(recipe["trainer"]["max_steps"] * tokens - 300e9) < tokens
        schedule = init["schedule"]["init_args"]
        assert schedule["warmup"] == "375M tokens" and schedule["decay"] is None
        assert init["optimizer"]["init_args"]["lr"] == rate
        assert rate * schedule["floor"] == pytest.approx(1e-6, rel=1e-5)
    moe, config = model_config("prmoe_350m.yaml").moe, model_config("prmoe_350m.yaml")
    assert config.layer_experts == [32] * 10 + [64] * 2 and (moe.top_k, moe.capacity_factor, moe.min_capacity) == (
        1,
        1,
        4,
    )
    assert (config.num_params, config.active_params) == (4_114_499_608, 457_066_520)
    dense = replace(config, moe=None)
    assert dense.num_params == pytest.approx(350e6, rel=0.02)
    assert model_config("prmoe_125m.yaml").layer_experts == [4] * 6
    assert replace(model_config("prmoe_125m.yaml"), moe=None).num_params == pytest.approx(125e6, rel=0.01)


def test_cpu_twins_are_a_fair_pair():
    """Equal active parameters to 1 %, and nothing else differs but the feed-forward part and the name."""
    dense, moe = (read_recipe([ROOT / f"cpu/{kind}_pretrain.yaml"]).data for kind in ("dense", "moe"))
    active = [model_config(f"cpu/{kind}_pretrain.yaml").active_params for kind in ("dense", "moe")]
    assert active[1] == pytest.approx(active[0], rel=0.01)
    assert model_config("cpu/moe_pretrain.yaml").num_params > 1.5 * active[1]
    for recipe in (dense, moe):
        recipe.pop("name")
        recipe["model"]["init_args"]["config"].pop("moe", None)
        recipe["model"]["init_args"]["config"].pop("ffn_dim", None)
    assert dense == moe


@pytest.mark.parametrize("path", EVALUATION, ids=str)
def test_evaluation_recipes_are_understood(path):
    from data_prep.frame.config import read_config
    from llmrecipes.errors import UserError
    from llmrecipes.evaluate.config import EvaluateConfig

    tasks = read_config(EvaluateConfig, ["--config", str(path)], files=False).tasks
    several = {"demo": 4, "japanese": 4, "evaluate": 4, "lm_eval": 2}
    assert len(tasks) == several.get(path.stem, 1)
    with pytest.raises(UserError, match="batch_sizes"):
        read_config(EvaluateConfig, ["--config", str(path), "--batch_sizes", "8"], files=False)

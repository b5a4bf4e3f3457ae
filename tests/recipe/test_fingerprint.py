from __future__ import annotations

import copy
from dataclasses import asdict

import pytest
import yaml
from good_recipe import GOOD

from llmrecipes.recipe import ModelConfig, MoEConfig, diff, fingerprint, with_later_defaults

SIZES = {"vocab_size": 61, "dim": 24, "num_layers": 2, "num_heads": 6, "ffn_dim": 40}


def _data() -> dict:
    return yaml.safe_load(GOOD)


def _changed(path: str, value: object) -> dict:
    data = _data()
    holder = data
    *parents, last = path.split("/")
    for key in parents:
        holder = holder[key]
    holder[last] = value
    return data


@pytest.mark.parametrize(
    ("path", "value"),
    [
        ("seed", 43),
        ("trainer/max_steps", 1),
        ("trainer/precision", "32-true"),
        ("model/init_args/config/dim", 64),
        ("model/init_args/optimizer/init_args/betas", [0.9, 0.99]),
        ("model/init_args/schedule/init_args/floor", 0.1),
        ("data/init_args/train", {"data/ja": 1.0}),
        ("data/init_args/global_batch", 8),
    ],
)
def test_what_changes_the_trajectory_changes_the_fingerprint(path, value):
    assert fingerprint(_changed(path, value)) != fingerprint(_data())


@pytest.mark.parametrize(
    ("path", "value"),
    [
        ("name", "x"),
        ("run_root", "x"),
        ("resume", "never"),
        ("logging", {"every": 1}),
        ("checkpoint/every", "1 steps"),
        ("trainer/devices", 8),
        ("data/init_args/micro_batch", 4),
        ("data/init_args/valid", {"ja": "data/ja"}),
        ("model/init_args/expected_params", None),
        ("seed", 42.0),
    ],
)
def test_what_does_not_leaves_it(path, value):
    assert fingerprint(_changed(path, value)) == fingerprint(_data())


def test_order_of_keys_does_not_matter():
    data = _data()
    assert fingerprint(dict(reversed(data.items()))) == fingerprint(data)
    assert len(fingerprint({})) == 64


def test_diff_names_each_key():
    old, new = _data(), _data()
    new["seed"] = 7
    new["data"]["init_args"]["train"] = {"data/ja": 1.0}
    new["data"]["init_args"]["seed"] = None
    assert diff(old, copy.deepcopy(old)) == []
    assert diff(old, new) == [
        "data.init_args.seed: (absent) -> null",
        "data.init_args.train.data/en: 0.5 -> (absent)",
        "data.init_args.train.data/ja: 0.5 -> 1",
        "seed: 42 -> 7",
    ]


def test_a_checkpoint_older_than_an_option_has_its_default():
    """What a version recorded that did not know the later options of the model."""
    moe = {"num_experts": 4, "ffn_dim": 8}
    present = {"seed": 1, "model": {"config": asdict(ModelConfig(**SIZES, moe=MoEConfig(**moe))), "optimizer": {}}}
    recorded = copy.deepcopy(present)
    later = ["norm_position", "parallel_residual", "rotary_fraction", "nope_layers", "logit_divisor"]
    for name in later:
        del recorded["model"]["config"][name]
    del recorded["model"]["config"]["moe"]["z_loss_coef"]
    assert len(diff(recorded, present)) == len(later) + 1
    assert diff(with_later_defaults(recorded), present) == []
    present["model"]["config"]["rotary_fraction"] = 0.5
    assert diff(with_later_defaults(recorded), present) == ["model.config.rotary_fraction: 1 -> 0.5"]
    assert with_later_defaults({}) == {} and with_later_defaults({"model": None}) == {"model": None}


def test_with_a_capacity_the_micro_batch_decides_what_is_dropped():
    def at(micro_batch: int) -> str:
        data = _changed("model/init_args/config/moe/capacity_factor", 1.0)
        data["data"]["init_args"]["micro_batch"] = micro_batch
        return fingerprint(data)

    assert at(4) != at(8) != fingerprint(_data())

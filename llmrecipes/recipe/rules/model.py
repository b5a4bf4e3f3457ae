"""Sizes of the model that do not fit together, and the parameter count that the recipe expects."""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import fields
from typing import Any

from llmrecipes.recipe.lora_config import LoraConfig, LoraExperts
from llmrecipes.recipe.model_config import ModelConfig
from llmrecipes.recipe.moe_config import MoEConfig
from llmrecipes.recipe.problem import closest
from llmrecipes.recipe.rope_config import RopeScaling
from llmrecipes.recipe.rules.facts import CONFIG, DATA, MODEL, Facts, Finding

_SIZES = (
    "vocab_size",
    "dim",
    "num_layers",
    "num_heads",
    "num_kv_heads",
    "head_dim",
    "ffn_dim",
    "max_seq_len",
    "moe_every",
    "vocab_multiple",
    "sliding_window",
)
_MOE_SIZES = ("num_experts", "ffn_dim", "top_k", "shared_ffn_dim")
# More layers than this is a slip of the finger, and counting them one by one would take for ever.
_MOST_LAYERS = 10_000


def model_problems(facts: Facts) -> Iterator[Finding]:
    """Positive sizes first; only then what :class:`ModelConfig` itself refuses, and the parameter count."""
    if facts.has(*MODEL, "seed"):
        what = "model.init_args.seed has no effect: the recipe's own seed decides the weights"
        yield Finding((*MODEL, "seed"), what, "write seed at the top level")
    bad = list(_sizes(facts))
    yield from bad
    moe = (*CONFIG, "moe")
    if facts.integer(*moe, "top_k") == 1 and facts.get(*moe, "renormalize") in (None, True):
        what = "moe.top_k 1 with renormalize: the one weight is always 1, so the loss gives the router no gradient"
        yield Finding((*moe, "top_k"), what, "use renormalize: false or top_k: 2")
    declared, vocabulary = facts.integer(*DATA, "vocab_size"), facts.integer(*CONFIG, "vocab_size")
    if declared and vocabulary and vocabulary < declared:
        what = f"the model's vocab_size {vocabulary:,} is smaller than data.init_args.vocab_size {declared:,}"
        yield Finding((*CONFIG, "vocab_size"), what)
    if bad or not facts.mapping(*CONFIG) or not facts.sound(CONFIG):
        return
    try:
        config = build_config(facts.mapping(*CONFIG))
    except (TypeError, ZeroDivisionError):
        return  # a missing size; reported with the types
    except ValueError as error:
        for sentence in str(error).split("; "):
            yield Finding(_place(sentence.split()[0], facts), f"model.init_args.config: {sentence}")
        return
    expected = facts.integer(*MODEL, "expected_params")
    if expected is not None and not config.is_expected(expected):
        difference = config.num_params - expected
        what = (
            f"the model has {config.num_params:,} parameters, not the expected {expected:,} "
            f"({abs(difference):,} {'more' if difference > 0 else 'fewer'})"
        )
        yield Finding((*MODEL, "expected_params"), what, "correct the sizes in config, or expected_params")


def build_config(values: dict[str, Any]) -> ModelConfig:
    """A ModelConfig from plain nested values.

    Raises:
        ValueError: sizes that do not fit together.
        TypeError: unknown or missing keys.
    """
    nested = dict(values)
    lora = nested.get("lora")
    if isinstance(lora, dict) and isinstance(lora.get("experts"), dict):
        nested["lora"] = lora | {"experts": LoraExperts(**lora["experts"])}
    for key, kind in (("moe", MoEConfig), ("rope_scaling", RopeScaling), ("lora", LoraConfig)):
        if isinstance(nested.get(key), dict):
            nested[key] = kind(**nested[key])
    return ModelConfig(**nested)


def _sizes(facts: Facts) -> Iterator[Finding]:
    for holder, prefix, names in ((CONFIG, "", _SIZES), ((*CONFIG, "moe"), "moe.", _MOE_SIZES)):
        for name in names:
            size = facts.integer(*holder, name)
            if size is not None and size < 1:
                yield Finding((*holder, name), f"model.init_args.config: {prefix}{name} {size} is less than 1")
    layers = facts.integer(*CONFIG, "num_layers")
    if layers is not None and layers > _MOST_LAYERS:
        yield Finding(
            (*CONFIG, "num_layers"), f"model.init_args.config: num_layers {layers:,} is beyond {_MOST_LAYERS:,}"
        )


def _place(word: str, facts: Facts) -> tuple[str, ...]:
    """Where a complaint that starts with ``word`` belongs: the field of that name, else the config as a whole."""
    path = (*CONFIG, *word.split("."))
    known = {field.name for field in fields(ModelConfig)}
    if facts.has(*path):
        return path
    return (*CONFIG, "positions") if closest(word, known) is None and facts.has(*CONFIG, "positions") else CONFIG

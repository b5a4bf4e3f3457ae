"""The folder whose weights a run begins with: there, and of the recipe's own model.

Paths start from the current folder.
"""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import asdict
from pathlib import Path

import yaml

from llmrecipes.recipe.model_config import ModelConfig
from llmrecipes.recipe.rules.facts import CONFIG, MODEL, Facts, Finding
from llmrecipes.recipe.rules.model import build_config

# What may differ: it changes how the weights are trained, not which they are.
_FREE = {"dropout", "init_std", "max_seq_len"}


def initial_problems(facts: Facts) -> Iterator[Finding]:
    """A missing folder, or one that holds another model than ``config`` describes."""
    folder = facts.get(*MODEL, "init_from")
    if not isinstance(folder, str):
        return
    place = (*MODEL, "init_from")
    path = Path(folder)
    if not path.is_dir():
        yield Finding(
            place, f"missing folder {folder} (the weights to begin with)", "make it: llmrecipes convert from-hf"
        )
        return
    if (path / "config.json").is_file() and not (path / "model.yaml").is_file():
        yield Finding(place, f"{folder} is a Hugging Face folder", f"llmrecipes convert from-hf {folder} NEW_FOLDER")
        return
    theirs, ours = _model_of(path), _build(facts.mapping(*CONFIG))
    if theirs is None or ours is None:
        return
    for name, value in asdict(theirs).items():
        mine = asdict(ours)[name]
        if name not in _FREE and name not in ("moe", "lora") and mine != value:
            yield Finding((*CONFIG, name), f"model.init_args.config: {name} {mine} where {folder} has {value}")
    yield from _experts(ours, theirs, folder)
    yield from _adapters(ours, theirs, folder)


def _experts(ours: ModelConfig, theirs: ModelConfig, folder: str) -> Iterator[Finding]:
    """Sizes only: how experts are chosen and balanced, and how many tokens they take, may change when a run begins."""
    words = [_words(c) for c in (ours, theirs)]
    if words[0] != words[1]:
        yield Finding((*CONFIG, "moe"), f"model.init_args.config: {words[0]} where {folder} has {words[1]}")


def _words(config: ModelConfig) -> str:
    moe = config.moe
    if moe is None:
        return "no experts"
    numbers = sorted(set(config.layer_experts))
    count = str(config.layer_experts) if len(numbers) > 1 else ", ".join(map(str, numbers))
    words = f"{count} experts of width {moe.ffn_dim}"
    if moe.residual:
        words += " beside a dense network"
    return words if moe.shared_ffn_dim is None else f"{words} beside a shared one of {moe.shared_ffn_dim}"


def _adapters(ours: ModelConfig, theirs: ModelConfig, folder: str) -> Iterator[Finding]:
    """One adapter may be added to a model without; several, with their routers, come from a merge."""
    place = (*CONFIG, "lora")
    mine, there = ours.lora, theirs.lora
    if mine is None and there is not None:
        yield Finding(place, f"model.init_args.config: no lora where {folder} has it", "llmrecipes merge fold, or lora")
    if mine is None or (there is None and mine.experts is None):
        return
    if there is None:
        yield Finding(place, f"model.init_args.config: lora.experts where {folder} has none", "llmrecipes merge lora")
        return
    for name in ("rank", "alpha", "targets", "rank_stabilized"):
        if getattr(mine, name) != getattr(there, name):
            what = f"lora.{name} {getattr(mine, name)} where {folder} has {getattr(there, name)}"
            yield Finding((*place, name), f"model.init_args.config: {what}")
    sizes = [
        None if c.experts is None else (c.experts.num_experts, c.experts.null_expert, c.experts.router)
        for c in (mine, there)
    ]
    if sizes[0] != sizes[1]:
        yield Finding((*place, "experts"), f"model.init_args.config: lora.experts differ from those of {folder}")


def _model_of(folder: Path) -> ModelConfig | None:
    """The model that the folder describes; None where that cannot be known."""
    try:
        recipe = yaml.safe_load((folder / "model.yaml").read_text(encoding="utf-8"))
        return _build(recipe["model"]["init_args"]["config"])
    except (OSError, yaml.YAMLError, KeyError, TypeError):
        return None


def _build(values: object) -> ModelConfig | None:
    try:
        return build_config(values) if isinstance(values, dict) else None
    except (TypeError, ValueError, ZeroDivisionError):
        return None  # reported with the types, or with the model

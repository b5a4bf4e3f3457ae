"""Which parameters a run trains, by the names of groups or by regular expressions."""

from __future__ import annotations

import re

from torch import nn

from llmrecipes.errors import UserError
from llmrecipes.models.lora import is_adapter
from llmrecipes.recipe.model_config import ModelConfig

# Exact: a search for "gate" would also find the gate projections, and train a third of the feed-forward networks.
GROUPS = {
    "all": r"",
    "gate": r"\.mlp\.gate\.weight$|\.router\.weight$",
    "lm_head": r"^head\.",
    "embeddings": r"^(embed|position_embed)\.",
    "norms": r"(^|_)norm\.",
    "attention": r"\.attention\.(qkv|out)\.(weight|bias)$",
    "mlp": r"\.mlp\.(gate_up|up|down)\.(weight|bias)$",
    "lora": r"\.lora\.\w+\.[ab]$",
    "experts": r"\.mlp\.experts\.|\.mlp\.(gate_up|up|down)\.|\.mlp\.lora\.",
}


def set_trainable(model: nn.Module, trainable: list[str], frozen: list[str]) -> None:
    """Leave a gradient to those parameters only that are in ``trainable`` and not in ``frozen``.

    Args:
        model: a decoder, also on the meta device.
        trainable, frozen: names of `GROUPS`, or regular expressions that are searched for in a parameter's name.

    Raises:
        UserError: one of them fits no parameter, or nothing is left to train.
    """
    names = [name for name, _ in model.named_parameters()]
    chosen = set().union(*(matching(item, names) for item in trainable))
    chosen -= set().union(*(matching(item, names) for item in frozen))
    if not chosen:
        raise UserError(f"model.init_args: nothing is left to train by trainable {trainable} and frozen {frozen}")
    for name, parameter in model.named_parameters():
        parameter.requires_grad_(name in chosen)


def matching(item: str, names: list[str]) -> set[str]:
    """The parameters meant by a group's name or a regular expression.

    Raises:
        UserError: there is none.
    """
    try:
        pattern = re.compile(GROUPS.get(item, item))
    except re.error as error:
        raise UserError(f"model.init_args: {item} is no regular expression: {error}") from None
    found = {name for name in names if pattern.search(name)}
    if item == "experts":  # routers choose between experts and are none
        found -= matching("gate", names) if any(re.search(GROUPS["gate"], name) for name in names) else set()
    if item == "lm_head" and not found:
        found = {name for name in names if name == "embed.weight"}  # tied: they are one
    if not found:
        raise UserError(
            f"model.init_args: '{item}' is no parameter of this model; groups: {', '.join(GROUPS)}; "
            "anything else is a regular expression"
        )
    return found


def frozen_active(model: nn.Module, config: ModelConfig) -> int:
    """Frozen parameters that one token is multiplied by: no lookup tables, k of N experts."""
    total = 0.0
    for name, parameter in model.named_parameters():
        if parameter.requires_grad or (name == "embed.weight" and not config.tie_embeddings):
            continue
        share = 1.0
        if config.lora is not None and is_adapter(name):
            share = config.lora.active_stacks / config.lora.stacks
        elif config.moe is not None and ".mlp.experts." in name and parameter.ndim == 3:
            share = config.moe.top_k / parameter.shape[0]
        total += share * parameter.numel() if name != "position_embed.weight" else 0
    return round(total)

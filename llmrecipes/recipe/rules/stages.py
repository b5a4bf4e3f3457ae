"""What stages that train a part of a model ask of a recipe."""

from __future__ import annotations

from collections.abc import Iterator

from llmrecipes.recipe.duration import Duration
from llmrecipes.recipe.rules.facts import CONFIG, MODEL, Facts, Finding


def stage_problems(facts: Facts) -> Iterator[Finding]:
    """A run of another length than its token budget; adapters that are missing."""
    yield from _budget(facts)
    yield from _routers(facts)
    if facts.get("model", "class_path") == "llmrecipes.modules.LoraExpertModule":
        if not facts.mapping(*CONFIG, "lora"):
            what = "LoraExpertModule trains adapters, but model.init_args.config has no lora"
            yield Finding(CONFIG, what, "for example lora: {rank: 16, alpha: 32}")
        if not isinstance(facts.get(*MODEL, "init_from"), str):
            what = "LoraExpertModule without init_from: adapters on a model that was never trained"
            yield Finding(MODEL, what, "init_from: a folder of convert from-hf, or a run")


def _routers(facts: Facts) -> Iterator[Finding]:
    if facts.get("model", "class_path") != "llmrecipes.modules.RouterModule":
        return
    lora, moe = (*CONFIG, "lora", "experts"), (*CONFIG, "moe")
    place = lora if facts.mapping(*lora) else moe
    if not facts.mapping(*place):
        yield Finding(
            CONFIG, "RouterModule trains routers, but model.init_args.config has neither moe nor lora.experts"
        )
    elif facts.integer(*place, "top_k") == 1 and (place == lora or facts.get(*moe, "renormalize") in (None, True)):
        what = "top_k 1: the one weight is always 1, so the loss gives the router no gradient"
        if place == lora:  # of moe the rules of the model say so
            yield Finding((*place, "top_k"), what, "use top_k: 2")
    if not isinstance(facts.get(*MODEL, "init_from"), str):
        what = "RouterModule without init_from: routers between experts that were never trained"
        yield Finding(MODEL, what, "init_from: a folder of llmrecipes merge")


def _budget(facts: Facts) -> Iterator[Finding]:
    text, per_step = facts.get(*MODEL, "token_budget"), facts.tokens_per_step
    if not isinstance(text, str) or per_step is None or facts.max_steps is None:
        return
    try:
        wanted = Duration.parse(text).to_steps(per_step)
    except (ValueError, OverflowError):
        return
    if wanted != facts.max_steps:
        tokens = facts.max_steps * per_step
        what = f"token_budget {text} is {wanted:,} steps of {per_step:,} tokens; trainer.max_steps {facts.max_steps:,}"
        yield Finding((*MODEL, "token_budget"), f"{what} would be {tokens:,}", f"trainer.max_steps: {wanted}")

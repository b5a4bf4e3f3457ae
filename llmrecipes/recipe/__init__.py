"""Strict reading of recipes: typed sizes, durations with units, every mistake at once. Never imports torch."""

from llmrecipes.recipe.check import check, checked_recipe
from llmrecipes.recipe.duration import Duration
from llmrecipes.recipe.fingerprint import diff, fingerprint, with_later_defaults
from llmrecipes.recipe.model_config import ModelConfig
from llmrecipes.recipe.moe_config import MoEConfig
from llmrecipes.recipe.problem import Problem
from llmrecipes.recipe.recipe import Recipe, read_recipe
from llmrecipes.recipe.rope_config import RopeScaling
from llmrecipes.recipe.time_span import TimeSpan

__all__ = [
    "Duration",
    "MoEConfig",
    "ModelConfig",
    "Problem",
    "Recipe",
    "RopeScaling",
    "TimeSpan",
    "check",
    "checked_recipe",
    "diff",
    "fingerprint",
    "read_recipe",
    "with_later_defaults",
]

"""Strict reading of recipes: typed sizes, durations with units, every mistake at once. Never imports torch."""

from llmrecipes.recipe.duration import Duration
from llmrecipes.recipe.model_config import ModelConfig, MoEConfig, RopeScaling

__all__ = ["Duration", "MoEConfig", "ModelConfig", "RopeScaling"]

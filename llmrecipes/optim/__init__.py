"""Optimizers and learning-rate schedules: plain values until the model and the run length are known."""

from llmrecipes.optim.adamw import AdamW
from llmrecipes.optim.schedule import Constant, CoolDown, Restart, RunLength, Schedule, WarmupCosine, WarmupStableDecay

__all__ = ["AdamW", "Constant", "CoolDown", "Restart", "RunLength", "Schedule", "WarmupCosine", "WarmupStableDecay"]

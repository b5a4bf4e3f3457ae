"""LightningModules, one per stage; base.py holds the only optimizer step and the only division."""

from llmrecipes.modules.base import StepModule, TrainingStopped
from llmrecipes.modules.dpo import PreferenceModule
from llmrecipes.modules.lora import LoraExpertModule
from llmrecipes.modules.pretrain import PretrainModule
from llmrecipes.modules.router import RouterModule
from llmrecipes.modules.sft import SFTModule

__all__ = [
    "LoraExpertModule",
    "PreferenceModule",
    "PretrainModule",
    "RouterModule",
    "SFTModule",
    "StepModule",
    "TrainingStopped",
]

"""Hugging Face checkpoints in and out."""

from llmrecipes.convert.configs import config_from_hf, config_to_hf, hf_family
from llmrecipes.convert.weights import from_hf_state_dict, to_hf_state_dict

__all__ = ["config_from_hf", "config_to_hf", "from_hf_state_dict", "hf_family", "to_hf_state_dict"]

"""Hugging Face checkpoints in and out."""

from llmrecipes.convert.config_in import config_from_hf
from llmrecipes.convert.config_out import config_to_hf
from llmrecipes.convert.families import hf_family
from llmrecipes.convert.weights import from_hf_state_dict, to_hf_state_dict

__all__ = ["config_from_hf", "config_to_hf", "from_hf_state_dict", "hf_family", "to_hf_state_dict"]

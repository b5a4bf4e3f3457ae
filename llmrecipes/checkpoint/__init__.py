"""Checkpoints: an atomic writer for all ranks, a verifying reader that reshards, retention.

Their callback is in :mod:`llmrecipes.checkpoint.callback`: what reads a checkpoint needs no Lightning.
"""

from llmrecipes.checkpoint.base import base_of, describe_base, weight_folders
from llmrecipes.checkpoint.errors import CheckpointError
from llmrecipes.checkpoint.files import (
    read_checkpoint,
    read_info,
    read_rng,
    read_tensors,
    verify,
    write_checkpoint,
)
from llmrecipes.checkpoint.load import load_initial, load_model, load_optimizer
from llmrecipes.checkpoint.retention import checkpoints, newest_whole, quarantine, whole_checkpoints
from llmrecipes.checkpoint.state import TrainingState

__all__ = [
    "CheckpointError",
    "TrainingState",
    "base_of",
    "checkpoints",
    "describe_base",
    "load_initial",
    "load_model",
    "load_optimizer",
    "newest_whole",
    "quarantine",
    "read_checkpoint",
    "read_info",
    "read_rng",
    "read_tensors",
    "verify",
    "weight_folders",
    "whole_checkpoints",
    "write_checkpoint",
]

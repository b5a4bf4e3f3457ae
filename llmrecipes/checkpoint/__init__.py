"""Checkpoints: an atomic writer, a verifying reader, retention, and the callback that uses them."""

from llmrecipes.checkpoint.callback import Checkpoints
from llmrecipes.checkpoint.files import (
    CheckpointError,
    read_checkpoint,
    read_info,
    read_tensors,
    verify,
    write_checkpoint,
)
from llmrecipes.checkpoint.retention import checkpoints, newest_whole
from llmrecipes.checkpoint.state import TrainingState

__all__ = [
    "CheckpointError",
    "Checkpoints",
    "TrainingState",
    "checkpoints",
    "newest_whole",
    "read_checkpoint",
    "read_info",
    "read_tensors",
    "verify",
    "write_checkpoint",
]

"""What depends on the number of processes: gradient clipping by the one global norm."""

from llmrecipes.distributed.clip import clip_grad_norm

__all__ = ["clip_grad_norm"]

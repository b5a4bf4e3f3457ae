"""Hugging Face checkpoints in and out."""

from __future__ import annotations

from typing import Any

from llmrecipes.lazy import named

_HOME = {
    "config_from_hf": "config_in",
    "config_to_hf": "config_out",
    "from_hf_state_dict": "weights",
    "hf_family": "families",
    "to_hf_state_dict": "weights",
}
__all__ = sorted(_HOME)


def __getattr__(name: str) -> Any:
    """Import on first use: a configuration is translated, and a report written, without torch."""
    return named(__name__, _HOME, name)


def __dir__() -> list[str]:
    return __all__

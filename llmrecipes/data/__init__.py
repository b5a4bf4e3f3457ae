"""Token shards, their order, packing to windows, and the DataModules. Imports nothing until a name is used."""

from __future__ import annotations

from typing import Any

from llmrecipes.lazy import named

_HOME = {
    "Batch": "batch",
    "ChatExamples": "chat_data",
    "IndexedShard": "shards",
    "Manifest": "manifest",
    "Order": "order",
    "PackedShards": "packed_shards",
    "PackedSource": "packing",
    "Permutation": "order",
    "PreferenceBatch": "preference_data",
    "PreferencePairs": "preference_data",
    "ShardWriter": "shards",
    "StepData": "step_data",
    "Tokenizer": "tokenizer",
    "verify": "verify",
}
__all__ = sorted(_HOME)


def __getattr__(name: str) -> Any:
    """Import on first use: writing shards needs neither torch nor Lightning."""
    return named(__name__, _HOME, name)


def __dir__() -> list[str]:
    return __all__

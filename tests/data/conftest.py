from __future__ import annotations

from collections.abc import Callable
from pathlib import Path

import numpy as np
import pytest

from llmrecipes.data.shards import ShardWriter

VOCAB, EOS = 1000, 2


@pytest.fixture
def make_shard(tmp_path: Path) -> Callable[..., tuple[str, list[np.ndarray]]]:
    """Writes a shard of random documents, each ending in EOS; returns its prefix and the documents."""

    def make(
        name: str = "ja",
        documents: int = 300,
        longest: int = 40,
        vocab: int = VOCAB,
        seed: int = 0,
        tokenizer: str = "a" * 64,
    ) -> tuple[str, list[np.ndarray]]:
        rng = np.random.default_rng(seed)
        texts = [np.append(rng.integers(3, vocab, rng.integers(1, longest)), EOS) for _ in range(documents)]
        prefix = str(tmp_path / name)
        with ShardWriter(prefix, vocab, eos_id=EOS, tokenizer_sha256=tokenizer, tokenizer="unigram") as writer:
            for text in texts:
                writer.add(text)
        return prefix, texts

    return make

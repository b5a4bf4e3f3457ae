"""A tokenizer of 64 words with shards that belong to it: enough to write samples."""

from __future__ import annotations

import numpy as np
import pytest
from tokenizers import Tokenizer, models, pre_tokenizers

from llmrecipes.data import ShardWriter
from llmrecipes.data.tokenizer import Tokenizer as FolderTokenizer


@pytest.fixture(scope="session")
def words(tmp_path_factory):
    """Folder of the tokenizer and prefix of the shards."""
    folder = tmp_path_factory.mktemp("words")
    vocabulary = {"<unk>": 0, "<s>": 1, "</s>": 2, "日本の": 3} | {f"w{i}": i for i in range(4, 64)}
    tokenizer = Tokenizer(models.WordLevel(vocabulary, unk_token="<unk>"))
    tokenizer.pre_tokenizer = pre_tokenizers.WhitespaceSplit()
    (folder / "tokenizer").mkdir()
    tokenizer.save(str(folder / "tokenizer" / "tokenizer.json"))
    sha256 = FolderTokenizer(folder / "tokenizer").sha256
    generator = np.random.default_rng(0)
    with ShardWriter(folder / "text", 64, eos_id=2, tokenizer_sha256=sha256) as writer:
        for _ in range(200):
            writer.add(np.append(generator.integers(3, 64, generator.integers(5, 60)), 2))
    return folder


@pytest.fixture
def with_words(recipe, words):
    """The little recipe on the shards of that tokenizer; ``with_words(moe=True, steps=6)``."""

    def make(moe=True, steps=6):
        return recipe(moe=moe, steps=steps, train={str(words / "text"): 1.0}, tokenizer=str(words / "tokenizer"))

    return make

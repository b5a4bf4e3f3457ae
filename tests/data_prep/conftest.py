"""A small world of texts and a tokenizer of it, made once for all tests of data_prep."""

import json
import os
from pathlib import Path

import pytest

from data_prep.demo_corpus import demo
from data_prep.tokenizer import train_tokenizer

REPO = Path(__file__).parents[2]


@pytest.fixture(scope="session")
def corpus(tmp_path_factory):
    """The demo corpus of 400 documents."""
    folder = tmp_path_factory.mktemp("demo") / "corpus"
    demo(str(folder), documents=400, seed=7)
    return folder


@pytest.fixture(scope="session")
def tokenizer(corpus, tmp_path_factory):
    """A folder with a tokenizer of 1,200 pieces, trained on that corpus."""
    folder = tmp_path_factory.mktemp("tokenizer") / "small"
    names = ("ja_towns", "en_towns", "ja_people", "en_people", "arithmetic")
    train_tokenizer([str(corpus / f"{name}.jsonl") for name in names], str(folder), vocab_size=1200, num_threads=1)
    return folder


@pytest.fixture
def write_jsonl(tmp_path):
    """Writes texts to a JSONL file and returns its name."""

    def write(name, texts):
        path = tmp_path / name
        path.write_text("".join(json.dumps({"text": text}, ensure_ascii=False) + "\n" for text in texts))
        return str(path)

    return write


@pytest.fixture(scope="session")
def real_corpus():
    """The folder of real text; skips where there is none."""
    shared = Path(os.environ.get("LLMRECIPES_SHARED", REPO.parent / "shared"))
    folder = shared / "data" / "corpus"
    if not folder.is_dir():
        pytest.skip(f"no real corpus at {folder}: set LLMRECIPES_SHARED")
    return folder

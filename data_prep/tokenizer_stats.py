"""`llmrecipes data tokenizer stats`: how many characters a token stands for, text by text, tokenizer by tokenizer."""

from __future__ import annotations

from pathlib import Path

from data_prep.jsonl import check_inputs, stem
from data_prep.tokenizer import progress
from llmrecipes.data.tokenizer import Tokenizer


def stats(tokenizers: list[str], input: list[str], field: str = "text", documents: int = 1000) -> None:
    """Prints characters per token.

    Args:
        tokenizers: folders with tokenizer.model or tokenizer.json.
        input: JSONL files (plain, .gz, .zst) or Hugging Face dataset folders.
        field: name of the field that holds the text.
        documents: how many documents of each input are measured, from its beginning.
    """
    paths = check_inputs(input)
    loaded = [Tokenizer(folder) for folder in tokenizers]
    width = max(24, *(len(name) for name in tokenizers)) + 1
    print(f"{'tokenizer':<{width}}{'pieces':>8}" + "".join(f"{stem(path)[:12]:>13}" for path in paths))
    texts = [first_texts(path, field, documents) for path in paths]
    for name, tokenizer in zip(tokenizers, loaded, strict=True):
        rates = [characters_per_token(tokenizer, found) for found in texts]
        print(f"{name:<{width}}{tokenizer.vocab_size:>8,}" + "".join(f"{rate:>13.3f}" for rate in rates))


def first_texts(path: Path, field: str, documents: int) -> list[str]:
    """The first documents of an input."""
    found = list[str]()
    for text in progress(path, field, "reading"):
        found.append(text)
        if len(found) == documents:
            break
    return found


def characters_per_token(tokenizer: Tokenizer, texts: list[str]) -> float:
    """Characters (code points) of all texts over tokens of all texts; 0 for none."""
    tokens = sum(map(len, tokenizer.encode_batch(texts)))
    return sum(map(len, texts)) / tokens if tokens else 0.0

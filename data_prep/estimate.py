"""`llmrecipes data estimate`: how many tokens texts hold, from a sample of documents, with an error bar."""

from __future__ import annotations

import math
from dataclasses import dataclass
from pathlib import Path

import numpy as np

from data_prep.frame.chance import unit
from data_prep.jsonl import check_inputs, stem
from data_prep.tokenizer import progress
from llmrecipes.data.tokenizer import Tokenizer
from llmrecipes.errors import UserError


@dataclass(frozen=True)
class Estimate:
    """Tokens of a text collection (one more for the end of each document), and the half width of the 95 % interval."""

    documents: int
    characters: int
    sampled: int
    tokens: float
    error: float


def estimate(input: list[str], tokenizer: str, sample: int = 2000, field: str = "text", seed: int = 0) -> None:
    """Prints documents, characters and estimated tokens of each input.

    Args:
        input: JSONL files (plain, .gz, .zst) or Hugging Face dataset folders.
        tokenizer: folder with tokenizer.model or tokenizer.json.
        sample: about how many documents of each input are tokenized; smaller inputs are counted exactly.
        field: name of the field that holds the text.
        seed: chooses them, with a hash of the text.
    """
    if sample < 2:
        raise UserError(f"--sample {sample}: an error bar needs at least 2 documents")
    paths, pieces = check_inputs(input), Tokenizer(tokenizer)
    print(f"{'input':<28} {'documents':>11} {'characters':>14} {'tokens':>14}    {'error':>12}")
    for path in paths:
        found = estimate_file(path, pieces, sample, field, seed)
        print(
            f"{stem(path):<28} {found.documents:>11,} {found.characters:>14,} {found.tokens:>14,.0f} +- "
            f"{found.error:>12,.0f}  ({found.sampled:,} documents tokenized)"
        )


def estimate_file(path: Path, tokenizer: Tokenizer, sample: int, field: str, seed: int) -> Estimate:
    """Tokens by the ratio to characters in a sample of documents (Cochran, Sampling Techniques, 6.4)."""
    lengths, chosen = list[int](), list[tuple[float, str]]()
    for text in progress(path, field, "reading"):
        lengths.append(len(text))
        chosen.append((unit(text, seed, "estimate"), text))
        if len(chosen) >= 4 * sample:
            chosen = sorted(chosen)[:sample]
    texts = [text for _, text in sorted(chosen)[:sample]]
    tokens = np.array([len(tokenizer.encode(text)) + 1 for text in texts], dtype=np.float64)
    characters = np.array([len(text) for text in texts], dtype=np.float64)
    count, size = len(lengths), len(texts)
    if not size:
        return Estimate(0, 0, 0, 0.0, 0.0)
    ratio = tokens.sum() / characters.sum()
    total = ratio * sum(lengths)
    if size == count:
        return Estimate(count, sum(lengths), size, float(tokens.sum()), 0.0)
    spread = ((tokens - ratio * characters) ** 2).sum() / max(1, size - 1)
    error = 1.96 * count * math.sqrt((1 - size / count) * spread / size)
    return Estimate(count, sum(lengths), size, float(total), error)

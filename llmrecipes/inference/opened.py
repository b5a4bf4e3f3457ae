"""A model and its tokenizer, from any folder that holds one."""

from __future__ import annotations

from dataclasses import dataclass
from pathlib import Path

import torch

from llmrecipes.convert.folder import read_model
from llmrecipes.errors import UserError
from llmrecipes.inference.codec import Codec, open_codec
from llmrecipes.models import Decoder

DTYPES = {"fp32": torch.float32, "bf16": torch.bfloat16}


@dataclass(frozen=True)
class Opened:
    """What generation and perplexity work with.

    Attributes:
        name: the folder as the user named it.
        model: on the CPU, in evaluation mode.
        codec: its tokenizer.
        vocab_size: ids that the tokenizer knows; later rows of the output layer only pad it and are never chosen.
        max_seq_len: longest text the model was made for, or None where nothing says so.
        hard_limit: whether a longer text is impossible (learned positions, some stretched ones), not merely unwise.
    """

    name: str
    model: Decoder
    codec: Codec
    vocab_size: int
    max_seq_len: int | None
    hard_limit: bool


def open_model(folder: str, dtype: str = "fp32", tokenizer: str | None = None, template: str | None = None) -> Opened:
    """Load a model.

    Args:
        folder: a run folder, a checkpoint, what ``llmrecipes convert`` wrote, or a Hugging Face folder.
        dtype: ``fp32`` or ``bf16``: of weights and arithmetic.
        tokenizer: folder of another tokenizer than the model's own.
        template: another chat template than the one it was trained with: a name or a file.

    Raises:
        UserError: the folder is none of these, or there is no tokenizer for it, or it does not fit.
    """
    loaded = read_model(Path(folder), dtype=DTYPES[dtype])
    place = Path(tokenizer) if tokenizer else loaded.tokenizer
    if place is None:
        raise UserError(
            f"{folder}: no tokenizer found in it (nor where its recipe says); name its folder with --tokenizer"
        )
    place = place.parent if place.is_file() else place
    if not place.is_dir():
        raise UserError(f"--tokenizer {place}: no such folder")
    hugging_face = _hugging_face(Path(folder), place, tokenizer is not None)
    codec = open_codec(place, hugging_face, loaded.eos_ids, template or loaded.template)
    rows = min(loaded.config.vocab_size, loaded.vocab_rows or loaded.config.vocab_size)
    if codec.vocab_size > loaded.config.vocab_size:
        raise UserError(
            f"{place}: a tokenizer of {codec.vocab_size} pieces, but {folder} has embeddings for "
            f"{loaded.config.vocab_size} only; this is not the tokenizer it was trained with"
        )
    hard = loaded.config.longest_text
    limit = hard or loaded.max_seq_len or loaded.config.max_seq_len
    return Opened(folder, loaded.model.eval(), codec, min(rows, codec.vocab_size), limit, hard is not None)


def _hugging_face(model: Path, tokenizer: Path, named: bool) -> bool:
    """Whether texts get special pieces as transformers puts them around: not those of a training run.

    A tokenizer that lies in the model's folder came with the model; one that the user named is what its files say.
    """
    if named:
        return any((tokenizer / name).is_file() for name in ("tokenizer_config.json", "vocab.json", "config.json"))
    return tokenizer.resolve() == model.resolve()

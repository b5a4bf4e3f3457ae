"""The tokenizer that travels with a model: its files, its special ids, and whether it is the right one."""

from __future__ import annotations

from pathlib import Path
from typing import Any

from llmrecipes.checkpoint.durable import write_file
from llmrecipes.convert.folder import TOKENIZER_FILES, Source
from llmrecipes.convert.writing import write_json
from llmrecipes.data.chat_template import find_template
from llmrecipes.data.manifest import Manifest
from llmrecipes.data.tokenizer import Tokenizer
from llmrecipes.errors import UserError

_IDS = ("bos_token_id", "eos_token_id", "pad_token_id")


def check_tokenizer(source: Source, folder: Path) -> Tokenizer:
    """The tokenizer of a folder, if the model can have been trained with it.

    Raises:
        UserError: it has ids that the model has not, or is not the one that made the training data.
    """
    tokenizer = Tokenizer(folder)
    if tokenizer.vocab_size > source.config.vocab_size:
        raise UserError(
            f"{folder}: this tokenizer has {tokenizer.vocab_size:,} ids, the model {source.config.vocab_size:,}; "
            "name the model's own with --tokenizer"
        )
    for prefix in source.shards:
        manifest = Manifest.read(prefix)
        if manifest is not None and manifest.tokenizer_sha256 != tokenizer.sha256:
            raise UserError(
                f"{folder}: the model was trained on {prefix}, written with tokenizer {manifest.tokenizer} "
                f"({manifest.tokenizer_sha256[:12]}), and this is another ({tokenizer.sha256[:12]})"
            )
    return tokenizer


def generation_config(source: Source, tokenizer: Tokenizer | None) -> dict[str, Any]:
    """``generation_config.json``: the source's own, else the special ids that are known.

    Raises:
        UserError: an id is not one of the model's.
    """
    found = dict(source.generation)
    if not found:
        found = {key: source.hf[key] for key in _IDS if source.hf.get(key) is not None}
    if "eos_token_id" not in found and tokenizer is not None:
        found["eos_token_id"] = tokenizer.eos_id
        bos = next((i for p in ("<s>", "<|begin_of_text|>") if (i := tokenizer.piece_id(p)) is not None), None)
        pad = tokenizer.piece_id("<pad>")
        found |= {key: i for key, i in (("bos_token_id", bos), ("pad_token_id", pad)) if i is not None}
    problems = [
        f"{key} {one!r} is not one of the model's {source.config.vocab_size:,} ids: correct generation_config.json"
        for key in _IDS
        for one in (found[key] if isinstance(found.get(key), list) else [found.get(key)])
        if one is not None and (type(one) is not int or not 0 <= one < source.config.vocab_size)
    ]
    if problems:
        raise UserError(*(f"{source.folder}: {problem}" for problem in problems))
    return found


def special_ids(generation: dict[str, Any]) -> dict[str, Any]:
    """The keys of ``config.json`` that say which ids begin, end and pad a text."""
    return {key: generation.get(key) for key in _IDS}


def copy_tokenizer(folder: Path, target: Path, tokenizer: Tokenizer, template: str | None = None) -> None:
    """Copy the files of a tokenizer; adds what ``AutoTokenizer`` needs to know where nothing says it.

    Args:
        folder, target: from where, to where. tokenizer: what is in ``folder``.
        template: chat template that the model was fine-tuned with, by name or file; None = the tokenizer's own.

    Raises:
        UserError: there is no such template.
    """
    for name in TOKENIZER_FILES:
        if (folder / name).is_file():
            write_file(target / name, [(folder / name).read_bytes()])
    if not (target / "tokenizer_config.json").exists():
        write_json(target / "tokenizer_config.json", _tokenizer_config(tokenizer))
    if template is not None:
        found = find_template(folder, template, tokenizer.piece(tokenizer.eos_id))
        assert found is not None
        write_file(target / "chat_template.jinja", [found.source.encode()])


def _tokenizer_config(tokenizer: Tokenizer) -> dict[str, Any]:
    special = {"eos_token": tokenizer.piece(tokenizer.eos_id)}
    for key, piece in (("bos_token", "<s>"), ("unk_token", "<unk>"), ("pad_token", "<pad>")):
        if tokenizer.piece_id(piece) is not None:
            special[key] = piece
    fast = (tokenizer.folder / "tokenizer.json").is_file()
    kind = "PreTrainedTokenizerFast" if fast else "LlamaTokenizer"
    return {"tokenizer_class": kind, **special} | ({} if fast else {"legacy": False, "add_bos_token": False})

"""``llmrecipes convert from-hf``: a Hugging Face model as a folder that ``fit`` starts from."""

from __future__ import annotations

from dataclasses import asdict, replace
from functools import partial
from pathlib import Path

import yaml

from llmrecipes.checkpoint.durable import write_file
from llmrecipes.convert.families import READ_ONLY
from llmrecipes.convert.folder import MODEL_FILE, OurTensors, Source, open_source
from llmrecipes.convert.tokenizer_files import check_tokenizer, copy_tokenizer, generation_config
from llmrecipes.convert.verify import verify_logits
from llmrecipes.convert.writing import Planned, new_folder, write_json, write_origin, write_tensors
from llmrecipes.data.tokenizer import Tokenizer
from llmrecipes.errors import UserError
from llmrecipes.recipe.model_config import ModelConfig


def from_hf(src: str, dst: str, vocab_multiple: int = 1, max_shard_gb: float = 5.0) -> None:
    """Read a model of transformers into a folder that `fit` starts from; logits are compared before it is kept.

    Args:
        src: folder with config.json and *.safetensors.
        dst: a folder that does not exist yet.
        vocab_multiple: pad the rows of embedding and head to a multiple of this, for speed.
        max_shard_gb: size of a file, in GB; a larger tensor has a file of its own.
    """
    if max_shard_gb <= 0:
        raise UserError(f"--max_shard_gb {max_shard_gb}: must be larger than 0")
    if vocab_multiple < 1:
        raise UserError(f"--vocab_multiple {vocab_multiple}: must be 1 or more")
    source, target = open_source(Path(src)), Path(dst)
    if not source.hugging_face:
        raise UserError(f"{src}: no Hugging Face folder (no config.json in it), but one of this project's own")
    source.config = replace(source.config, vocab_multiple=vocab_multiple)
    planned = plan(source)
    tokenizer = check_tokenizer(source, source.tokenizer) if source.tokenizer else None
    total = sum(tensor.bytes for tensor in planned)
    print(f"{src}: {source.hf['model_type']}, {source.config.num_params:,} parameters, {total / 1e9:.2f} GB")
    if source.left_out:
        print(f"config.json: left out, because it changes no logits: {', '.join(source.left_out)}")
    with new_folder(target, total) as folder:
        write_tensors(folder, planned, int(max_shard_gb * 1e9))
        write_model_folder(folder, target, source, tokenizer)
        write_origin(folder, "convert from-hf", src)
        checked = _compare(folder, Path(src), source)
    print(f"wrote {target}: {checked}")
    print(how_to_train(target))


def how_to_train(target: Path) -> str:
    """The command that goes on from a folder."""
    return f"train on from it: llmrecipes fit --config YOUR_RECIPE.yaml --config {target / MODEL_FILE}"


def _compare(folder: Path, src: Path, source: Source) -> str:
    if source.hf_names in READ_ONLY:
        return f"NOT compared with transformers, which has no code for {source.hf_names} of its own"
    return f"logits equal transformers' to {verify_logits(open_source(folder), src):.1e}"


def plan(source: Source) -> list[Planned]:
    """Every tensor of ours, none of which was read yet.

    Raises:
        UserError: the files do not fit config.json.
    """
    ours = OurTensors(source)
    return [Planned(name, ours.dtype(name), shape, partial(ours.read, name)) for name, shape in ours.shapes.items()]


def write_model_folder(folder: Path, target: Path, source: Source, tokenizer: Tokenizer | None) -> None:
    """Everything beside the tensors.

    Args:
        folder: to write to. target: the name it will have. source: what it was made of.
    """
    generation = generation_config(source, tokenizer)
    if generation:
        write_json(folder / "generation_config.json", generation)
    if tokenizer is not None:
        copy_tokenizer(tokenizer.folder, folder, tokenizer)
    text = recipe_part(source.config, target, with_tokenizer=tokenizer is not None)
    write_file(folder / MODEL_FILE, [text.encode()])


def recipe_part(config: ModelConfig, target: Path, with_tokenizer: bool) -> str:
    """``model.yaml``: the part of a recipe that says what to train and from where."""
    sizes = asdict(config)
    if config.lora is None:
        del sizes["lora"]  # a recipe that adds adapters to this model keeps its own
    arguments = {"config": sizes, "expected_params": config.num_params, "init_from": str(target)}
    recipe: dict[str, object] = {"model": {"init_args": arguments}}
    if with_tokenizer:
        recipe["data"] = {"init_args": {"tokenizer": str(target)}}
    head = (
        "# Which model, and where its weights are: to be given beside a recipe that says the rest,\n"
        f"# llmrecipes fit --config YOUR_RECIPE.yaml --config {target / MODEL_FILE}\n"
    )
    return head + yaml.safe_dump(recipe, sort_keys=False, allow_unicode=True)

"""``llmrecipes convert to-hf``: a trained model as a Hugging Face folder."""

from __future__ import annotations

from functools import partial
from pathlib import Path
from typing import Literal

import torch
from torch import Tensor

from llmrecipes.convert.config_out import config_to_hf
from llmrecipes.convert.families import hf_family
from llmrecipes.convert.folder import OurTensors, Source, open_source
from llmrecipes.convert.names import Part, has_no_twin, parts
from llmrecipes.convert.tokenizer_files import check_tokenizer, copy_tokenizer, generation_config, special_ids
from llmrecipes.convert.verify import verify_logits
from llmrecipes.convert.weights import refuse_balancing_bias
from llmrecipes.convert.writing import Planned, new_folder, write_json, write_tensors
from llmrecipes.errors import UserError

DTYPES = {"float32": torch.float32, "bfloat16": torch.bfloat16, "float16": torch.float16}


def to_hf(
    src: str,
    dst: str,
    dtype: Literal["float32", "bfloat16", "float16"] | None = None,
    tokenizer: str | None = None,
    max_seq_len: int | None = None,
    max_shard_gb: float = 5.0,
) -> None:
    """Write a model as transformers and all that build on it load it; logits are compared before it is kept.

    Args:
        src: a run, a checkpoint, or a folder of consolidate, from-hf or upcycle.
        dst: a folder that does not exist yet.
        dtype: of the weights; default: as they are.
        tokenizer: folder of the tokenizer; default: the run's own.
        max_seq_len: longest text to declare; default: the one trained with.
        max_shard_gb: size of a file, in GB; a larger tensor has a file of its own.
    """
    if max_shard_gb <= 0:
        raise UserError(f"--max_shard_gb {max_shard_gb}: must be larger than 0")
    if Path(dst).exists():
        raise UserError(f"{dst} exists already; name a new folder, or remove it")
    if (Path(src) / "config.json").exists():
        raise UserError(f"{src} is a Hugging Face folder already; from-hf reads it, to-hf writes one of ours")
    source, wanted = open_source(Path(src)), DTYPES[dtype] if dtype else None
    if tokenizer is not None:
        source.tokenizer = Path(tokenizer)
    hf, planned = config_to_hf(source.config, max_seq_len or source.max_seq_len), plan(source, wanted)
    checked = check_tokenizer(source, source.tokenizer) if source.tokenizer else None
    generation = generation_config(source, checked)
    hf |= special_ids(generation) | _dtype_keys(planned)
    total = sum(tensor.bytes for tensor in planned)
    print(f"{source.folder}: {hf['model_type']}, {len(planned)} tensors, {total / 1e9:.2f} GB")
    with new_folder(Path(dst), total) as folder:
        write_tensors(folder, planned, int(max_shard_gb * 1e9))
        write_json(folder / "config.json", hf)
        if generation:
            write_json(folder / "generation_config.json", generation)
        if checked is not None and source.tokenizer is not None:
            copy_tokenizer(source.tokenizer, folder, checked, source.template)
        difference = verify_logits(source, folder, wanted)
    print(f"wrote {dst}: logits equal transformers' to {difference:.1e}; {_tokenizer_words(source)}")


def plan(source: Source, dtype: torch.dtype | None) -> list[Planned]:
    """Every tensor of the Hugging Face folder, none of which was read yet.

    Raises:
        UserError: the model has no twin, or its files do not fit it.
    """
    family, ours = hf_family(source.config), OurTensors(source)
    if not source.hugging_face:
        refuse_balancing_bias(family, {name: ours.read(name) for name in ours.shapes if has_no_twin(name)})
    planned = []
    for part in parts(source.config):
        kind = dtype or ours.dtype(part.ours)
        shape = part.to_theirs(part.rows_of(torch.empty(ours.shapes[part.ours], device="meta"))).shape
        make = partial(_make, ours, part, kind)
        planned.append(Planned(part.theirs, kind, shape, make))
    return planned


def _make(ours: OurTensors, part: Part, dtype: torch.dtype) -> Tensor:
    """Their tensor; only the rows that it is of ours are read, where ours lies as such."""
    if ours.found:
        rows = part.rows_of(ours.read(part.ours))
    else:
        rows = ours.source.files.read(part.ours, part.expert, part.begin, part.end)
    return part.to_theirs(rows).to(dtype)


def _dtype_keys(planned: list[Planned]) -> dict[str, str]:
    """What transformers 4 and 5 call the type of the weights."""
    kinds = {tensor.dtype for tensor in planned}
    name = str(max(kinds, key=lambda kind: kind.itemsize)).removeprefix("torch.")
    return {"dtype": name, "torch_dtype": name}


def _tokenizer_words(source: Source) -> str:
    if source.tokenizer is None:
        return "WITHOUT a tokenizer, none was found: name it with --tokenizer"
    return f"tokenizer of {source.tokenizer}"

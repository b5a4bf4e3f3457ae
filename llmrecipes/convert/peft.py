"""Adapters in PEFT's format, out and in: `adapter_config.json` and `adapter_model.safetensors`.

``llmrecipes convert to-peft`` writes what `PeftModel.from_pretrained` loads over the base model;
``llmrecipes convert from-peft`` lays such an adapter over a model of ours.
"""

from __future__ import annotations

from collections.abc import Iterator, Mapping
from dataclasses import replace
from functools import partial
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from llmrecipes.convert.folder import OurTensors, Source, json_file, open_source
from llmrecipes.convert.from_hf import how_to_train, write_model_folder
from llmrecipes.convert.names import our_shapes
from llmrecipes.convert.tokenizer_files import check_tokenizer
from llmrecipes.convert.weight_files import WeightFiles
from llmrecipes.convert.writing import Planned, new_folder, write_json, write_tensors
from llmrecipes.errors import UserError
from llmrecipes.models.lora import THEIRS, is_adapter
from llmrecipes.recipe.lora_config import LoraConfig
from llmrecipes.recipe.model_config import ModelConfig

CONFIG_FILE, WEIGHT_FILE = "adapter_config.json", "adapter_model.safetensors"
_PREFIX = "base_model.model."
# Keys that are used, and those that say nothing about the arithmetic; any other must be empty.
_USED = {"peft_type", "r", "lora_alpha", "lora_dropout", "use_rslora", "target_modules", "bias", "init_lora_weights"}
_SILENT = {
    "auto_mapping",
    "base_model_name_or_path",
    "inference_mode",
    "layers_pattern",
    "loftq_config",
    "megatron_core",
    "peft_version",
    "qalora_group_size",
    "revision",
    "runtime_config",
    "task_type",
}
# Initial values that leave the base weights alone; others (pissa, olora, loftq) subtract something from them.
_INITIAL = (True, False, None, "gaussian", "eva", "orthogonal")


def peft_names(config: ModelConfig) -> dict[str, str]:
    """Our names of one adapter's tensors -> PEFT's."""
    names = {}
    for layer in range(config.num_layers):
        chosen = config.adapted(layer)
        for part, theirs in THEIRS.items():
            if theirs not in chosen:
                continue
            ours = f"layers.{layer}.{_FUSED[part]}.lora.{part}"
            for a_or_b in "ab":
                name = f"{_PREFIX}model.layers.{layer}.{theirs}.lora_{a_or_b.upper()}.weight"
                names[f"{ours}.{a_or_b}"] = name
    if config.maps_in != 2:  # up stands alone
        names = {name.replace("mlp.gate_up.", "mlp.up."): theirs for name, theirs in names.items()}
    return names


_FUSED = {
    "q": "attention.qkv",
    "k": "attention.qkv",
    "v": "attention.qkv",
    "o": "attention.out",
    "gate": "mlp.gate_up",
    "up": "mlp.gate_up",
    "down": "mlp.down",
}


def to_peft(src: str, dst: str, base_model: str | None = None, dtype: str | None = None) -> None:
    """Write a trained adapter as PEFT loads it, and read it again.

    Args:
        src: a run of LoraExpertModule, a checkpoint of it, or a folder with one adapter.
        dst: a folder that does not exist yet.
        base_model: name or folder of the Hugging Face model beneath, to be written down for those who load it.
        dtype: float32, bfloat16 or float16; default: as it is.
    """
    if Path(dst).exists():
        raise UserError(f"{dst} exists already; name a new folder, or remove it")
    source, ours = (opened := open_adapted(Path(src))), OurTensors(opened)
    kind = None if dtype is None else getattr(torch, dtype, None)
    if dtype is not None and kind not in (torch.float32, torch.bfloat16, torch.float16):
        raise UserError(f"--dtype {dtype}: one of float32, bfloat16, float16")
    planned = [
        Planned(theirs, kind or ours.dtype(name), ours.shapes[name], partial(_cast, ours, name, kind))
        for name, theirs in peft_names(source.config).items()
    ]
    with new_folder(Path(dst), sum(tensor.bytes for tensor in planned)) as folder:
        write_tensors(folder, planned, max_bytes=2**62)
        (folder / "model.safetensors").rename(folder / WEIGHT_FILE)
        write_json(folder / CONFIG_FILE, config_to_peft(source.config, base_model))
        again = read_peft(folder, replace(source.config, lora=None))
        assert again.config.lora is not None
        if again.config.adapted(0).keys() != source.config.adapted(0).keys():
            raise UserError(
                f"{dst}: read again, it is on other linear maps; nothing was kept. Please report lora.targets"
            )
    print(f"wrote {dst}: {len(planned) // 2} pairs of matrices, {sum(t.bytes for t in planned) / 1e6:.1f} MB; "
          "PeftModel.from_pretrained(base, folder) loads it")  # fmt: skip


def _cast(ours: OurTensors, name: str, dtype: torch.dtype | None) -> Tensor:
    tensor = ours.read(name)
    return tensor if dtype is None else tensor.to(dtype)


def open_adapted(path: Path) -> Source:
    """A model of ours with one adapter.

    Raises:
        UserError: it has none, or several.
    """
    source = open_source(path)
    if source.config.lora is None:
        raise UserError(f"{path}: the model has no adapter (config.lora)")
    if source.config.lora.experts is not None:
        raise UserError(f"{path}: the model has several adapters and routers; PEFT knows one adapter at a time")
    if source.config.norm != "rms":
        raise UserError(f"{path}: adapters of GPT-2 and BLOOM have other names in PEFT; they are not written")
    return source


def config_to_peft(config: ModelConfig, base_model: str | None = None) -> dict[str, Any]:
    """``adapter_config.json`` of the one adapter of ``config``."""
    lora = config.lora
    assert lora is not None
    layers = [sorted(name.rpartition(".")[2] for name in config.adapted(i)) for i in range(config.num_layers)]
    # A list of last names is what other tools understand; where layers differ, only the expression says it.
    same = all(names == layers[0] for names in layers)
    return {
        "peft_type": "LORA",
        "task_type": "CAUSAL_LM",
        "base_model_name_or_path": base_model,
        "inference_mode": True,
        "r": lora.rank,
        "lora_alpha": lora.alpha,
        "lora_dropout": lora.dropout,
        "use_rslora": lora.rank_stabilized,
        "use_dora": False,
        "fan_in_fan_out": False,
        "bias": "none",
        "init_lora_weights": True,
        "modules_to_save": None,
        "target_modules": layers[0] if same else lora.targets,
    }


class PeftAdapter:
    """An adapter in PEFT's format over a model of ours, of which nothing but headers was read.

    Attributes:
        config: the model's, with ``lora``.
        names: our names -> those in the file.
        files: the tensors.

    Args:
        folder: with adapter_config.json.
        base: the model beneath.

    Raises:
        UserError: it is no adapter, of a kind that is not plain LoRA, or does not fit the model.
    """

    def __init__(self, folder: Path, base: ModelConfig) -> None:
        peft = json_file(folder / CONFIG_FILE)
        problems = list(_not_plain(peft))
        if problems:
            raise UserError(*(f"{folder / CONFIG_FILE}: {problem}" for problem in problems))
        self.config = replace(base, lora=_lora_of(peft))
        self.names = peft_names(self.config)
        self.files = WeightFiles(folder)
        shapes = our_shapes(self.config)
        expected = {theirs: tuple(shapes[ours]) for ours, theirs in self.names.items()}
        found = {name: tuple(shape) for name, shape in self.files.shapes.items()}
        differences = [f"{folder} lacks {name}" for name in expected.keys() - found.keys()]
        differences += [
            f"{folder} holds {name}, for which there is no place" for name in found.keys() - expected.keys()
        ]
        for name in expected.keys() & found.keys():
            if expected[name] != found[name]:
                differences.append(
                    f"{folder}: {name} is {list(found[name])}, the model makes it {list(expected[name])}"
                )
        if differences:
            raise UserError(*sorted(differences))

    def read(self, name: str) -> Tensor:
        """A tensor by our name."""
        return self.files.read(self.names[name])

    def dtype(self, name: str) -> torch.dtype:
        """Its type."""
        return self.files.tensors[self.names[name]].dtype


def read_peft(folder: Path, base: ModelConfig) -> PeftAdapter:
    """Open an adapter of PEFT for a model without one.

    Raises:
        UserError: see `PeftAdapter`.
    """
    if base.lora is not None:
        raise UserError(f"{folder}: the model beneath has an adapter already; fold it first (llmrecipes merge fold)")
    return PeftAdapter(folder, base)


def _not_plain(peft: Mapping[str, Any]) -> Iterator[str]:
    for key, value in peft.items():
        if key not in _USED | _SILENT and value not in (None, False) and value not in ([], {}):
            yield f"{key}: {value} is not supported"
    if peft.get("peft_type") != "LORA" or peft.get("bias", "none") not in ("none", None):
        yield f"peft_type {peft.get('peft_type')} with bias {peft.get('bias')}: only LORA without biases is supported"
    if peft.get("init_lora_weights", True) not in _INITIAL:
        yield f"init_lora_weights: {peft['init_lora_weights']} changes the base weights too: convert it with PEFT first"
    if not isinstance(peft.get("r"), int) or not isinstance(peft.get("lora_alpha"), int | float):
        yield "no r or no lora_alpha in it"
    if not isinstance(peft.get("target_modules"), str | list):
        yield "no target_modules in it"


def _lora_of(peft: Mapping[str, Any]) -> LoraConfig:
    targets = peft["target_modules"]
    if isinstance(targets, list):
        targets = rf"(.*\.)?({'|'.join(sorted(targets))})"  # as PEFT: the last names, at any place
    return LoraConfig(
        rank=peft["r"],
        alpha=peft["lora_alpha"],
        dropout=peft.get("lora_dropout") or 0.0,
        targets=targets,
        rank_stabilized=bool(peft.get("use_rslora")),
    )


def adapter_state(config: ModelConfig, state: Mapping[str, Tensor]) -> dict[str, Tensor]:
    """Tensors of ``adapter_model.safetensors`` from a decoder's state."""
    return {theirs: state[ours].detach().clone() for ours, theirs in peft_names(config).items()}


def from_peft(adapter: str, base: str, dst: str, max_shard_gb: float = 5.0) -> None:
    """Lay an adapter of PEFT over a model: a folder that `fit`, `generate` and `merge` take.

    Args:
        adapter: folder with adapter_config.json and adapter_model.safetensors.
        base: the model that it was trained on: of Hugging Face or ours.
        dst: a folder that does not exist yet.
        max_shard_gb: size of a file, in GB.
    """
    if max_shard_gb <= 0:
        raise UserError(f"--max_shard_gb {max_shard_gb}: must be larger than 0")
    source = open_source(Path(base))
    beneath, peft = OurTensors(source), read_peft(Path(adapter), source.config)
    planned = []
    for name, shape in our_shapes(peft.config).items():
        holder: Any = peft if is_adapter(name) else beneath
        planned.append(Planned(name, holder.dtype(name), shape, partial(holder.read, name)))
    tokenizer = check_tokenizer(source, source.tokenizer) if source.tokenizer else None
    with new_folder(Path(dst), sum(tensor.bytes for tensor in planned)) as folder:
        write_tensors(folder, planned, int(max_shard_gb * 1e9))
        write_model_folder(folder, Path(dst), replace(source, config=peft.config), tokenizer)
    print(f"wrote {dst}: {len(peft.names) // 2} pairs of matrices over {base}, every tensor compared")
    print(how_to_train(Path(dst)))

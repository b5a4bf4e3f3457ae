"""Where a model lies: a Hugging Face folder, a folder of ours, a consolidated folder, a checkpoint or a run."""

from __future__ import annotations

import json
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any, NamedTuple

import torch
import yaml
from torch import Tensor

from llmrecipes.checkpoint import read_info, weight_folders
from llmrecipes.convert.config_in import read_config
from llmrecipes.convert.consolidate import find_checkpoint
from llmrecipes.convert.names import Part, has_no_twin, our_shapes
from llmrecipes.convert.weight_files import WeightFiles
from llmrecipes.convert.weights import find_parts, join, refuse_impossible
from llmrecipes.errors import UserError
from llmrecipes.models import Decoder
from llmrecipes.recipe.model_config import ModelConfig
from llmrecipes.recipe.rules.model import build_config

MODEL_FILE = "model.yaml"
TOKENIZER_FILES = (
    "tokenizer.json",
    "tokenizer.model",
    "tokenizer_config.json",
    "special_tokens_map.json",
    "added_tokens.json",
    "vocab.json",
    "vocab.txt",
    "merges.txt",
    "chat_template.jinja",
    "chat_template.json",
)


@dataclass
class Source:
    """A model on disk, of which nothing but headers was read.

    Attributes:
        folder: as found: of the files, or the checkpoint.
        config: the decoder.
        files: its tensors.
        hugging_face: whether these have Hugging Face's names, else ours.
        hf: the parsed config.json; {} elsewhere.
        tokenizer: folder of the tokenizer; None when there is none.
        generation: the parsed generation_config.json; {} when there is none.
        max_seq_len: longest text it was trained for, when known.
        shards: prefixes of the token shards it was trained on, when known.
        left_out: keys of config.json that change no logits and are not known here.
        template: chat template that it was fine-tuned with, where that is not the tokenizer's own: a name or a file.
    """

    folder: Path
    config: ModelConfig
    files: WeightFiles
    hugging_face: bool = False
    hf: dict[str, Any] = field(default_factory=dict)
    tokenizer: Path | None = None
    generation: dict[str, Any] = field(default_factory=dict)
    max_seq_len: int | None = None
    shards: list[str] = field(default_factory=list)
    left_out: list[str] = field(default_factory=list)
    template: str | None = None

    @property
    def hf_names(self) -> str | None:
        """The family whose names the files have: not always the one that the decoder is exported as."""
        return self.hf.get("model_type")


class LoadedModel(NamedTuple):
    """A model in memory.

    Attributes:
        config, model: the decoder, with its weights, in evaluation mode.
        tokenizer: folder of the tokenizer; None when there is none.
        eos_ids: ids that end a text, of generation_config.json or config.json; [] when unknown.
        max_seq_len: longest text it was trained for, when known.
        vocab_rows: ids that exist; None = all that the decoder gives logits for.
        template: chat template that it was fine-tuned with, where that is not the tokenizer's own.
    """

    config: ModelConfig
    model: Decoder
    tokenizer: Path | None
    eos_ids: list[int]
    max_seq_len: int | None
    vocab_rows: int | None
    template: str | None = None


def read_model(folder: str | Path, dtype: torch.dtype | None = None, device: torch.device | str = "cpu") -> LoadedModel:
    """Load a model from wherever it lies.

    Args:
        folder: of Hugging Face, of ``convert from-hf`` or ``upcycle``, of ``consolidate``, a checkpoint, or a run.
        dtype: of the parameters; None = as on disk.
        device: where to.

    Raises:
        UserError: no model there, damaged, or of a family that is not supported.
    """
    source = open_source(Path(folder))
    ends = source.generation.get("eos_token_id", source.hf.get("eos_token_id"))
    eos_ids = [] if ends is None else [int(i) for i in (ends if isinstance(ends, list) else [ends])]
    model = load_decoder(source, dtype).to(device)
    return LoadedModel(source.config, model, source.tokenizer, eos_ids, source.max_seq_len, None, source.template)


def open_source(path: Path) -> Source:
    """Find out what lies at ``path``.

    Raises:
        UserError: no model.
    """
    if not path.is_dir():
        raise UserError(f"{path}: no such folder")
    if (path / MODEL_FILE).exists() or ((path / "recipe.yaml").exists() and any(path.glob("*.safetensors"))):
        return _ours(path)
    if (path / "config.json").exists():
        return _hugging_face(path)
    return _checkpoint(find_checkpoint(path))


def _hugging_face(path: Path) -> Source:
    hf = json_file(path / "config.json")
    config, left_out = read_config(hf)
    return Source(
        path,
        config,
        WeightFiles(path),
        left_out=left_out,
        hugging_face=True,
        hf=hf,
        tokenizer=path if _has_tokenizer(path) else None,
        generation=json_file(path / "generation_config.json") if (path / "generation_config.json").exists() else {},
        max_seq_len=config.max_seq_len,
    )


def _ours(path: Path) -> Source:
    """What from-hf, upcycle and consolidate write."""
    recipe = _yaml(path / MODEL_FILE if (path / MODEL_FILE).exists() else path / "recipe.yaml")
    config = _config(recipe, path)
    source = _from_recipe(Source(path, config, WeightFiles(path)), recipe)
    if _has_tokenizer(path):
        source.tokenizer = path
    if (path / "generation_config.json").exists():
        source.generation = json_file(path / "generation_config.json")
    return source


def _checkpoint(path: Path) -> Source:
    """What training writes: the checkpoint itself records its model, the run's recipe beside it the tokenizer."""
    recipe_file = path.parent.parent / "recipe.yaml"
    recipe = _yaml(recipe_file) if recipe_file.exists() else {}
    recorded = (read_info(path).get("progress") or {}).get("trajectory") or {}
    config = _config({"model": {"init_args": recorded["model"]}} if "model" in recorded else recipe, path)
    return _from_recipe(Source(path, config, WeightFiles(*weight_folders(path))), recipe)


def _from_recipe(source: Source, recipe: dict[str, Any]) -> Source:
    data = (recipe.get("data") or {}).get("init_args") or {}
    tokenizer = data.get("tokenizer")
    if isinstance(tokenizer, str) and _has_tokenizer(Path(tokenizer)):
        source.tokenizer = Path(tokenizer)
    source.template = data.get("template")
    source.shards = list(data["train"]) if isinstance(data.get("train"), dict) else []
    source.max_seq_len = source.config.max_seq_len or data.get("seq_len")
    return source


def _config(recipe: dict[str, Any], path: Path) -> ModelConfig:
    try:
        return build_config(recipe["model"]["init_args"]["config"])
    except (KeyError, TypeError, ValueError) as error:
        raise UserError(f"{path}: the recipe beside it does not describe the model: {error}") from None


def load_decoder(source: Source, dtype: torch.dtype | None = None) -> Decoder:
    """The model with its weights, in evaluation mode.

    Raises:
        UserError: tensors are missing, left over or of another shape; all are named.
    """
    with torch.device("meta"):
        model = Decoder(source.config)
    tensors = OurTensors(source)
    state = {}
    for name in tensors.shapes:
        # The router's balancing bias has a type of its own.
        tensor = tensors.read(name)
        state[name] = tensor if dtype is None or has_no_twin(name) else tensor.to(dtype)
    model.load_state_dict(state, assign=True)
    return model.eval()


class OurTensors:
    """The tensors of a decoder, put together one by one from wherever they lie.

    Attributes:
        shapes: of every tensor, by name.

    Raises:
        UserError: tensors are missing, left over or of another shape; all are named.
    """

    def __init__(self, source: Source) -> None:
        self.source = source
        if source.hugging_face:
            refuse_impossible(source.config, source.files.tensors)
        self.shapes = our_shapes(source.config)
        self.found: dict[str, list[tuple[Part, str]]] = {}
        if source.hugging_face:
            self.found = find_parts(source.config, source.files.tensors, source.hf_names)
        else:
            check_names(source)

    def dtype(self, name: str) -> torch.dtype:
        """Its type on disk."""
        if has_no_twin(name):
            return torch.float32
        stored = [theirs for _, theirs in self.found[name]] if self.found else [name]
        kinds = {self.source.files.tensors[one].dtype for one in stored}
        if len(kinds) > 1:
            raise UserError(f"{self.source.folder}: parts of {name} have different types: {sorted(map(str, kinds))}")
        return kinds.pop()

    def read(self, name: str) -> Tensor:
        """The whole tensor, in new memory."""
        files = self.source.files
        if not self.found:
            return files.read(name)
        if has_no_twin(name):
            return torch.zeros(self.shapes[name])
        pieces = self.found[name]
        part, theirs = pieces[0]
        if len(pieces) == 1 and part.layout == "same" and files.shapes[theirs] == self.shapes[name]:
            return files.read(theirs)
        return join(self.shapes[name], [(part, files.read(theirs)) for part, theirs in pieces])


def check_names(source: Source) -> None:
    """Refuse files of ours that do not fit the configuration.

    Raises:
        UserError: names or shapes differ; all are named.
    """
    expected, found = our_shapes(source.config), source.files.shapes
    problems = [f"{source.folder} lacks {name}" for name in expected if name not in found]
    problems += [f"{source.folder} holds {name}, unknown to its model" for name in found if name not in expected]
    for name in expected.keys() & found.keys():
        if expected[name] != found[name]:
            problems.append(f"{source.folder}: {name} is {list(found[name])}, not {list(expected[name])}")
    if problems:
        raise UserError(*sorted(problems))


def _has_tokenizer(path: Path) -> bool:
    return any((path / name).is_file() for name in ("tokenizer.json", "tokenizer.model"))


def json_file(path: Path) -> dict[str, Any]:
    """The mapping in a JSON file.

    Raises:
        UserError: not readable, or something else.
    """
    try:
        content = json.loads(path.read_text(encoding="utf-8"))
    except (OSError, ValueError, RecursionError) as error:
        raise UserError(f"{path}: not readable: {error}") from None
    if not isinstance(content, dict):
        raise UserError(f"{path}: not a mapping")
    return content


def _yaml(path: Path) -> dict[str, Any]:
    try:
        content = yaml.safe_load(path.read_text(encoding="utf-8"))
    except (OSError, yaml.YAMLError) as error:
        raise UserError(f"{path}: not readable: {error}") from None
    if not isinstance(content, dict):
        raise UserError(f"{path}: not a recipe")
    return content

"""Models put together tensor by tensor: adapters laid over a model, folded into it, several models side by side.

A reader knows the names, shapes and types of a decoder's tensors and makes one when it is asked for.
"""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import replace
from pathlib import Path
from typing import Protocol

import torch
from torch import Tensor

from llmrecipes.convert.folder import OurTensors, Source, open_source
from llmrecipes.convert.names import has_no_twin, our_shapes
from llmrecipes.convert.peft import CONFIG_FILE, PeftAdapter, read_peft
from llmrecipes.convert.writing import Planned
from llmrecipes.errors import UserError
from llmrecipes.models import Decoder
from llmrecipes.models.lora import is_adapter
from llmrecipes.recipe.model_config import ModelConfig


class Reader(Protocol):
    """The tensors of a decoder."""

    @property
    def config(self) -> ModelConfig:
        """The decoder."""

    @property
    def shapes(self) -> Mapping[str, torch.Size]:
        """Of every tensor, by our names."""

    def dtype(self, name: str) -> torch.dtype:
        """Type of a tensor."""

    def read(self, name: str) -> Tensor:
        """A tensor, in new memory."""


class OnDisk(OurTensors):
    """A model as it lies on disk."""

    @property
    def config(self) -> ModelConfig:
        """The decoder."""
        return self.source.config


class Adapted:
    """An adapter of PEFT over a model."""

    def __init__(self, base: Reader, adapter: PeftAdapter) -> None:
        self.base, self.adapter, self.config = base, adapter, adapter.config
        self.shapes = our_shapes(self.config)

    def dtype(self, name: str) -> torch.dtype:
        """Type of a tensor."""
        return self.adapter.dtype(name) if is_adapter(name) else self.base.dtype(name)

    def read(self, name: str) -> Tensor:
        """A tensor, in new memory."""
        return self.adapter.read(name) if is_adapter(name) else self.base.read(name)


class Folded:
    """A model with one adapter as a dense one: ``W + scale B A``, computed in fp32 at least, in the type of W.

    Args:
        expert: of several adapters, which; None = the only one, or with several the null expert: W as it is.
    """

    def __init__(self, adapted: Reader, expert: int | None = None) -> None:
        assert adapted.config.lora is not None
        self.adapted, self.expert, self.lora = adapted, expert, adapted.config.lora
        self.config = replace(adapted.config, lora=None)
        self.shapes = our_shapes(self.config)

    def dtype(self, name: str) -> torch.dtype:
        """Type of a tensor."""
        return self.adapted.dtype(name)

    def read(self, name: str) -> Tensor:
        """A tensor, in new memory."""
        weight = self.adapted.read(name)
        if self.lora.experts is not None and self.expert is None:
            return weight
        begin = 0
        for part, a_name, size in self._parts(name):
            if a_name is not None:
                a, b = (self._one(a_name[:-1] + kind).to(self.wide(weight)) for kind in ("a", "b"))
                rows = weight[begin : begin + size]
                rows.copy_(rows.to(a.dtype) + self.lora.scale * (b @ a))
                assert rows.shape == (b.shape[0], a.shape[1]), part
            begin += size
        return weight

    @staticmethod
    def wide(weight: Tensor) -> torch.dtype:
        """In which products are computed."""
        return torch.promote_types(weight.dtype, torch.float32)

    def _one(self, name: str) -> Tensor:
        tensor = self.adapted.read(name)
        return tensor if tensor.ndim == 2 else tensor[self.expert]

    def _parts(self, name: str) -> list[tuple[str, str | None, int]]:
        """Parts of a fused map: name, its adapter's A if there is one, rows."""
        owner, _, kind = name.rpartition(".")
        config = self.config
        q, kv, ffn = config.num_heads * config.head_width, config.kv_heads * config.head_width, config.ffn_dim or 0
        sizes = {
            "qkv": {"q": q, "k": kv, "v": kv},
            "out": {"o": config.dim},
            "gate_up": {"gate": ffn, "up": ffn},
            "up": {"up": ffn},
            "down": {"down": config.dim},
        }.get(owner.rpartition(".")[2], {})
        if kind != "weight":
            return []
        block = owner.rpartition(".")[0]
        found = []
        for part, size in sizes.items():
            names = (f"{owner}.lora.{part}.a", f"{block}.lora.{part}.a")  # the second: one router per network
            found.append((part, next((n for n in names if n in self.adapted.shapes), None), size))
        return found


class Made:
    """A model that is yet to be written, from its plan."""

    def __init__(self, config: ModelConfig, planned: list[Planned]) -> None:
        self.config = config
        self.planned = {tensor.name: tensor for tensor in planned}
        self.shapes = {name: tensor.shape for name, tensor in self.planned.items()}

    def dtype(self, name: str) -> torch.dtype:
        """Type of a tensor."""
        return self.planned[name].dtype

    def read(self, name: str) -> Tensor:
        """A tensor, in new memory."""
        return self.planned[name].make()


class Networks:
    """One model with the feed-forward networks of another."""

    def __init__(self, around: Reader, networks: Reader) -> None:
        self.around, self.networks, self.config = around, networks, networks.config
        self.shapes = networks.shapes

    def _owner(self, name: str) -> Reader:
        return self.networks if ".mlp." in name else self.around

    def dtype(self, name: str) -> torch.dtype:
        """Type of a tensor."""
        return self._owner(name).dtype(name)

    def read(self, name: str) -> Tensor:
        """A tensor, in new memory."""
        return self._owner(name).read(name)


def open_reader(path: str, base: Reader | None = None) -> Reader:
    """What lies at a path: a model of ours or of Hugging Face, or an adapter of PEFT over ``base``.

    Raises:
        UserError: nothing, or an adapter without a base.
    """
    folder = Path(path)
    if (folder / CONFIG_FILE).is_file():
        if base is None:
            raise UserError(f"{path}: an adapter alone; name the model beneath it")
        return Adapted(base, read_peft(folder, base.config))
    return OnDisk(open_source(folder))


def dense(reader: Reader) -> Reader:
    """The same model without adapters: one adapter is folded into the weights.

    Raises:
        UserError: there are several adapters with routers.
    """
    if reader.config.lora is None:
        return reader
    if reader.config.lora.experts is not None:
        raise UserError("a model with several adapters and routers is no single expert: name its branches")
    return Folded(reader)


def build(reader: Reader) -> Decoder:
    """The decoder with its weights, in evaluation mode."""
    with torch.device("meta"):
        decoder = Decoder(reader.config)
    decoder.load_state_dict({name: reader.read(name) for name in reader.shapes}, assign=True)
    return decoder.eval()


def source_of(reader: Reader) -> Source:
    """Where a model lies: of a reader that lies somewhere."""
    assert isinstance(reader, OnDisk)
    return reader.source


def is_bias(name: str) -> bool:
    """Whether a tensor is a router's balancing bias, which has a type of its own."""
    return has_no_twin(name)

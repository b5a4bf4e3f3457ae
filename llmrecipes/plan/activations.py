"""Activations of one micro-batch, counted by running the real decoder and loss on fake tensors.

No number is computed and no memory taken: every operation only says what shape it gives, and a count is kept of the
bytes that are alive. Checkpointing, the chunked loss, the experts' own backward pass and autocast's copies of weights
are therefore those of the training itself.
"""

from __future__ import annotations

import weakref
from collections.abc import Iterable
from contextlib import nullcontext
from dataclasses import dataclass, replace
from typing import Any

import torch
from torch import Tensor, nn
from torch._subclasses.fake_tensor import FakeTensorMode
from torch.utils._python_dispatch import TorchDispatchMode
from torch.utils._pytree import tree_leaves

from llmrecipes.distributed.recompute import Recompute, recompute_blocks
from llmrecipes.kernels.library import without_kernels
from llmrecipes.losses import label_log_probs, linear_cross_entropy
from llmrecipes.models import Decoder
from llmrecipes.models.dispatch import ROWS_ON_CPU
from llmrecipes.models.moe import Router
from llmrecipes.plan.layout import Layout, assumed_layout
from llmrecipes.plan.memory import Moments
from llmrecipes.plan.sizes import ALL, Trained
from llmrecipes.recipe import ModelConfig

_aten = torch.ops.aten
# Up to so many layers all are run; beyond, two depths are, and what lies between them is the same for every layer.
_WHOLE, _DEPTHS = 8, (3, 5)


@dataclass(frozen=True)
class Step:
    """One micro-batch as a stage runs it.

    Attributes:
        rows, length: B, T.
        recompute: activation checkpointing.
        loss_chunk: rows of logits at a time.
        precision: of the Trainer: ``bf16-mixed``, ``bf16-true``, ``32-true``, ...
        gathered_half: parameters come in bf16 already (sharded training with bf16-mixed).
        preference: log-probabilities of answers instead of the cross-entropy.
        accumulates: gradients of earlier micro-batches are there.
        on_gpu: softmax over whole chunks, not in blocks that fit a CPU's cache.
        trained: which parameters have a gradient.
        layout: how documents and labels fill the rows; None = each row is one document, every token has a label.
    """

    rows: int
    length: int
    recompute: Recompute = "none"
    loss_chunk: int = 1024
    precision: str = "bf16-mixed"
    gathered_half: bool = False
    preference: bool = False
    accumulates: bool = False
    on_gpu: bool = False
    trained: Trained = ALL
    layout: Layout | None = None

    @property
    def half(self) -> torch.dtype | None:
        """Type of the matrix products, where it is not fp32."""
        kinds = {"bf16": torch.bfloat16, "16": torch.float16}
        return kinds.get(self.precision.partition("-")[0])


def count_activations(config: ModelConfig, step: Step) -> int:
    """Bytes beyond weights and gradients at the worst moment of one micro-batch's forward and backward pass.

    Without ``accumulates`` gradients appear while activations go: what they take beyond the weights' size is counted.
    """
    return int(count_moments(config, step).worst)


def count_moments(config: ModelConfig, step: Step) -> Moments:
    """The same for each part of the pass, because what sharded training gathers is not there all the time."""
    layers = config.num_layers
    same = len({_kind(config, i) for i in range(layers)}) == 1
    if layers <= _WHOLE or not same:
        return Moments(**_measure(config, step))
    small, large = (_measure(shortened(config, depth), step) for depth in _DEPTHS)
    steps = (layers - _DEPTHS[1]) / (_DEPTHS[1] - _DEPTHS[0])
    return Moments(**{name: large[name] + (large[name] - small[name]) * steps for name in large})


def _kind(config: ModelConfig, layer: int) -> tuple[Any, ...]:
    return config.moe_of(layer), config.window_of(layer), config.is_rotary_layer(layer)


def shortened(config: ModelConfig, depth: int) -> ModelConfig:
    """The first layers of a model whose layers are all alike."""
    lists = {name: getattr(config, name) for name in ("window_layers", "dense_layers", "nope_layers")}
    cut: dict[str, Any] = {name: [i for i in value if i < depth] for name, value in lists.items() if value is not None}
    moe = config.moe
    if moe is not None and moe.experts_per_layer is not None:
        moe = replace(moe, experts_per_layer=moe.experts_per_layer[: depth // config.moe_every])
    return replace(config, num_layers=depth, moe=moe, **cut)


def _measure(config: ModelConfig, step: Step) -> dict[str, float]:
    as_there = without_kernels() if step.on_gpu else nullcontext()  # fake tensors say that they are on a CPU
    with as_there, FakeTensorMode(allow_non_fake_inputs=True):
        model = Decoder(config).train()
        if step.gathered_half or step.precision.endswith("-true"):
            to_half(model, step)
        step.trained.apply(model)
        recompute_blocks(model, step.recompute)
        tokens = torch.zeros(step.rows, step.length, dtype=torch.int64)
        live = LiveBytes(config, step)
        live.leave_out([tokens, *model.parameters(), *model.buffers()])
        with live:
            if step.accumulates:
                for parameter in model.parameters():
                    if parameter.requires_grad:
                        parameter.grad = torch.empty_like(parameter)
                held = live.now
            else:
                held = 0
            live.moments = {"forward": live.now}
            mark_blocks(model, live)
            run_step(model, tokens, config, step, live)
        before = held if step.accumulates else _grad_bytes(model)
        return {name: peak - before for name, peak in live.moments.items()}


def mark_blocks(model: Decoder, live: LiveBytes) -> None:
    """Tell ``live`` when the backward pass comes to a block."""
    for number, block in enumerate(model.layers):
        name = "last_block" if number == len(model.layers) - 1 else "between" if number else "first_block"
        block.register_forward_hook(lambda _, __, out, name=name: _on_gradient(out[0], live, name))
        if not number:
            block.register_forward_pre_hook(lambda _, inputs: _on_gradient(inputs[0], live, "embedding"))


def _on_gradient(tensor: Tensor, live: LiveBytes, name: str) -> None:
    if tensor.requires_grad:
        tensor.register_hook(lambda _: live.enter(name))


def _grad_bytes(model: nn.Module) -> int:
    return sum(p.grad.numel() * p.grad.element_size() for p in model.parameters() if p.grad is not None)


def to_half(model: nn.Module, step: Step) -> None:
    """Weights as they come to the products: in half precision, routers in fp32 where they are gathered so."""
    if step.half is None:
        return
    for module in model.modules():
        if isinstance(module, Router) and step.gathered_half:
            continue
        for name, parameter in module.named_parameters(recurse=False):
            setattr(module, name, nn.Parameter(torch.empty_like(parameter, dtype=step.half)))


def run_step(model: Decoder, tokens: Tensor, config: ModelConfig, step: Step, live: LiveBytes) -> None:
    """Forward and backward pass of a micro-batch; ``live`` is told when the loss begins."""
    mixed = step.half is not None and step.precision.endswith("-mixed")
    with torch.autocast("cpu", step.half) if mixed else nullcontext():
        layout = (step.layout or assumed_layout(step.length, False, "")).of(step.rows)
        output = model(
            tokens,
            document_lengths=layout.documents,
            document_prefixes=layout.prefixes,
            token_mask=torch.ones_like(tokens, dtype=torch.bool) if layout.masked else None,
        )
        live.enter("loss")
        hidden, labels = output.hidden.flatten(0, 1), tokens.flatten()
        if layout.labels < len(labels):
            labels = labels[: layout.labels]
            hidden = hidden.index_select(0, labels)
        if step.preference:
            loss = label_log_probs(hidden, model.head_weight, labels, step.loss_chunk, config.vocab_size).sum()
        else:
            block = step.loss_chunk if step.on_gpu else None  # fake tensors say that they are on a CPU
            weight = model.head_weight
            loss, _ = linear_cross_entropy(hidden, weight, labels, step.loss_chunk, config.vocab_size, block)
        parts = [loss.float(), *(routing.prob_sum.sum() + routing.z_sum for routing in output.routing)]
        total = torch.stack(parts).sum()
    del output, hidden
    total.backward()


class LiveBytes(TorchDispatchMode):
    """Counts the bytes of all storages made under it that are still alive, and their peak at each moment.

    Operations whose result depends on values, which fake tensors have none of, are answered as in training on full
    rows: all labels count, and experts share tokens evenly.
    """

    def __init__(self, config: ModelConfig, step: Step) -> None:
        super().__init__()
        self.now, self.moment, self.moments = 0, "forward", {"forward": 0}
        self._seen: set[int] = set()
        self._config, self._step = config, step

    def leave_out(self, tensors: Iterable[Tensor]) -> None:
        """Not to be counted: what was there before. A view of it would otherwise pass for something new."""
        self._seen.update(tensor.untyped_storage()._cdata for tensor in tensors)

    def enter(self, moment: str) -> None:
        """Another part of the pass begins."""
        self.moment = moment
        self._note()

    def _note(self, more: int = 0) -> None:
        self.moments[self.moment] = max(self.moments.get(self.moment, 0), self.now + more)

    def __torch_dispatch__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        kwargs = kwargs or {}
        result = self._of_values(func, args, kwargs)
        if result is None:
            result = func(*args, **kwargs)
        for leaf in tree_leaves(result):
            if isinstance(leaf, Tensor):
                self._add(leaf)
        if not self._step.on_gpu and torch.Tag.pointwise in func.tags:
            self._note(_converted(tree_leaves(args)))
        return result

    def _of_values(self, func: Any, args: Any, kwargs: Any) -> Any:
        if func is _aten.nonzero.default:
            return torch.empty(args[0].numel(), args[0].ndim, dtype=torch.int64)
        if func is _aten.bincount.default:
            return torch.empty(kwargs.get("minlength", args[2] if len(args) > 2 else 0), dtype=torch.int64)
        if func is _aten._local_scalar_dense.default:
            return self._padded_pairs()
        if func is _aten._grouped_mm.default:
            return _grouped(args[0], args[1], kwargs.get("offs", args[2] if len(args) > 2 else None))
        return None

    def _padded_pairs(self) -> int:
        """Rows of the sorted token-expert pairs, each expert's block padded: half a block on average."""
        config, lora = self._config, self._config.lora
        if config.moe is not None:
            experts, top_k = max(config.layer_experts), config.moe.top_k
        else:
            assert lora is not None
            assert lora.experts is not None
            experts, top_k = lora.experts.num_choices, lora.experts.top_k
        return self._step.rows * self._step.length * top_k + ROWS_ON_CPU // 2 * experts

    def _add(self, tensor: Tensor) -> None:
        storage = tensor.untyped_storage()
        key, size = storage._cdata, storage.nbytes()
        if key in self._seen:
            return
        self._seen.add(key)
        self.now += size
        self._note()
        weakref.finalize(storage, self._drop, key, size)

    def _drop(self, key: int, size: int) -> None:
        self._seen.discard(key)
        self.now -= size


def _converted(operands: list[Any]) -> int:
    """Bytes of the copies that a CPU makes of operands whose type is not that of the sum (a GPU: on the way)."""
    floats = [x for x in operands if isinstance(x, Tensor) and x.is_floating_point() and x.ndim]
    if len({x.dtype for x in floats}) < 2:
        return 0
    wide = max((x.dtype for x in floats), key=lambda dtype: dtype.itemsize)
    return sum(x.numel() * wide.itemsize for x in floats if x.dtype != wide)


def _grouped(a: Tensor, b: Tensor, offs: Tensor) -> Tensor:
    """The result of a grouped product: its own shape function knows bf16 only."""
    if b.ndim == 3:
        return a.new_empty(a.shape[0], b.shape[2])
    return a.new_empty(offs.shape[0], a.shape[0], b.shape[1])

"""The typed description of a decoder, and all that follows from it by arithmetic. Torch-free: ``check`` uses it too."""

from __future__ import annotations

import math
import re
from dataclasses import dataclass, replace
from typing import Literal

from llmrecipes.recipe.lora_config import LoraConfig
from llmrecipes.recipe.moe_config import MoEConfig
from llmrecipes.recipe.rope_config import RopeScaling

Norm = Literal["rms", "layer"]
Positions = Literal["rope", "alibi", "learned", "none"]
Activation = Literal["swiglu", "geglu", "gelu", "gelu_tanh"]
NormPosition = Literal["pre", "post", "both"]
QKNormScope = Literal["head", "all"]

GATED = ("swiglu", "geglu")


@dataclass(frozen=True, kw_only=True)
class ModelConfig:
    """One configurable decoder: Llama, Qwen, Mixtral, GPT-2 and BLOOM are points in this space.

    Args:
        vocab_size: ids that exist. vocab_multiple: rows of embedding and head are padded to a multiple of this, for
            speed; padded rows take no part in logits and loss, and are stripped on export.
        dim: width of the residual stream.
        num_layers: number of blocks.
        num_heads: query heads.
        num_kv_heads: key/value heads (grouped-query attention); ``null`` = ``num_heads``.
        head_dim: width of a head; ``null`` = ``dim / num_heads``.
        ffn_dim: hidden width of the dense feed-forward network; ``null`` only when every layer is MoE.
        norm: RMSNorm or LayerNorm. norm_eps: its epsilon.
        norm_position: ``pre`` normalises what enters attention and feed-forward network, ``post`` what they give
            (OLMo 2), ``both`` does both (Gemma 3).
        norm_plus_one: RMSNorm multiplies by 1 + weight, which starts at zero (Gemma).
        activation: ``swiglu`` (SiLU) and ``geglu`` (tanh GELU) have gate, up and down; ``gelu`` (exact) and
            ``gelu_tanh`` have up and down.
        parallel_residual: attention and feed-forward network read the same input (GPT-NeoX).
        positions: rotary, ALiBi, learned or none.
        rope_theta: base of the rotary frequencies. rope_scaling: their stretching, or ``null``.
        rotary_fraction: part of each head that is rotated, its first features; the rest has no positions.
        nope_layers: layers without rotary positions, counted from 0 (SmolLM3).
        window_rope_theta: base, without stretching, in layers with a sliding window (Gemma 3); ``null`` = the same.
        sliding_window: tokens that a token sees, itself included; ``null`` = all before it.
        window_layers: layers with that window, counted from 0; ``null`` = all.
        max_seq_len: rows of the position table; needed by ``learned`` only.
        qkv_bias: bias on the query, key and value projections (Qwen). bias: on all other linear maps but experts
            (GPT-2, BLOOM). out_bias: on attention's output projection; ``null`` = as ``bias``.
        qk_norm: normalise queries and keys. qk_norm_scope: each head (Qwen3), or all heads together (OLMoE).
        tie_embeddings: the head is the embedding.
        embedding_norm: a norm right after the embedding (BLOOM).
        embedding_scale: the embedding is multiplied by it (Gemma, Granite). residual_scale: so is each residual branch
            (Granite). attention_scale: of the scores; ``null`` = 1 / sqrt(head width). logit_divisor: of the logits.
        moe: the experts, or ``null`` for a dense model. moe_every: layer i has experts when (i + 1) % moe_every == 0.
        dense_layers: layers without experts all the same, counted from 0.
        lora: low-rank adapters on linear maps, one or many to choose from; ``null`` = none.
        dropout: probability, on the embedding, the attention weights and each residual branch.
        init_std: standard deviation of the initial matrices; ``null`` = sqrt(2 / (5 dim)) (1910.05895). Maps into the
            residual stream have it divided by sqrt(2 num_layers), embeddings and head at most 0.02.
    """

    vocab_size: int
    vocab_multiple: int = 1
    dim: int
    num_layers: int
    num_heads: int
    num_kv_heads: int | None = None
    head_dim: int | None = None
    ffn_dim: int | None = None
    norm: Norm = "rms"
    norm_eps: float = 1e-5
    activation: Activation = "swiglu"
    positions: Positions = "rope"
    rope_theta: float = 10000.0
    rope_scaling: RopeScaling | None = None
    sliding_window: int | None = None
    window_layers: list[int] | None = None
    max_seq_len: int | None = None
    qkv_bias: bool = False
    bias: bool = False
    out_bias: bool | None = None
    qk_norm: bool = False
    qk_norm_scope: QKNormScope = "head"
    tie_embeddings: bool = False
    embedding_norm: bool = False
    moe: MoEConfig | None = None
    moe_every: int = 1
    dense_layers: list[int] | None = None
    lora: LoraConfig | None = None
    dropout: float = 0.0
    init_std: float | None = None
    # Later than the first release: a checkpoint without them has these defaults.
    norm_position: NormPosition = "pre"
    norm_plus_one: bool = False
    parallel_residual: bool = False
    rotary_fraction: float = 1.0
    nope_layers: list[int] | None = None
    window_rope_theta: float | None = None
    embedding_scale: float = 1.0
    residual_scale: float = 1.0
    attention_scale: float | None = None
    logit_divisor: float = 1.0

    def __post_init__(self) -> None:
        problems = list(self.problems())
        if problems:
            raise ValueError("; ".join(problems))

    def problems(self) -> list[str]:
        """What is wrong with the sizes, as sentences; empty when they fit together."""
        found = []
        if self.head_dim is None and self.dim % self.num_heads:
            found.append(f"num_heads {self.num_heads} does not divide dim {self.dim}")
        if self.num_heads % self.kv_heads:
            found.append(f"num_kv_heads {self.kv_heads} does not divide num_heads {self.num_heads}")
        if self.positions == "rope" and (self.rotary_width % 2 or not 1 < self.rotary_width <= self.head_width):
            rotated = "" if self.rotary_fraction == 1 else f" of which rotary_fraction rotates {self.rotary_width}"
            found.append(f"rotary positions need an even head width, not {self.head_width}{rotated}")
        elif self.positions == "rope" and self.rope_scaling is not None:
            found += self.rope_scaling.problems(self.rotary_width)
        for name in ("nope_layers", "window_rope_theta"):
            if getattr(self, name) is not None and self.positions != "rope":
                found.append(f"{name} has no effect without positions: rope")
        if self.window_rope_theta is not None and self.sliding_window is None:
            found.append("window_rope_theta has no effect without sliding_window")
        if self.parallel_residual and self.norm_position != "pre":
            found.append(f"parallel_residual goes with norm_position: pre, not {self.norm_position}")
        if self.norm_plus_one and self.norm != "rms":
            found.append("norm_plus_one goes with norm: rms")
        for name in ("embedding_scale", "residual_scale", "logit_divisor", "attention_scale"):
            value = getattr(self, name)
            if value is not None and not 0 < value < math.inf:
                found.append(f"{name} {value} is not a number above 0")
        if self.ffn_dim is None and any(not self.is_moe_layer(i) for i in range(self.num_layers)):
            found.append("ffn_dim is missing: there are layers without experts")
        found += self._expert_problems()
        if self.positions == "learned" and self.max_seq_len is None:
            found.append("max_seq_len is missing: learned positions need the length of their table")
        if self.sliding_window is not None and self.sliding_window < 1:
            found.append(f"sliding_window {self.sliding_window} is less than 1")
        if self.window_layers is not None and self.sliding_window is None:
            found.append("window_layers has no effect without sliding_window")
        for name in ("window_layers", "dense_layers", "nope_layers"):
            outside = [layer for layer in getattr(self, name) or [] if not 0 <= layer < self.num_layers]
            if outside:
                found.append(f"{name} {outside[0]} is not one of the layers 0 to {self.num_layers - 1}")
        if self.vocab_multiple < 1:
            found.append(f"vocab_multiple {self.vocab_multiple} is less than 1")
        if not 0 <= self.dropout < 1:
            found.append(f"dropout {self.dropout} is not in [0, 1)")
        return found or self._lora_problems()

    def _lora_problems(self) -> list[str]:
        lora = self.lora
        if lora is None:
            return []
        found = lora.problems()
        if found:
            return found
        chosen = [name for layer in range(self.num_layers) for name in self.adapted(layer)]
        if not chosen:
            found.append(f"lora.targets {lora.targets} matches no linear map, such as model.layers.0.mlp.up_proj")
        if lora.experts is not None and self.moe is not None:
            found.append("lora.experts beside moe: a model has experts of one kind")
        if lora.routes_mlps and any(name.startswith("self_attn") for name in chosen):
            found.append(
                "lora.experts.router per_mlp beside adapters on self_attn: they need a router per linear map, "
                "or lora.targets without self_attn"
            )
        return found

    def _expert_problems(self) -> list[str]:
        if self.moe is None:
            return ["dense_layers has no effect without moe"] if self.dense_layers else []
        found = []
        listed = self.moe.experts_per_layer
        if listed is not None and len(listed) != self.num_moe_layers:
            have = self.num_moe_layers
            found.append(f"moe.experts_per_layer names {len(listed)} layers, the model has {have} with experts")
        if self.moe.residual and self.ffn_dim is None:
            found.append("ffn_dim is missing: moe.residual needs the width of the dense network")
        return found

    @property
    def kv_heads(self) -> int:
        """Key/value heads, H_kv."""
        return self.num_kv_heads or self.num_heads

    @property
    def head_width(self) -> int:
        """Width of one head."""
        return self.head_dim or self.dim // self.num_heads

    @property
    def rotary_width(self) -> int:
        """Features of a head that are rotated."""
        return int(self.head_width * self.rotary_fraction)

    def is_rotary_layer(self, layer: int) -> bool:
        """Whether block ``layer`` (from 0) rotates queries and keys."""
        return self.positions == "rope" and layer not in (self.nope_layers or [])

    def uses_window_theta(self, layer: int) -> bool:
        """Whether block ``layer`` (from 0) rotates by the frequencies of ``window_rope_theta``."""
        return self.window_rope_theta is not None and self.window_of(layer) is not None

    @property
    def longest_text(self) -> int | None:
        """Tokens beyond which a text cannot be computed; None = there is no such limit."""
        if self.positions == "learned":
            return self.max_seq_len
        return self.rope_scaling.longest if self.positions == "rope" and self.rope_scaling is not None else None

    @property
    def maps_in(self) -> int:
        """Maps from the residual stream into a feed-forward network: gate and up, or up alone."""
        return 2 if self.activation in GATED else 1

    @property
    def weight_std(self) -> float:
        """Standard deviation of an initial matrix: one number for all widths starts small models far too small."""
        return math.sqrt(2 / (5 * self.dim)) if self.init_std is None else self.init_std

    @property
    def embedding_std(self) -> float:
        """Of the embedding and the head: small, so that the first loss is ln(vocab_size), not more."""
        return min(self.weight_std, 0.02)

    def is_moe_layer(self, layer: int) -> bool:
        """Whether block ``layer`` (from 0) holds experts."""
        listed = self.dense_layers or []
        return self.moe is not None and (layer + 1) % self.moe_every == 0 and layer not in listed

    def window_of(self, layer: int) -> int | None:
        """How many tokens a token of block ``layer`` sees, itself included; None = all before it."""
        return self.sliding_window if self.window_layers is None or layer in self.window_layers else None

    @property
    def vocab_rows(self) -> int:
        """Rows of embedding and head, padding included."""
        return -(-self.vocab_size // self.vocab_multiple) * self.vocab_multiple

    @property
    def has_out_bias(self) -> bool:
        """Whether attention's output projection has a bias."""
        return self.bias if self.out_bias is None else self.out_bias

    @property
    def num_moe_layers(self) -> int:
        """Blocks that hold experts."""
        return sum(self.is_moe_layer(i) for i in range(self.num_layers))

    @property
    def routing(self) -> MoEConfig | None:
        """How tokens choose experts, of whichever kind they are; None = there are none."""
        experts = None if self.lora is None else self.lora.experts
        if self.moe is not None or experts is None:
            return self.moe
        assert self.lora is not None
        return MoEConfig(
            num_experts=experts.num_choices,
            ffn_dim=self.lora.rank,
            top_k=experts.top_k,
            balance=experts.balance,
            balance_coef=experts.balance_coef,
            balance_counts=experts.balance_counts,
            bias_rate=experts.bias_rate,
            z_loss_coef=experts.z_loss_coef,
        )

    @property
    def router_choices(self) -> list[int]:
        """Experts that each router chooses from, in the order of the forward pass; empty where there is none."""
        if self.moe is not None:
            maps = 1 if self.moe.router == "per_mlp" else 3 if self.maps_in == 2 else 2
            return [experts for experts in self.layer_experts for _ in range(maps)]
        if self.lora is None or self.lora.experts is None:
            return []
        found = []
        for layer in range(self.num_layers):
            maps = len(self.adapted(layer))
            found += [self.lora.experts.num_choices] * (min(maps, 1) if self.lora.routes_mlps else maps)
        return found

    def linear_maps(self, layer: int) -> dict[str, tuple[int, int]]:
        """Widths in and out of a block's linear maps, by the names that transformers gives them; no experts."""
        q, kv, d = self.num_heads * self.head_width, self.kv_heads * self.head_width, self.dim
        maps = {"q_proj": (d, q), "k_proj": (d, kv), "v_proj": (d, kv), "o_proj": (q, d)}
        found = {f"self_attn.{name}": widths for name, widths in maps.items()}
        if not self.is_moe_layer(layer):
            ffn = self.ffn_dim or 0
            found |= {"mlp.gate_proj": (d, ffn)} if self.maps_in == 2 else {}
            found |= {"mlp.up_proj": (d, ffn), "mlp.down_proj": (ffn, d)}
        return found

    def adapted(self, layer: int) -> dict[str, tuple[int, int]]:
        """Those of a block's linear maps that have low-rank adapters."""
        if self.lora is None:
            return {}
        pattern = re.compile(self.lora.targets)
        maps = self.linear_maps(layer).items()
        return {name: widths for name, widths in maps if pattern.fullmatch(f"model.layers.{layer}.{name}")}

    def _lora_params(self, stacks: int) -> int:
        """Adapters, ``stacks`` per map, and their routers."""
        if self.lora is None:
            return 0
        choices = self.lora.experts.num_choices if self.lora.experts else 0
        total = 0
        for layer in range(self.num_layers):
            maps = self.adapted(layer).values()
            total += sum(stacks * self.lora.rank * (inner + outer) for inner, outer in maps)
            if self.lora.routes_linears:
                total += sum(choices * inner for inner, _ in maps)
            elif self.lora.routes_mlps and maps:
                total += choices * self.dim
        return total

    @property
    def layer_experts(self) -> list[int]:
        """Experts of each block that holds some, first to last; empty for a dense model."""
        if self.moe is None:
            return []
        return self.moe.experts_per_layer or [self.moe.num_experts or 0] * self.num_moe_layers

    def moe_of(self, layer: int) -> MoEConfig | None:
        """The experts of block ``layer`` (from 0), with a number of their own; None where there are none."""
        if self.moe is None or not self.is_moe_layer(layer):
            return None
        if self.moe.experts_per_layer is None:
            return self.moe
        before = sum(self.is_moe_layer(i) for i in range(layer))
        return replace(self.moe, num_experts=self.moe.experts_per_layer[before], experts_per_layer=None)

    def _norm_params(self, width: int) -> int:
        return width if self.norm == "rms" else 2 * width

    def _attention_params(self) -> int:
        q, kv, d = self.num_heads * self.head_width, self.kv_heads * self.head_width, self.dim
        weights = d * (q + 2 * kv) + q * d
        biases = (q + 2 * kv if self.qkv_bias else 0) + (d if self.has_out_bias else 0)
        if not self.qk_norm:
            return weights + biases
        widths = (self.head_width, self.head_width) if self.qk_norm_scope == "head" else (q, kv)
        return weights + biases + sum(map(self._norm_params, widths))

    def _ffn_params(self, ffn_dim: int, bias: bool) -> int:
        weights = (self.maps_in + 1) * self.dim * ffn_dim
        return weights + (self.maps_in * ffn_dim + self.dim if bias else 0)

    def _moe_params(self, moe: MoEConfig, num_experts: int, counted: int) -> int:
        """Of one layer: the router of all experts, ``counted`` of them, and what stands beside them."""
        total = self._router_params(moe, num_experts) + counted * self._ffn_params(moe.ffn_dim, bias=False)
        if moe.residual:
            total += self._ffn_params(self.ffn_dim or 0, self.bias) + 2 * self.dim + 2
        if moe.shared_ffn_dim is not None:
            total += self._ffn_params(moe.shared_ffn_dim, self.bias) + self.dim
        return total

    def _count(self, active: bool) -> int:
        d = self.dim
        embedding = self.vocab_rows * d * (1 if self.tie_embeddings else 2)
        if self.positions == "learned":
            embedding += (self.max_seq_len or 0) * d
        if self.embedding_norm:
            embedding += self._norm_params(d)
        block = self._attention_params() + (4 if self.norm_position == "both" else 2) * self._norm_params(d)
        total = embedding + self._norm_params(d) + self.num_layers * block
        dense_layers = self.num_layers - self.num_moe_layers
        if dense_layers:
            total += dense_layers * self._ffn_params(self.ffn_dim or 0, self.bias)
        if self.moe is not None:
            for experts in self.layer_experts:
                total += self._moe_params(self.moe, experts, self.moe.top_k if active else experts)
        return total

    def _router_params(self, moe: MoEConfig, num_experts: int) -> int:
        if moe.router == "per_mlp":
            return num_experts * self.dim
        return num_experts * ((2 if self.maps_in == 2 else 1) * self.dim + moe.ffn_dim)

    @property
    def num_params(self) -> int:
        """All parameters; a tied embedding counts once."""
        return self._count(active=False) + self._lora_params(self.lora.stacks if self.lora else 0)

    def is_expected(self, count: int) -> bool:
        """Whether that is the number of parameters, with or without the adapters."""
        return count in (self.num_params, self._count(active=False))

    @property
    def active_params(self) -> int:
        """Parameters that one token passes through: k experts of each MoE layer, everything else whole."""
        return self._count(active=True) + self._lora_params(self.lora.active_stacks if self.lora else 0)

    def flops_per_token(self, seq_len: int) -> int:
        """Training FLOPs of one token: 6 per active weight (head included, input embedding not) and causal attention.

        Attention: 2 products x 2 FLOPs x seq_len / 2 keys on average x width, forward once and backward twice
        = 6 * layers * seq_len * width. Recomputation is not counted: this is the model's work (MFU, 2204.02311).
        """
        lookup = self.vocab_rows * self.dim if not self.tie_embeddings else 0
        if self.positions == "learned":
            lookup += (self.max_seq_len or 0) * self.dim
        width = self.num_heads * self.head_width
        return 6 * (self.active_params - lookup) + 6 * self.num_layers * seq_len * width

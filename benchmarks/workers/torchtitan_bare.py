"""torchtitan's decoder, mixture of experts and chunked loss in a bare loop.

Its language models take flex or varlen attention only, neither of which has a backward pass on a CPU: its own
``ScaledDotProductAttention`` is plugged in. Its experts compute in bf16 whatever the dtype of the rest.
"""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import torch
from torch import Tensor
from torchtitan.components.loss import ChunkedLossWrapper
from torchtitan.models.common import CosSinRoPE, Embedding, Linear
from torchtitan.models.common.attention import ScaledDotProductAttention
from torchtitan.models.common.config_utils import (
    make_ffn_config,
    make_gqa_config,
    make_moe_config,
    make_routed_experts_config,
    make_router_config,
)
from torchtitan.models.common.nn_modules import RMSNorm
from torchtitan.models.common.param_init import skip_param_init
from torchtitan.models.qwen3 import Qwen3Model, Qwen3TransformerBlock

from benchmarks.workers.bare_loop import arguments, train, weights_of

SKIP = {"weight": skip_param_init}
NAMES = {
    "self_attn.q_proj.weight": "attention.qkv_linear.wq.weight",
    "self_attn.k_proj.weight": "attention.qkv_linear.wk.weight",
    "self_attn.v_proj.weight": "attention.qkv_linear.wv.weight",
    "self_attn.o_proj.weight": "attention.wo.weight",
    "input_layernorm.weight": "attention_norm.weight",
    "post_attention_layernorm.weight": "ffn_norm.weight",
    "mlp.gate_proj.weight": "feed_forward.w1.weight",
    "mlp.up_proj.weight": "feed_forward.w3.weight",
    "mlp.down_proj.weight": "feed_forward.w2.weight",
    "block_sparse_moe.gate.weight": "moe.router.gate.weight",
}
OUTSIDE = {
    "model.embed_tokens.weight": "tok_embeddings.weight",
    "model.norm.weight": "norm.weight",
    "lm_head.weight": "lm_head.weight",
}
EXPERT = {"w1": "w1_EFD", "w2": "w2_EDF", "w3": "w3_EFD"}


def feed_forward(sizes: dict[str, Any]) -> dict[str, Any]:
    """The dense network or the experts of a block."""
    dim, hidden, experts = sizes["hidden_size"], sizes["intermediate_size"], sizes.get("num_local_experts", 0)
    if not experts:
        return {"feed_forward": make_ffn_config(dim=dim, hidden_dim=hidden, w1_param_init=SKIP, w2w3_param_init=SKIP)}
    top_k = sizes["num_experts_per_tok"]
    router = make_router_config(
        dim=dim, num_experts=experts, gate_param_init=SKIP, top_k=top_k, score_func="softmax", route_norm=True
    )
    routed = make_routed_experts_config(
        dim=dim,
        hidden_dim=hidden,
        num_experts=experts,
        top_k=top_k,
        param_init=dict.fromkeys(EXPERT.values(), skip_param_init),
        comm_backend="standard",
    )
    moe = make_moe_config(num_experts=experts, router=router, routed_experts=routed, load_balance_coeff=None)
    return {"moe": moe}


def titan_config(sizes: dict[str, Any]) -> Qwen3Model.Config:
    """The sizes of a transformers folder in torchtitan's terms: its Qwen3 decoder without norms of queries and keys."""
    dim, heads = sizes["hidden_size"], sizes["num_attention_heads"]

    def norm() -> RMSNorm.Config:
        return RMSNorm.Config(normalized_shape=dim, eps=sizes["rms_norm_eps"], param_init=SKIP)

    def block() -> Qwen3TransformerBlock.Config:
        attention = make_gqa_config(
            dim=dim,
            n_heads=heads,
            n_kv_heads=sizes["num_key_value_heads"],
            wqkv_param_init=SKIP,
            wo_param_init=SKIP,
            inner_attention=ScaledDotProductAttention.Config(),
            fuse_qkv=True,
            rope=CosSinRoPE.Config(dim=dim // heads, max_seq_len=sizes["max_position_embeddings"], theta=10000.0),
        )
        return Qwen3TransformerBlock.Config(
            attention_norm=norm(), ffn_norm=norm(), attention=attention, **feed_forward(sizes)
        )

    vocab = sizes["vocab_size"]
    return Qwen3Model.Config(
        dim=dim,
        vocab_size=vocab,
        tok_embeddings=Embedding.Config(num_embeddings=vocab, embedding_dim=dim, param_init=SKIP),
        norm=norm(),
        lm_head=Linear.Config(in_features=dim, out_features=vocab, param_init=SKIP),
        layers=[block() for _ in range(sizes["num_hidden_layers"])],
    )


def converted(weights: dict[str, Tensor], experts: int) -> dict[str, Tensor]:
    """The shared weights under torchtitan's names; experts are stacked."""
    found: dict[str, Tensor] = {}
    stacks: dict[str, list[Tensor]] = {}
    for name, tensor in weights.items():
        if name in OUTSIDE:
            found[OUTSIDE[name]] = tensor
            continue
        _, _, layer, rest = name.split(".", 3)
        if ".experts." in name:
            _, _, number, kind, _ = rest.split(".")
            key = f"layers.{layer}.moe.routed_experts.inner_experts.{EXPERT[kind]}"
            stacks.setdefault(key, [tensor] * experts)[int(number)] = tensor
        else:
            found[f"layers.{layer}.{NAMES[rest]}"] = tensor
    return found | {name: torch.stack(tensors) for name, tensors in stacks.items()}


def main() -> None:
    """One record."""
    asked = arguments(__doc__)
    path: Path = asked.inputs / f"{asked.model}.hf" / "config.json"
    sizes = json.loads(path.read_text(encoding="utf-8"))
    model = titan_config(sizes).build()
    model.init_states(buffer_device=torch.device("cpu"))
    model.load_state_dict(converted(weights_of(asked.inputs, asked.model), sizes.get("num_local_experts", 0)))
    if asked.compile:
        for layer in model.layers.values():
            layer.compile()  # per block, as its trainer does
    loss = ChunkedLossWrapper.Config().build()
    loss.set_lm_head(model.lm_head)
    model._skip_lm_head = True

    def loss_of(tokens: Tensor, labels: Tensor) -> Tensor:
        value, _ = loss(model(tokens), labels, (labels != -100).sum())
        return value

    train(model, loss_of, asked)


if __name__ == "__main__":
    main()

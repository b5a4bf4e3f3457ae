"""The decoder: one class, of which Llama, Qwen, Mixtral, GPT-2, GPT-NeoX and Gemma are configurations."""

from __future__ import annotations

from typing import NamedTuple

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from llmrecipes.models.attention import Attention
from llmrecipes.models.cache import KVCache
from llmrecipes.models.context import SequenceContext, make_context
from llmrecipes.models.layers import make_norm
from llmrecipes.models.linear_experts import LinearMoE
from llmrecipes.models.lora import RoutedMLP, Routes, has_routed_mlp
from llmrecipes.models.mlp import MLP
from llmrecipes.models.moe import MoE, Routing
from llmrecipes.recipe.model_config import ModelConfig


class DecoderOutput(NamedTuple):
    """The result of a forward pass.

    Attributes:
        hidden: features after the final norm, divided by ``logit_divisor``, [B, T, dim]. Logits are
            ``hidden @ head_weight.T``: large, so never computed unasked.
        routing: statistics of each router, in order; empty for a dense model.
    """

    hidden: Tensor
    routing: list[Routing]


def make_mlp(config: ModelConfig, layer: int) -> MLP | MoE | LinearMoE | RoutedMLP:
    """The feed-forward network of a block, with or without experts."""
    if config.moe is not None and config.is_moe_layer(layer):
        return MoE(config, layer) if config.moe.router == "per_mlp" else LinearMoE(config, layer)
    return RoutedMLP(config, layer) if has_routed_mlp(config, layer) else MLP(config, layer=layer)


class Block(nn.Module):
    """Attention and feed-forward network, each on a normalised copy of the residual stream (pre-norm).

    With ``norm_position: post`` what they give is normalised instead, with ``both`` it is too. With
    ``parallel_residual`` both read the block's input.
    """

    def __init__(self, config: ModelConfig, layer: int) -> None:
        super().__init__()
        self.attention_norm = make_norm(config, config.dim)
        self.attention = Attention(config, layer)
        self.mlp_norm = make_norm(config, config.dim)
        self.mlp = make_mlp(config, layer)
        both = config.norm_position == "both"
        self.attention_post_norm = make_norm(config, config.dim) if both else None
        self.mlp_post_norm = make_norm(config, config.dim) if both else None
        self.post_only, self.parallel = config.norm_position == "post", config.parallel_residual
        self.dropout, self.scale = config.dropout, config.residual_scale

    def _branch(self, update: Tensor, norm: nn.Module, post_norm: nn.Module | None) -> Tensor:
        """What joins the residual stream, of the output of attention or of the feed-forward network."""
        if self.post_only:
            update = norm(update)
        elif post_norm is not None:
            update = post_norm(update)
        if self.scale != 1.0:
            update = update * self.scale
        return F.dropout(update, self.dropout, self.training) if self.dropout else update

    def forward(
        self, x: Tensor, context: SequenceContext, token_mask: Tensor | None = None, dropless: bool = False
    ) -> tuple[Tensor, list[Routing]]:
        """Transform ``x`` [B, T, dim]; the second result has an entry per router, none for a dense layer."""
        routes = Routes(token_mask)
        update = self.attention(x if self.post_only else self.attention_norm(x), context, routes)
        mixed = x + self._branch(update, self.attention_norm, self.attention_post_norm)
        source = x if self.parallel else mixed
        normed = source if self.post_only else self.mlp_norm(source)
        if isinstance(self.mlp, MoE):
            update, routing = self.mlp(normed, token_mask, dropless)
            routes.found.append(routing)
        else:
            update = self.mlp(normed, routes)
        return mixed + self._branch(update, self.mlp_norm, self.mlp_post_norm), routes.found


class Decoder(nn.Module):
    """A decoder-only transformer described by a ``ModelConfig``. It knows nothing of losses or of parallelism."""

    def __init__(self, config: ModelConfig) -> None:
        super().__init__()
        self.config = config
        self.embed = nn.Embedding(config.vocab_rows, config.dim)
        self.embed_norm = make_norm(config, config.dim) if config.embedding_norm else None
        self.position_embed: nn.Embedding | None = None
        if config.positions == "learned":
            assert config.max_seq_len is not None
            self.position_embed = nn.Embedding(config.max_seq_len, config.dim)
        self.layers = nn.ModuleList(Block(config, layer) for layer in range(config.num_layers))
        self.norm = make_norm(config, config.dim)
        self.head = None if config.tie_embeddings else nn.Linear(config.dim, config.vocab_rows, bias=False)

    @property
    def head_weight(self) -> nn.Parameter:
        """Rows of the output layer, [vocab_rows, dim], padding included: the embedding itself when tied."""
        weight = self.embed.weight if self.head is None else self.head.weight
        assert isinstance(weight, nn.Parameter)
        return weight

    def logits(self, hidden: Tensor) -> Tensor:
        """Scores of the next token, [..., vocab_size], for ``hidden`` [..., dim]: padded rows have none."""
        return F.linear(hidden, self.head_weight)[..., : self.config.vocab_size]

    def _embed(self, tokens: Tensor, context: SequenceContext) -> Tensor:
        x = self.embed(tokens)
        if torch.is_autocast_enabled(x.device.type):
            x = x.float()  # where weights are gathered in half precision: the residual stream stays in fp32 as without
        if self.config.embedding_scale != 1.0:
            # Rounded to the type of the weights first, as transformers rounds it: with half precision it matters.
            x = x * torch.tensor(self.config.embedding_scale, dtype=self.embed.weight.dtype).item()
        if self.config.longest_text is not None:
            self._refuse_longer(context, self.config.longest_text)
        if self.position_embed is not None:
            x = x + self.position_embed(context.positions)
        if self.embed_norm is not None:
            x = self.embed_norm(x)
        return F.dropout(x, self.config.dropout, self.training) if self.config.dropout else x

    def _refuse_longer(self, context: SequenceContext, longest: int) -> None:
        last = max(context.spans) if context.lengths else context.positions.shape[1]
        if context.cache is not None:
            last += context.cache.length
            last -= 0 if context.cache.padding is None else int(context.cache.padding.min())
        kind = "learned" if self.position_embed is not None else "known"
        assert last <= longest, f"a document of {last} tokens, but positions are {kind} for {longest} only"

    def forward(
        self,
        tokens: Tensor,
        *,
        document_lengths: list[list[int]] | None = None,
        document_prefixes: list[list[int]] | None = None,
        token_mask: Tensor | None = None,
        cache: KVCache | None = None,
        dropless: bool = False,
    ) -> DecoderOutput:
        """Run the decoder.

        Args:
            tokens: ids, [B, T].
            document_lengths: lengths of the documents packed into each row (each row sums to T). Documents do not see
                each other and positions restart at each; None = one document per row.
            document_prefixes: how many first tokens of the document before it in the row each document goes on from, as
                if they stood at its beginning; None = none does.
            token_mask: [B, T], True for real tokens; the others do not enter the routing statistics.
            cache: keys and values of earlier tokens; extended in place.
            dropless: let experts take every token, whatever their capacity. Always so with a cache: which tokens are
                dropped would depend on how many are computed at a time.
        """
        dtype = torch.float64 if self.embed.weight.dtype == torch.float64 else torch.float32
        context = make_context(self.config, tokens, dtype, document_lengths, cache, document_prefixes)
        x = self._embed(tokens, context)
        routings: list[Routing] = []
        for block in self.layers:
            x, found = block(x, context, token_mask, dropless or cache is not None)
            routings += found
        if cache is not None:
            cache.advance(tokens.shape[1])
        hidden = self.norm(x)
        if self.config.logit_divisor != 1.0:
            hidden = hidden / self.config.logit_divisor
        return DecoderOutput(hidden, routings)

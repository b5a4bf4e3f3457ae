"""Keys and values of the tokens already seen."""

from __future__ import annotations

import torch
from torch import Tensor

from llmrecipes.recipe.model_config import ModelConfig


class KVCache:
    """Preallocated keys and values of every layer, so that a new token costs one column, not the whole prefix.

    Args:
        config: the decoder's sizes.
        batch_size: sequences decoded side by side.
        max_len: most columns a sequence may reach, padding included.
        dtype, device: of the stored keys and values.
        padding: columns of padding to the left of each sequence, [batch_size]; None = there are none.
    """

    def __init__(
        self,
        config: ModelConfig,
        batch_size: int,
        max_len: int,
        dtype: torch.dtype,
        device: torch.device | str = "cpu",
        padding: Tensor | None = None,
    ) -> None:
        shape = (config.num_layers, 2, batch_size, max_len, config.kv_heads, config.head_width)
        self.store = torch.zeros(shape, dtype=dtype, device=device)
        self.max_len = max_len
        self.length = 0
        self.padding = padding

    def extend(self, layer: int, key: Tensor, value: Tensor) -> tuple[Tensor, Tensor]:
        """Append ``key``, ``value`` [B, T, kv_heads, width] of ``layer``; returns all so far, [B, length + T, ...].

        ``length`` itself moves once per forward pass, by ``advance``.
        """
        stop = self.length + key.shape[1]
        assert stop <= self.max_len, f"the cache holds {self.max_len} tokens, {stop} are needed"
        self.store[layer, 0, :, self.length : stop] = key
        self.store[layer, 1, :, self.length : stop] = value
        return self.store[layer, 0, :, :stop], self.store[layer, 1, :, :stop]

    def advance(self, num_tokens: int) -> None:
        """Count ``num_tokens`` as seen, after every layer stored them."""
        self.length += num_tokens

    def keep(self, rows: Tensor) -> None:
        """Go on with the sequences ``rows`` (indices, [kept]) only: the others are finished."""
        self.store = self.store.index_select(2, rows)
        if self.padding is not None:
            self.padding = self.padding.index_select(0, rows)

"""The dense feed-forward network."""

from __future__ import annotations

from torch import Tensor, nn

from llmrecipes.models.activation import activation
from llmrecipes.recipe.model_config import ModelConfig


class MLP(nn.Module):
    """``down(activation(up(x)))``; gated, gate and up are one projection ``gate_up`` (rows: gate, then up).

    Args:
        config: the decoder.
        ffn_dim: hidden width; None = the decoder's.
    """

    def __init__(self, config: ModelConfig, ffn_dim: int | None = None) -> None:
        super().__init__()
        ffn_dim = config.ffn_dim if ffn_dim is None else ffn_dim
        assert ffn_dim is not None
        self.kind = config.activation
        self.gated = config.maps_in == 2
        if self.gated:
            self.gate_up = nn.Linear(config.dim, 2 * ffn_dim, bias=config.bias)
        else:
            self.up = nn.Linear(config.dim, ffn_dim, bias=config.bias)
        self.down = nn.Linear(ffn_dim, config.dim, bias=config.bias)

    def forward(self, x: Tensor) -> Tensor:
        """Map ``x`` [..., dim] to [..., dim]."""
        projection = self.gate_up if self.gated else self.up
        return self.down(activation(projection(x), self.kind))

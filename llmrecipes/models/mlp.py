"""The dense feed-forward network."""

from __future__ import annotations

from torch import Tensor, nn

from llmrecipes.models.activation import activation
from llmrecipes.models.lora import Routes, apply_linear, make_linear
from llmrecipes.recipe.model_config import ModelConfig


class MLP(nn.Module):
    """``down(activation(up(x)))``; gated, gate and up are one projection ``gate_up`` (rows: gate, then up).

    Args:
        config: the decoder.
        ffn_dim: hidden width; None = the decoder's.
        layer: the block, whose adapters it has; None = none.
    """

    def __init__(self, config: ModelConfig, ffn_dim: int | None = None, layer: int | None = None) -> None:
        super().__init__()
        ffn_dim = config.ffn_dim if ffn_dim is None else ffn_dim
        assert ffn_dim is not None
        self.kind = config.activation
        self.gated = config.maps_in == 2
        if self.gated:
            self.gate_up = make_linear(config, layer, config.dim, {"gate": ffn_dim, "up": ffn_dim}, config.bias)
        else:
            self.up = make_linear(config, layer, config.dim, {"up": ffn_dim}, config.bias)
        self.down = make_linear(config, layer, ffn_dim, {"down": config.dim}, config.bias)

    def forward(self, x: Tensor, routes: Routes | None = None) -> Tensor:
        """Map ``x`` [..., dim] to [..., dim]; routers of adapters write down in ``routes`` what they did."""
        projection = self.gate_up if self.gated else self.up
        hidden = activation(apply_linear(projection, x, routes), self.kind)
        return apply_linear(self.down, hidden, routes)

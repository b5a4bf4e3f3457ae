"""A stage in fp64, where differences are mistakes and not rounding. A module of its own: recipes name its class."""

from __future__ import annotations

from llmrecipes.modules import PretrainModule


class Fp64Module(PretrainModule):
    """The same stage with fp64 parameters; Lightning's 64-true is not for sharded strategies."""

    def build_model(self):
        return super().build_model().double()

"""Our own model, loss and optimizer in a bare loop: what is left of ``llmrecipes fit`` without trainer and run folder.

Memory is kept by the C library as in training, so that only the trainer differs. Dense models: no balance loss.
"""

from __future__ import annotations

import yaml
from safetensors.torch import load_file
from torch import Tensor

from benchmarks.workers.bare_loop import arguments, train
from llmrecipes.losses import linear_cross_entropy
from llmrecipes.models import Decoder, ModelConfig
from llmrecipes.run.allocator import keep_freed_memory


def main() -> None:
    """One record."""
    asked = arguments(__doc__)
    keep_freed_memory()
    folder = asked.inputs / f"{asked.model}.ours"
    described = yaml.safe_load((folder / "model.yaml").read_text(encoding="utf-8"))
    model = Decoder(ModelConfig(**described["model"]["init_args"]["config"]))
    model.load_state_dict(load_file(folder / "model.safetensors"))

    def loss_of(tokens: Tensor, labels: Tensor) -> Tensor:
        hidden = model(tokens).hidden.flatten(0, 1)
        total, count = linear_cross_entropy(hidden, model.head_weight, labels.flatten())
        return total / count

    train(model, loss_of, asked)


if __name__ == "__main__":
    main()

"""What peers read that only they can write, from the shared inputs; run in their environment.

.venv-peers/bin/python -m benchmarks.prepare_peers
"""

from __future__ import annotations

import argparse
from pathlib import Path


def litgpt_checkpoint(inputs: Path, name: str) -> None:
    """``NAME.litgpt/lit_model.pth``, which ``litgpt pretrain`` begins with."""
    import torch

    from benchmarks.workers.litgpt_bare import converted, litgpt_config

    folder = inputs / f"{name}.litgpt"
    if not (folder / "lit_model.pth").exists():
        folder.mkdir(exist_ok=True)
        config = litgpt_config(inputs / f"{name}.hf")
        torch.save(converted(inputs, name, config), folder / "lit_model.pth")


def main() -> None:
    """Make what is not there yet."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--inputs", type=Path, default=Path("runs/bench/inputs"))
    asked = parser.parse_args()
    litgpt_checkpoint(asked.inputs, "small")
    print(f"the peers' inputs are in {asked.inputs}")


if __name__ == "__main__":
    main()

"""What peers read that only they can write, from the shared inputs; run in their environment.

.venv-peers/bin/python -m benchmarks.prepare_peers
"""

from __future__ import annotations

import argparse
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import numpy as np

from benchmarks.inputs import READ_SEQ_LEN


def litgpt_checkpoint(inputs: Path, name: str) -> None:
    """``NAME.litgpt/lit_model.pth``, which ``litgpt pretrain`` begins with."""
    import torch

    from benchmarks.workers.litgpt_bare import converted, litgpt_config

    folder = inputs / f"{name}.litgpt"
    if not (folder / "lit_model.pth").exists():
        folder.mkdir(exist_ok=True)
        config = litgpt_config(inputs / f"{name}.hf")
        torch.save(converted(inputs, name, config), folder / "lit_model.pth")


def rows_of(corpus: Path) -> np.ndarray:
    """Rows of 2,049 ids, [N, T + 1] uint16."""
    ids = np.fromfile(corpus.with_suffix(".bin"), dtype=np.uint16)
    width = READ_SEQ_LEN + 1
    return ids[: len(ids) // width * width].reshape(-1, width)


def arrow_corpus(corpus: Path) -> None:
    """The corpus as a dataset of Hugging Face."""
    from datasets import Dataset, Features, List, Value

    folder = corpus.with_suffix(".arrow")
    if not folder.exists():
        features = Features({"ids": List(Value("uint16"))})
        Dataset.from_dict({"ids": list(rows_of(corpus))}, features=features).save_to_disk(str(folder))


def _litdata_part(part: tuple[str, int, int]) -> Iterator[Any]:
    import torch

    path, start, stop = part
    ids = np.fromfile(path, dtype=np.uint16)[start:stop]
    for begin in range(0, len(ids), 2**16):
        yield torch.from_numpy(ids[begin : begin + 2**16].copy())


def litdata_corpus(corpus: Path) -> None:
    """The corpus in litdata's chunks of 64 MB."""
    from litdata import TokensLoader, optimize

    folder = corpus.with_suffix(".litdata")
    if not (folder / "index.json").exists():
        path = corpus.with_suffix(".bin")
        parts = [(str(path), 0, path.stat().st_size // 2)]
        optimize(_litdata_part, parts, str(folder), chunk_bytes="64MB", num_workers=1, item_loader=TokensLoader())


def main() -> None:
    """Make what is not there yet."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--inputs", type=Path, default=Path("runs/bench/inputs"))
    asked = parser.parse_args()
    litgpt_checkpoint(asked.inputs, "small")
    arrow_corpus(asked.inputs / "corpus")
    litdata_corpus(asked.inputs / "corpus")
    print(f"the peers' inputs are in {asked.inputs}")


if __name__ == "__main__":
    main()

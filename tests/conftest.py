"""Small shards and recipes that every test may use. One thread: the machine is shared, and results must not vary."""

from __future__ import annotations

import gc
import os
import sys
from pathlib import Path

os.environ.setdefault("OMP_NUM_THREADS", "1")
# torch's store asks the name server about every client; an answer that gets lost costs 5 s otherwise.
os.environ.setdefault("RES_OPTIONS", "timeout:1 attempts:3")

import numpy as np
import pytest

REPOSITORY = Path(__file__).parents[1]
VOCAB = 64


def pytest_configure(config):
    """What :func:`llmrecipes.run.fit.quiet_lightning` silences for users; pytest has filters of its own."""
    for message in (
        "LightningCLI's args parameter",
        r"\s*``instantiate_classes`` was deprecated",
        r"\s*By default only one JsonargparseDeprecationWarning",
        ".*treespec, LeafSpec",
    ):
        config.addinivalue_line("filterwarnings", f"ignore:{message}")


def pytest_addoption(parser):
    parser.addoption("--all", action="store_true", dest="all_cases", help="large matrices whole (make test-all)")


# Folders with long files that wait a lot: begun first, so that no worker is left alone with one at the end.
LONG = ("slurm", "run", "faults", "distributed")


def pytest_collection_modifyitems(config, items):
    if not config.option.all_cases:
        left_out = [item for item in items if item.get_closest_marker("release")]
        config.hook.pytest_deselected(items=left_out)
        items[:] = [item for item in items if not item.get_closest_marker("release")]
    folders = {folder: place for place, folder in enumerate(LONG)}
    items.sort(key=lambda item: folders.get(item.path.parent.name, len(LONG)))


def pytest_collection_finish():
    """All is imported: from here on no garbage collection looks at it again, in forked ranks least of all.

    A collection touches every object there is; a forked process copies each page on its first touch. That was half of
    what a short run of a forked rank cost.
    """
    gc.freeze()


@pytest.fixture(autouse=True)
def no_process_group_is_left():
    """A run within this process may leave its group of one; forked ranks of later tests make their own."""
    yield
    distributed = sys.modules.get("torch.distributed")
    if distributed is not None and distributed.is_initialized():
        distributed.destroy_process_group()


@pytest.fixture(scope="session")
def stride(request):
    """``stride(7)``: 7, and 1 under ``--all``: every seventh case of a large matrix, or all."""
    return lambda most: 1 if request.config.option.all_cases else most


@pytest.fixture(scope="session")
def shards(tmp_path_factory) -> dict[str, Path]:
    """Two little sources of 64 ids with a pattern to learn, EOS 2."""
    from llmrecipes.data import ShardWriter

    folder = tmp_path_factory.mktemp("shards")
    generator = np.random.default_rng(0)
    prefixes = {}
    for name, stride in (("a", 3), ("b", 5)):
        with ShardWriter(folder / name, VOCAB, eos_id=2, tokenizer_sha256="0" * 64) as writer:
            for _ in range(120):
                start, length = generator.integers(0, 60), generator.integers(8, 90)
                body = 4 + (start + stride * np.arange(length)) % 60
                writer.add(np.append(body, 2))
        prefixes[name] = folder / name
    return prefixes


MOE = {"num_experts": 4, "ffn_dim": 16, "balance": "loss", "z_loss_coef": 0.001}


@pytest.fixture(scope="session")
def recipe(shards):
    """A fresh, complete little recipe as a dict; ``recipe(moe=True, steps=12)``."""

    def make(moe: bool = False, steps: int = 12, **data) -> dict:
        config = {"vocab_size": VOCAB, "dim": 32, "num_layers": 2, "num_heads": 2, "dropout": 0.1, "ffn_dim": 48}
        if moe:
            config |= {"moe": dict(MOE), "ffn_dim": None}
        return {
            "name": "moe" if moe else "dense",
            "seed": 7,
            "model": {
                "class_path": "llmrecipes.modules.PretrainModule",
                "init_args": {
                    "config": config,
                    "optimizer": {"class_path": "llmrecipes.optim.AdamW", "init_args": {"lr": 0.003}},
                    "schedule": {"class_path": "llmrecipes.optim.WarmupCosine", "init_args": {"warmup": "3 steps"}},
                },
            },
            "data": {
                "class_path": "llmrecipes.data.PackedShards",
                "init_args": {
                    "train": {str(shards["a"]): 1.0, str(shards["b"]): 2.0},
                    "seq_len": 32,
                    "micro_batch": 2,
                    "global_batch": 4,
                    "split": "80,10,10",
                    "valid_batches": 2,
                }
                | data,
            },
            "trainer": {"max_steps": steps, "accelerator": "cpu", "val_check_interval": 4},
            "checkpoint": {"every": "3 steps", "keep_last": 2},
            "logging": {"every": 1},
        }

    return make

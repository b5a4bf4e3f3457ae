"""A sound recipe and shards for it, for tests that break one thing at a time."""

from __future__ import annotations

import json
from pathlib import Path

GOOD = """\
# purpose: for tests
name: moe
seed: 42
run_root: runs
resume: auto
model:
  class_path: llmrecipes.modules.PretrainModule
  init_args:
    config:
      vocab_size: 16000
      dim: 128
      num_layers: 4
      num_heads: 4
      moe:
        num_experts: 8
        top_k: 2
        ffn_dim: 256
    expected_params: 7_509_120
    optimizer:
      class_path: llmrecipes.optim.AdamW
      init_args: {lr: 1e-3, betas: [0.9, 0.95], weight_decay: 0.02}
    schedule:
      class_path: llmrecipes.optim.WarmupCosine
      init_args:
        warmup: 2000 steps
        decay: null
        floor: 0.05
data:
  class_path: llmrecipes.data.PackedShards
  init_args:
    train: {data/ja: 0.5, data/en: 0.5}
    seq_len: 2048
    micro_batch: 8
    global_batch: 1152
trainer:
  max_steps: 62500
  precision: bf16-mixed
checkpoint:
  every: 200 steps
  keep_every: 1000 steps
logging: {every: 10}
samples: {every: 100}
"""


def write_shard(prefix: Path, *, tokens: int = 10_000, vocab_size: int = 16_000, sha: str = "a") -> None:
    prefix.parent.mkdir(parents=True, exist_ok=True)
    Path(f"{prefix}.bin").write_bytes(bytes(2 * tokens))
    Path(f"{prefix}.idx").write_bytes(b"MMIDIDX\x00\x00" + (1).to_bytes(8, "little") + bytes([8]) + bytes(16))
    manifest = {"vocab_size": vocab_size, "num_tokens": tokens, "tokenizer_sha256": sha}
    Path(f"{prefix}.json").write_text(json.dumps(manifest))

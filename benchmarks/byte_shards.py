"""Token shards whose tokens are bytes: a vocabulary so small that a small model is all layers and no embedding.

python benchmarks/byte_shards.py CORPUS data/bytes [--names ja_wiki ja_novel ja_docs en] [--bytes 12_000_000]

CORPUS is a folder of NAME.jsonl.gz with a "text" in each line. Byte b becomes id b + 4, a document ends with id 2.
"""

from __future__ import annotations

import argparse
import gzip
import json
from pathlib import Path

import numpy as np

from llmrecipes.data import ShardWriter

VOCAB, EOS, FIRST = 260, 2, 4


def write(source: Path, prefix: Path, most: int) -> int:
    """Shards of the first ``most`` bytes or so; returns how many were written."""
    total = 0
    with (
        gzip.open(source, "rt", encoding="utf-8") as lines,
        ShardWriter(prefix, VOCAB, eos_id=EOS, tokenizer_sha256="bytes" + "0" * 59) as writer,
    ):
        for line in lines:
            text = np.frombuffer(json.loads(line)["text"].encode(), dtype=np.uint8).astype(np.int64)
            writer.add(np.append(text + FIRST, EOS))
            total += len(text)
            if total > most:
                break
    return total


def main() -> None:
    """Write one shard per name."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("corpus", type=Path)
    parser.add_argument("out", type=Path)
    parser.add_argument("--names", nargs="+", default=["ja_wiki", "ja_novel", "ja_docs", "en"])
    parser.add_argument("--bytes", type=int, default=12_000_000)
    arguments = parser.parse_args()
    arguments.out.mkdir(parents=True, exist_ok=True)
    for name in arguments.names:
        total = write(arguments.corpus / f"{name}.jsonl.gz", arguments.out / name, arguments.bytes)
        print(f"{arguments.out / name}: {total:,} bytes")


if __name__ == "__main__":
    main()

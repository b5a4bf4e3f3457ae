"""Case G, tokenizing: texts in JSONL to ids on disk, the whole program with its start, its children included.

Compared is the number of tokens, which one tokenizer gives only one of. Memory is the largest process's peak.
"""

from __future__ import annotations

import argparse
import json
import resource
import shutil
import subprocess
import sys
import time
from collections.abc import Iterator
from pathlib import Path

from benchmarks.meter import write_record

OUTSIDE = {"ours"}  # programs that run in a process of their own anyway


def texts(path: Path) -> Iterator[str]:
    """The texts of a JSONL file."""
    with path.open(encoding="utf-8") as lines:
        for line in lines:
            yield json.loads(line)["text"]


def ours(source: Path, tokenizer: Path, out: Path) -> int:
    """``llmrecipes data tokenize`` with one worker."""
    words = ["--input", source, "--tokenizer", tokenizer, "--output", out, "--workers", "1", "--overwrite", "true"]
    subprocess.run([sys.executable, "-m", "llmrecipes", "data", "tokenize", *map(str, words)], check=True)
    return int(json.loads(out.with_name(out.name + ".json").read_text(encoding="utf-8"))["num_tokens"])


def bare(source: Path, tokenizer: Path, out: Path) -> int:
    """The least code that does it: the tokenizer's own batch call and a file."""
    import numpy as np

    count = 0
    with out.open("wb") as file:
        if (tokenizer / "tokenizer.model").exists():
            import sentencepiece

            pieces = sentencepiece.SentencePieceProcessor(model_file=str(tokenizer / "tokenizer.model"))
            for text in texts(source):
                ids = np.array([*pieces.encode(text), pieces.eos_id()], dtype=np.uint16)
                file.write(ids.tobytes())
                count += len(ids)
            return count
        import tokenizers

        fast = tokenizers.Tokenizer.from_file(str(tokenizer / "tokenizer.json"))
        end = fast.token_to_id("<|endoftext|>")
        for text in texts(source):
            ids = np.array([*fast.encode(text, add_special_tokens=False).ids, end], dtype=np.uint16)
            file.write(ids.tobytes())
            count += len(ids)
    return count


def datasets(source: Path, tokenizer: Path, out: Path) -> int:
    """Hugging Face datasets: ``map`` with the fast tokenizer, one process."""
    from datasets import load_dataset
    from transformers import PreTrainedTokenizerFast

    fast = PreTrainedTokenizerFast(tokenizer_file=str(tokenizer / "tokenizer.json"))
    end = fast.convert_tokens_to_ids("<|endoftext|>")

    def encode(rows: dict[str, list[str]]) -> dict[str, list[list[int]]]:
        return {"ids": [[*ids, end] for ids in fast(rows["text"], add_special_tokens=False)["input_ids"]]}

    folder = out.with_name(out.name + ".cache")
    shutil.rmtree(folder, ignore_errors=True)  # what an earlier run has left would be taken instead of made
    rows = load_dataset("json", data_files=str(source), split="train", cache_dir=str(folder))
    made = rows.map(encode, batched=True, remove_columns=rows.column_names)
    made.save_to_disk(str(out.with_name(out.name + ".arrow")))
    return sum(len(ids) for ids in made["ids"])


WAYS = {"ours": ours, "bare": bare, "datasets": datasets}


def main() -> None:
    """One record of one unit."""
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("way", choices=list(WAYS))
    parser.add_argument("--input", type=Path, required=True)
    parser.add_argument("--tokenizer", type=Path, required=True)
    parser.add_argument("--output", type=Path, required=True)
    asked = parser.parse_args()
    wall = time.perf_counter()
    count = WAYS[asked.way](asked.input, asked.tokenizer, asked.output)
    used = [resource.getrusage(who) for who in (resource.RUSAGE_SELF, resource.RUSAGE_CHILDREN)]
    if asked.way in OUTSIDE:
        used = used[1:]
    cpu = sum(one.ru_utime + one.ru_stime for one in used)
    megabytes = sum(len(text.encode()) for text in texts(asked.input)) / 1e6
    unit = {"cpu": cpu, "wall": time.perf_counter() - wall}
    memory = max(one.ru_maxrss for one in used) / 1024
    write_record({"units": [unit], "checks": [count], "memory_mib": memory, "work": megabytes})


if __name__ == "__main__":
    main()

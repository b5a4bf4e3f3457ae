"""Case G, reading: shuffled batches of 8 rows of 2,049 ids from a corpus on disk, one library per process, no workers.

The first unit is from opening the corpus to the first batch in hand; each further one is 500 batches. Memory is what
the process holds beside mapped files, above what it held after its imports.
"""

from __future__ import annotations

import argparse
import itertools
import time
from collections.abc import Callable, Iterator
from pathlib import Path

from torch import Tensor

from benchmarks.inputs import READ_SEQ_LEN, VOCAB
from benchmarks.meter import Meter, peak_memory, write_record

ROWS, BLOCK, CHECKED = 8, 500, 200


def ours(corpus: Path) -> Callable[[], Iterator[Tensor]]:
    """PackedShards as ``fit`` opens it, without the checksums that ``fit`` compares once per run."""
    from llmrecipes.data import PackedShards

    def batches() -> Iterator[Tensor]:
        data = PackedShards(
            {str(corpus): 1.0}, READ_SEQ_LEN, ROWS, ROWS, split="1,0,0", document_mask=False, vocab_size=VOCAB
        )
        data.setup("fit")
        return (batch.tokens for batch in data.train_dataloader())

    return batches


def litdata(corpus: Path) -> Callable[[], Iterator[Tensor]]:
    """litdata's TokensLoader; it shuffles its chunks, and rows within a chunk."""
    from litdata import StreamingDataLoader, StreamingDataset, TokensLoader

    def batches() -> Iterator[Tensor]:
        loader = TokensLoader(block_size=READ_SEQ_LEN + 1)
        folder = str(corpus.with_suffix(".litdata"))
        rows = StreamingDataset(folder, item_loader=loader, shuffle=True, drop_last=True)
        return itertools.chain.from_iterable(itertools.repeat(StreamingDataLoader(rows, batch_size=ROWS)))

    return batches


def huggingface(corpus: Path) -> Callable[[], Iterator[Tensor]]:
    """datasets: rows in Arrow, a shuffled index over them."""
    from datasets import load_from_disk
    from torch.utils.data import DataLoader

    def batches() -> Iterator[Tensor]:
        rows = load_from_disk(str(corpus.with_suffix(".arrow"))).shuffle(seed=0).with_format("torch")
        loader = DataLoader(rows, batch_size=ROWS)
        return (batch["ids"] for batch in itertools.chain.from_iterable(itertools.repeat(loader)))

    return batches


def datatrove(corpus: Path) -> Callable[[], Iterator[Tensor]]:
    """datatrove's dataset of one flat file with torch's random order."""
    from datatrove.utils.dataset import DatatroveFileDataset
    from torch.utils.data import DataLoader

    def batches() -> Iterator[Tensor]:
        rows = DatatroveFileDataset(str(corpus.with_suffix(".bin")), READ_SEQ_LEN, token_size=2)
        loader = DataLoader(rows, batch_size=ROWS, shuffle=True)
        return (batch["input_ids"] for batch in itertools.chain.from_iterable(itertools.repeat(loader)))

    return batches


WAYS = {"ours": ours, "litdata": litdata, "datasets": huggingface, "datatrove": datatrove}


def main() -> None:
    """One record; the figure compared is the mean id of some batches, which every random order must give to 1 %."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("way", choices=list(WAYS))
    parser.add_argument("--corpus", type=Path, required=True)
    parser.add_argument("--steps", type=int, required=True, help="units, the first batch included")
    asked = parser.parse_args()
    open_corpus = WAYS[asked.way](asked.corpus)
    held, meter = peak_memory("RssAnon"), Meter()
    cpu, wall = time.process_time(), time.perf_counter()
    batches = open_corpus()
    next(batches)
    first = {"cpu": time.process_time() - cpu, "wall": time.perf_counter() - wall}
    meter.mark()
    for _ in range(asked.steps - 1):
        for _ in itertools.islice(batches, BLOCK):
            pass
        meter.mark()
    record = meter.record()
    record["memory_mib"] = peak_memory("RssAnon") - held
    record["units"] = [first, *record["units"][1:]]  # type: ignore[index]
    record["checks"] = [sum(float(next(batches).double().mean()) for _ in range(CHECKED)) / CHECKED]
    write_record(record)


if __name__ == "__main__":
    main()

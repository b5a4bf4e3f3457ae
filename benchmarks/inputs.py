"""Weights, tokens and texts that all programs of a comparison share; made once, from seeds.

    python -m benchmarks.inputs --to runs/bench/inputs

Weights are initialised by transformers and written in its layout; ours are made of them by ``convert from-hf``, the
peers' by their own converters when they load. Tokens are drawn with Zipf's frequencies and written as a shard; the
peers read the very batches that our DataModule makes of it, as ``.npy``.
"""

from __future__ import annotations

import argparse
import gzip
import itertools
import json
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import numpy as np

VOCAB = 32_000
SEQ_LEN, ROWS = 512, 8
BATCHES = 64  # steps for which batches are dumped
READ_TOKENS, READ_SEQ_LEN = 50_000_000, 2048
CHAT_SEQ_LEN, CHAT_ROWS, CHAT_STEPS = 1024, 4, 16
TALKS, PAIRS = 2_000, 500
TEMPLATE = Path(__file__).parents[1] / "recipes" / "cpu" / "question_answer.jinja"
SIZES: dict[str, dict[str, Any]] = {
    "dense": {"hidden_size": 512, "num_hidden_layers": 8, "num_attention_heads": 8, "intermediate_size": 1408},
    "moe": {"hidden_size": 512, "num_hidden_layers": 8, "num_attention_heads": 8, "intermediate_size": 704},
    "small": {"hidden_size": 64, "num_hidden_layers": 2, "num_attention_heads": 2, "intermediate_size": 176},
}


def make_weights(folder: Path, name: str) -> None:
    """``NAME.hf``: a model of transformers with its own initial weights; ``NAME.ours``: the same, converted."""
    import torch
    from transformers import LlamaConfig, LlamaForCausalLM, MixtralConfig, MixtralForCausalLM

    from llmrecipes.convert.from_hf import from_hf

    sizes = SIZES[name]
    common = {
        **sizes,
        "num_key_value_heads": sizes["num_attention_heads"] // 2,
        "vocab_size": VOCAB,
        "max_position_embeddings": SEQ_LEN,
        "rms_norm_eps": 1e-5,
        "rope_parameters": {"rope_type": "default", "rope_theta": 10000.0},
        "tie_word_embeddings": False,
        "bos_token_id": 1,
        "eos_token_id": 2,
        "use_cache": False,
    }
    torch.manual_seed(0)
    if name == "moe":
        experts = {"num_local_experts": 8, "num_experts_per_tok": 2, "router_aux_loss_coef": 0.0}
        model = MixtralForCausalLM(MixtralConfig(**common, **experts, sliding_window=None))
    else:
        model = LlamaForCausalLM(LlamaConfig(**common))
    model.save_pretrained(folder / f"{name}.hf")
    from_hf(str(folder / f"{name}.hf"), str(folder / f"{name}.ours"))


def write_tokens(prefix: Path, count: int, seed: int, vocab: int = VOCAB) -> None:
    """A shard of documents of lognormal length (mean about 700 tokens) with Zipf's frequencies."""
    from llmrecipes.data.shards import ShardWriter

    rng = np.random.default_rng(seed)
    weights = 1.0 / np.arange(2, vocab, dtype=np.float64)
    edges = np.cumsum(weights / weights.sum())
    with ShardWriter(prefix, vocab, eos_id=0, tokenizer_sha256="benchmark", tokenizer="benchmark") as writer:
        while writer.num_tokens < count:
            length = int(min(max(rng.lognormal(6.2, 0.8), 16), count - writer.num_tokens))
            ids = 1 + np.searchsorted(edges, rng.random(length), side="right").clip(max=vocab - 3)
            ids[-1] = 0
            writer.add(ids)


def dump_batches(folder: Path, prefix: Path) -> None:
    """``batches.npy`` [N, 2, B, T]: tokens and labels (-100 = no target) that our DataModule yields for N steps."""
    from llmrecipes.data import PackedShards

    data = PackedShards(
        {str(prefix): 1.0},
        seq_len=SEQ_LEN,
        micro_batch=ROWS,
        global_batch=ROWS,
        split="1,0,0",
        document_mask=False,
        vocab_size=VOCAB,
    )
    data.setup("fit")
    batches = list(itertools.islice(data.train_dataloader(), BATCHES))
    rows = [np.stack([batch.tokens.numpy(), batch.labels.numpy()]) for batch in batches]
    np.save(folder / "batches.npy", np.stack(rows).astype(np.int32))


def write_texts(folder: Path, megabytes: float, given: Sequence[Path]) -> None:
    """``texts.jsonl``: so much of the given JSONL files in equal parts, else of the demo corpus."""
    from data_prep.demo_corpus import DOMAINS, demo

    files = list(given)
    if not files:
        demo(str(folder / "demo"), documents=max(100, int(megabytes * 3_800)), overwrite=True)
        files = [folder / "demo" / f"{domain}.jsonl" for domain in DOMAINS]
    with (folder / "texts.jsonl").open("w", encoding="utf-8") as out:
        for path in files:
            left = megabytes * 1e6 / len(files)
            with gzip.open(path, "rt", encoding="utf-8") if path.suffix == ".gz" else path.open() as lines:
                for line in lines:
                    left -= len(line.encode())
                    if left < 0:
                        break
                    out.write(line)


def make_tokenizers(folder: Path, vocab: int) -> None:
    """``unigram``: ours, by SentencePiece; ``bpe``: byte-level BPE as GPT-2's, by tokenizers; of the same texts."""
    import tokenizers

    from data_prep.tokenizer import train_tokenizer

    source = folder / "texts.jsonl"
    train_tokenizer([str(source)], str(folder / "unigram"), vocab_size=vocab, sample_bytes=4_000_000)
    bpe = tokenizers.Tokenizer(tokenizers.models.BPE())
    bpe.pre_tokenizer = tokenizers.pre_tokenizers.ByteLevel(add_prefix_space=False)
    bpe.decoder = tokenizers.decoders.ByteLevel()
    with source.open(encoding="utf-8") as lines:
        sample = [json.loads(line)["text"] for line in itertools.islice(lines, 0, None, 100)]
    alphabet = tokenizers.pre_tokenizers.ByteLevel.alphabet()
    trainer = tokenizers.trainers.BpeTrainer(
        vocab_size=vocab, special_tokens=["<|endoftext|>"], initial_alphabet=alphabet, show_progress=False
    )
    bpe.train_from_iterator(sample, trainer)
    (folder / "bpe").mkdir()
    bpe.save(str(folder / "bpe" / "tokenizer.json"))


def write_chats(folder: Path, seed: int = 3) -> None:
    """``talks.jsonl`` and ``pairs.jsonl``: questions and answers cut out of the texts, of lognormal lengths.

    A talk has about 200 tokens, a third of them the question; the two answers of a pair are of like length.
    """
    from llmrecipes.data import Tokenizer

    rng, tokenizer = np.random.default_rng(seed), Tokenizer(str(folder / "unigram"))
    with (folder / "texts.jsonl").open(encoding="utf-8") as lines:
        sample = "\n".join(json.loads(line)["text"] for line in itertools.islice(lines, 0, None, 40))
    ids, at = tokenizer.encode(sample[:4_000_000]), 0

    def piece(length: float) -> str:
        nonlocal at
        count = int(min(max(length, 4), 400))
        at = at + count if at + 2 * count < len(ids) else count
        return tokenizer.decode(ids[at - count : at]).strip() or "..."

    with (folder / "talks.jsonl").open("w", encoding="utf-8") as out:
        for length in rng.lognormal(5.1, 0.6, TALKS):
            talk = {"question": piece(length / 3), "answer": piece(2 * length / 3)}
            out.write(json.dumps(talk, ensure_ascii=False) + "\n")
    with (folder / "pairs.jsonl").open("w", encoding="utf-8") as out:
        for length in rng.lognormal(5.1, 0.4, PAIRS):
            pair = {name: piece(length / 2 * rng.uniform(0.7, 1.3)) for name in ("prompt", "chosen", "rejected")}
            out.write(json.dumps(pair, ensure_ascii=False) + "\n")


def dump_chats(folder: Path) -> None:
    """``talks.json`` and ``pairs.json``: per step, the conversations that our DataModules yield.

    A conversation is ``[ids, trained]``; of a pair the first is the chosen one.
    """
    from llmrecipes.data import ChatExamples, PreferencePairs

    for kind, name in ((ChatExamples, "talks"), (PreferencePairs, "pairs")):
        data = kind(
            {str(folder / f"{name}.jsonl"): 1.0},
            tokenizer=str(folder / "unigram"),
            template=str(TEMPLATE),
            seq_len=CHAT_SEQ_LEN,
            micro_batch=CHAT_ROWS,
            global_batch=CHAT_ROWS,
            split="100",
            cache=str(folder / "cache"),
        )
        data.setup("fit")
        batches = itertools.islice(data.train_dataloader(), CHAT_STEPS)
        (folder / f"{name}.json").write_text(json.dumps([_conversations(batch) for batch in batches]))


def _conversations(batch: Any) -> list[list[list[int]]]:
    """Ids, and 1 where an id is trained on, of every conversation of a batch."""
    from llmrecipes.data.batch import IGNORE

    found: list[list[list[int]]] = []
    nothing = [[0] * len(lengths) for lengths in batch.document_lengths]
    rows = (batch.tokens, batch.labels, batch.token_mask, batch.document_lengths, batch.document_prefixes or nothing)
    for tokens, labels, real, lengths, prefixes in zip(*rows, strict=True):
        parts = (row.split(lengths) for row in (tokens, labels, real))
        for ids, after, kept, prefix in zip(*parts, prefixes, strict=True):
            if kept[0]:
                before = found[-1][0][:prefix] if prefix else []
                whole = [*before, *ids.tolist(), int(after[-1])]
                found.append([whole, [0] * (prefix + 1) + (after != IGNORE).int().tolist()])
    return found


def main() -> None:
    """Make what is not there yet."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--to", type=Path, default=Path("runs/bench/inputs"))
    parser.add_argument("--megabytes", type=float, default=100.0, help="of text")
    parser.add_argument(
        "--texts", type=Path, nargs="*", default=[], help="JSONL with a field text; absent = the demo's"
    )
    parser.add_argument("--vocab", type=int, default=4_000, help="of the tokenizers trained on them")
    asked = parser.parse_args()
    folder: Path = asked.to
    folder.mkdir(parents=True, exist_ok=True)
    for name in SIZES:
        if not (folder / f"{name}.ours").exists():
            make_weights(folder, name)
    if not (folder / "batches.npy").exists():
        write_tokens(folder / "tokens", (BATCHES + 8) * ROWS * SEQ_LEN, seed=0)
        dump_batches(folder, folder / "tokens")
    if not (folder / "corpus.json").exists():
        write_tokens(folder / "corpus", READ_TOKENS, seed=1)
    if not (folder / "corpus_tenth.json").exists():
        write_tokens(folder / "corpus_tenth", READ_TOKENS // 10, seed=2)
    if not (folder / "bpe").exists():
        write_texts(folder, asked.megabytes, asked.texts)
        make_tokenizers(folder, asked.vocab)
    if not (folder / "pairs.json").exists():
        write_chats(folder)
        dump_chats(folder)
    print(f"inputs in {folder}")


if __name__ == "__main__":
    main()

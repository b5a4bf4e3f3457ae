"""``llmrecipes ensemble``: opens the experts, scores texts or continues prompts."""

from __future__ import annotations

import json
from argparse import Namespace
from dataclasses import asdict
from pathlib import Path

import torch

from data_prep.domain_vectors import Domains
from llmrecipes.inference.ensemble import Ensemble, score
from llmrecipes.inference.generate_command import encode
from llmrecipes.inference.opened import open_model
from llmrecipes.inference.perplexity_command import window_of
from llmrecipes.inference.prompts import make
from llmrecipes.inference.report import table
from llmrecipes.inference.stream import Writer
from llmrecipes.inference.texts import read_documents
from llmrecipes.models import Sampling, generate_batch


def run(args: Namespace) -> int:
    """The command, from its parsed options."""
    domains = Domains.read(Path(args.domains))
    experts = [open_model(folder, args.dtype) for folder in args.models]
    ensemble = Ensemble(experts, domains, args.distance_temperature, args.top_experts)
    return _continue(ensemble, args) if args.prompt else _score(ensemble, args)


def _score(ensemble: Ensemble, args: Namespace) -> int:
    first = ensemble.experts[0]
    size, stride = window_of(first.name, first.max_seq_len, first.hard_limit, args.window, args.stride)
    documents = list(read_documents(args.text, args.input, args.field, args.max_documents))
    found = score(ensemble, documents, size, stride)
    if args.json:
        print(json.dumps(asdict(found), ensure_ascii=False))
        return 0
    print(table([*found.experts, found.uniform, found.ensemble]))
    shares = "  ".join(f"{weight:.3f}" for weight in found.mean_weights)
    print(f"mean weights {shares}  (T {ensemble.temperature}; windows of {size} tokens, stride {stride})")
    return 0


def _continue(ensemble: Ensemble, args: Namespace) -> int:
    first, *others = ensemble.experts
    prompts = [make(text, chat=False, system=None) for text in args.prompt]
    ids = encode(first, prompts)
    writers = [Writer(first.codec.decode, one) for one in ids]
    done = generate_batch(
        first.model,
        ids,
        args.max_new_tokens,
        sampling=Sampling(temperature=args.temperature),
        generators=[torch.Generator().manual_seed(args.seed + number) for number in range(len(prompts))],
        eos_ids=first.codec.eos_ids,
        vocab_size=first.vocab_size,
        listener=lambda number, token: token not in first.codec.eos_ids and writers[number].add(token),
        others=[expert.model for expert in others],
        weigh=lambda texts: ensemble.weights([first.codec.decode(ids) for ids in texts]),
    )
    for prompt, writer, written in zip(prompts, writers, done, strict=True):
        writer.end()
        text = prompt.text + writer.text
        print(json.dumps({"text": text, "finish": written.finish}, ensure_ascii=False) if args.json else text)
    return 0

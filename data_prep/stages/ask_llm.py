"""`llmrecipes data ask-llm`: every document scored by a language model; a threshold or the best fraction stays."""

from __future__ import annotations

import json
from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np

from data_prep.ask_llm import TEMPLATES, YES, Scorer
from data_prep.frame.chance import digest
from data_prep.frame.config import Finding, StageConfig
from data_prep.frame.map import Judge, Verdict, map_pass
from data_prep.frame.records import Broken, Document, read_documents, write_json
from data_prep.frame.shards import Advance, Shard, find_shards, open_output, run_shards
from data_prep.stages.dedup import save_arrays


@dataclass(frozen=True, kw_only=True)
class AskLlmConfig(StageConfig):
    """Recipe of `data ask-llm`.

    Args:
        model: Hugging Face folder of a causal language model; `llmrecipes convert to-hf` makes one of our checkpoints.
        template: the question: document_en, document_ja, conversation_en, conversation_ja, or a text with {text}.
        yes: answers that count as yes, each one token; null takes those of the template's language.
        conversation: the field holds a list of messages (role, content), and each answer of the assistant is scored;
            the score of a conversation is its lowest.
        max_tokens: of a prompt; longer texts are cut.
        batch_size: prompts at a time.
        device: cpu, cuda or cuda:1.
        threshold: smallest score that stays; null keeps all and only writes the scores.
        top_fraction: or, the best such share of all documents stays; ties by hash.
        score_field: name of the field to write the score into.
        save_every: documents after which scores are kept for a restart.
    """

    model: str
    template: str = "document_ja"
    yes: list[str] | None = None
    conversation: bool = False
    max_tokens: int = 512
    batch_size: int = 16
    device: str = "cpu"
    threshold: float | None = None
    top_fraction: float | None = None
    score_field: str = "askllm_score"
    save_every: int = 256

    @property
    def reads_conversations(self) -> bool:
        """Whether the field holds messages."""
        return self.conversation

    def problems(self) -> Iterator[Finding]:
        """Two ways to choose at once, and unknown templates."""
        yield from super().problems()
        if self.threshold is not None and self.top_fraction is not None:
            yield ("top_fraction",), "threshold and top_fraction are two ways to choose", "keep one"
        if self.top_fraction is not None and not 0 < self.top_fraction <= 1:
            yield ("top_fraction",), f"top_fraction: {self.top_fraction} is no share", "write 0.3"
        if self.template not in TEMPLATES and "{text}" not in self.template:
            yield ("template",), f"template: {self.template!r} is not known", f"known: {', '.join(TEMPLATES)}"
        if self.yes is None and self.template not in TEMPLATES:
            yield ("yes",), "yes is missing: a template of your own needs its answers", "write yes: [yes, Yes]"

    def missing(self) -> Iterator[Finding]:
        """The model."""
        yield from super().missing()
        if not Path(self.model).is_dir():
            yield ("model",), f"model: {self.model}: no such folder", "name a Hugging Face folder"


def ask_llm(config: AskLlmConfig) -> None:
    """Scores all documents, then keeps what the recipe says."""
    shards = find_shards(config.input)
    output = open_output("ask-llm", config, shards)
    found = run_shards(_score_file, "scores", config, shards, output)
    if found is None:
        print("run the same command again when the other tasks are done")
        return
    _plan(config, shards, output)
    map_pass("ask-llm", config, make_judge, shards, output, {})


def _score_file(config: AskLlmConfig, shard: Shard, output: Path, advance: Advance) -> dict[str, Any]:
    """Scores of one file's documents; what an interrupted run had scored is taken over."""
    scorer = make_scorer(config)
    file = output / ".done" / "scores" / f"{shard.name}.npz"
    file.parent.mkdir(parents=True, exist_ok=True)
    begun = file.with_suffix(".begun.npz")
    known, batch = _load(begun) if begun.is_file() else {}, list[Document]()
    limit = config.max_document_mb * 1e6
    for document in read_documents(shard.path, config.field, limit, advance, conversation=config.conversation):
        if isinstance(document, Broken) or known.get(document.line, (-1, 0.0))[0] == _key(document):
            continue
        batch.append(document)
        if len(batch) >= config.save_every:
            known |= _scored(config, scorer, batch)
            batch = []
            _save(begun, known)
    known |= _scored(config, scorer, batch)
    _save(file, known)
    begun.unlink(missing_ok=True)
    return {"documents": len(known)}


Scores = dict[int, tuple[int, float]]  # line -> (hash of the line, score)


def _key(document: Document) -> int:
    return digest(document.raw, purpose="ask-llm") >> 1


def _scored(config: AskLlmConfig, scorer: Scorer, batch: list[Document]) -> Scores:
    """Scores of some documents; of a conversation the lowest of its answers."""
    if not batch:
        return {}
    texts, owner = list[str](), list[int]()
    for place, document in enumerate(batch):
        mine = answers(document.record[config.field]) if config.conversation else [document.text]
        texts += mine
        owner += [place] * len(mine)
    scores = scorer.scores(texts, config.batch_size)
    lowest = np.full(len(batch), 1.0)
    np.minimum.at(lowest, owner, scores)
    lowest[sorted(set(range(len(batch))) - set(owner))] = 0.0  # no answer at all
    return {d.line: (_key(d), float(score)) for d, score in zip(batch, lowest, strict=True)}


def answers(messages: list[dict[str, str]]) -> list[str]:
    """The conversation up to and with each answer of the assistant."""
    lines = [f"{message['role']}: {message['content']}" for message in messages]
    return ["\n".join(lines[: n + 1]) for n, message in enumerate(messages) if message["role"] == "assistant"]


def _save(file: Path, known: Scores) -> None:
    lines = sorted(known)
    save_arrays(
        file,
        {
            "line": np.array(lines, dtype=np.int64),
            "key": np.array([known[line][0] for line in lines], dtype=np.int64),
            "score": np.array([known[line][1] for line in lines], dtype=np.float64),
        },
    )


def _load(file: Path) -> Scores:
    with np.load(file) as saved:
        columns = (saved[name].tolist() for name in ("line", "key", "score"))
        return {line: (key, score) for line, key, score in zip(*columns, strict=True)}


def make_scorer(config: AskLlmConfig) -> Scorer:
    """The model of a recipe."""
    language = config.template.rpartition("_")[2]
    yes = YES[language] if config.yes is None else config.yes
    template = TEMPLATES.get(config.template, config.template)
    return Scorer(config.model, template, yes, config.max_tokens, config.device)


def _plan(config: AskLlmConfig, shards: list[Shard], output: Path) -> None:
    """The smallest (score, hash) that stays."""
    limit = [-1.0, -1] if config.threshold is None else [config.threshold, -1]
    if config.top_fraction is not None:
        found = [
            (score, key)
            for shard in shards
            for key, score in _load(output / ".done" / "scores" / f"{shard.name}.npz").values()
        ]
        count = round(config.top_fraction * len(found))
        limit = list(sorted(found, reverse=True)[count - 1]) if count else [2.0, 0]
    write_json(output / ".done" / "limit.json", limit)


def make_judge(config: AskLlmConfig, shard: Shard) -> Judge:
    """The judge of one file's documents."""
    output = Path(config.output)
    scores = _load(output / ".done" / "scores" / f"{shard.name}.npz")
    least, least_key = json.loads((output / ".done" / "limit.json").read_text())

    def judge(document: Document) -> Verdict:
        key, score = scores[document.line]
        if (score, key) < (least, least_key):
            return Verdict(document.text, "low_score")
        return Verdict(document.text, added={config.score_field: round(score, 6)})

    return lambda documents: [judge(document) for document in documents]

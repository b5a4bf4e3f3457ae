"""The order of a mixture: which document comes next, so that every stretch of a stage has the shares it was given."""

from __future__ import annotations

from dataclasses import dataclass, field
from typing import Any, NamedTuple

import numpy as np


class Source(NamedTuple):
    """Documents of a source: index [D], tokens [D], and a hash [D] that decides their order."""

    documents: np.ndarray
    tokens: np.ndarray
    order: np.ndarray


class Realised(NamedTuple):
    """Tokens and documents (repeats counted)."""

    tokens: int
    documents: int


@dataclass
class Plan:
    """For each stage the documents in order; (stage, source) -> planned tokens, what became of them, epochs so far."""

    stages: dict[str, np.ndarray] = field(default_factory=dict)
    planned: dict[tuple[str, str], float] = field(default_factory=dict)
    realised: dict[tuple[str, str], Realised] = field(default_factory=dict)
    epochs: dict[tuple[str, str], float] = field(default_factory=dict)
    warnings: list[str] = field(default_factory=list)

    def to_json(self) -> dict[str, Any]:
        """As plain data."""
        found: dict[str, Any] = {}
        for (stage, source), tokens in self.planned.items():
            found.setdefault(stage, {})[source] = {
                "planned_tokens": round(tokens),
                **self.realised[stage, source]._asdict(),
                "epochs": round(self.epochs[stage, source], 3),
            }
        return found


class _Reader:
    """Reads a source document by document, each epoch in another order, up to a number of epochs."""

    def __init__(self, source: Source, max_epochs: int) -> None:
        self.source, self.max_epochs = source, max_epochs
        self.epoch, self.taken = -1, 0
        self._documents: list[int] = []
        self._tokens: list[int] = []
        self._next_epoch()

    def _next_epoch(self) -> None:
        self.epoch += 1
        salted = (self.source.order.astype(np.uint64) ^ np.uint64(self.epoch)) * np.uint64(0x9E3779B97F4A7C15)
        order = np.lexsort((self.source.order, salted ^ (salted >> np.uint64(32))))
        self._documents = self.source.documents[order].tolist()[::-1]
        self._tokens = self.source.tokens[order].tolist()[::-1]

    @property
    def is_empty(self) -> bool:
        return not self._documents and (self.epoch + 1 >= self.max_epochs or not len(self.source.documents))

    @property
    def epochs(self) -> float:
        total = len(self.source.documents)
        return self.epoch + (1 - len(self._documents) / total) if total else 0.0

    def take(self) -> tuple[int, int]:
        """The next document and its tokens."""
        if not self._documents:
            self._next_epoch()
        return self._documents.pop(), self._tokens.pop()


def make_plan(sources: dict[str, Source], stages: list[tuple[str, int, dict[str, float]]], max_epochs: int) -> Plan:
    """Takes the next document from the source that is furthest behind its share (Megatron's rule, by tokens).

    Args:
        sources: by name.
        stages: name, tokens and weights of each.
        max_epochs: a source that was read so often gives no more; the others share what it lacks.
    """
    plan = Plan()
    readers = {name: _Reader(source, max_epochs) for name, source in sources.items()}
    for stage, budget, weights in stages:
        _fill_stage(plan, readers, stage, budget, {name: weight for name, weight in weights.items() if weight > 0})
    return plan


def _fill_stage(plan: Plan, readers: dict[str, _Reader], stage: str, budget: int, weights: dict[str, float]) -> None:
    whole = sum(weights.values())
    got, counts = dict.fromkeys(weights, 0), dict.fromkeys(weights, 0)
    documents, total, open_sources = list[int](), 0, dict(weights)
    while total < budget and open_sources:
        share = sum(open_sources.values())
        # How far behind each would be if the next document made no difference.
        behind = max(open_sources, key=lambda name: open_sources[name] / share * (total + 1) - got[name])
        if readers[behind].is_empty:
            del open_sources[behind]
            plan.warnings.append(f"{stage}: {behind} is used up after {readers[behind].epochs:.1f} epochs")
            continue
        document, tokens = readers[behind].take()
        documents.append(document)
        got[behind] += tokens
        counts[behind] += 1
        total += tokens
    if total < budget:
        plan.warnings.append(f"{stage}: only {total:,} of {budget:,} tokens: all its sources are used up")
    plan.stages[stage] = np.array(documents, dtype=np.int64)
    for name in weights:
        plan.planned[stage, name] = budget * weights[name] / whole
        plan.realised[stage, name] = Realised(got[name], counts[name])
        plan.epochs[stage, name] = readers[name].epochs


def table(plan: Plan) -> str:
    """Planned against realised tokens, a line for each stage and source."""
    lines = [
        f"{'stage':<14} {'source':<16} {'planned':>15} {'realised':>15} {'share':>7} {'documents':>11} {'epochs':>7}"
    ]
    for (stage, source), planned in plan.planned.items():
        found = plan.realised[stage, source]
        whole = sum(r.tokens for (s, _), r in plan.realised.items() if s == stage)
        lines.append(
            f"{stage:<14} {source:<16} {planned:>15,.0f} {found.tokens:>15,} {found.tokens / max(1, whole):>7.1%} "
            f"{found.documents:>11,} {plan.epochs[stage, source]:>7.2f}"
        )
    return "\n".join(lines)

"""Counts of one stage: what came in, what went out, and why the rest did not. They must add up."""

from __future__ import annotations

from dataclasses import asdict, dataclass, field
from typing import Any

from data_prep.frame.chance import digest

SHOWN_CHARACTERS = 300  # of a rejected document, in the manifest
NUM_PROBLEMS = 20  # broken lines named one by one


@dataclass
class Flow:
    """Documents, and characters, UTF-8 bytes and (when a tokenizer is named) tokens of their texts."""

    documents: int = 0
    characters: int = 0
    num_bytes: int = 0
    tokens: int = 0

    def add(self, other: Flow) -> None:
        """Adds another's counts."""
        self.documents += other.documents
        self.characters += other.characters
        self.num_bytes += other.num_bytes
        self.tokens += other.tokens


@dataclass
class Tally:
    """Counts of a stage over some documents; those of two sets of documents can be merged in any order.

    Attributes:
        read: every document (line), also one that could not be decoded (its characters count as none).
        kept: what was written, as it was written.
        rejected: for each reason.
        trimmed: for each rule, how many kept documents it changed, and by how many characters (negative: more).
        samples: for each reason, the (hash, text) of a few documents, chosen by their hash.
        problems: the first broken lines, `file:line: why`.
        num_problems: how many there are.
        notes: how often a stage noted something about a document.
    """

    read: Flow = field(default_factory=Flow)
    kept: Flow = field(default_factory=Flow)
    rejected: dict[str, Flow] = field(default_factory=dict)
    trimmed: dict[str, list[int]] = field(default_factory=dict)
    samples: dict[str, list[tuple[int, str]]] = field(default_factory=dict)
    problems: list[str] = field(default_factory=list)
    num_problems: int = 0
    notes: dict[str, int] = field(default_factory=dict)

    def reject(self, reason: str, flow: Flow, text: str, num_samples: int) -> None:
        """Counts a rejected document."""
        self.rejected.setdefault(reason, Flow()).add(flow)
        if text:
            self._sample(reason, [(digest(text, purpose="sample"), text[:SHOWN_CHARACTERS])], num_samples)

    def trim(self, rule: str, characters: int) -> None:
        """Counts what a rule cut out of a document that is kept."""
        counts = self.trimmed.setdefault(rule, [0, 0])
        counts[0] += 1
        counts[1] += characters

    def problem(self, text: str) -> None:
        """Names a broken line."""
        self.num_problems += 1
        if len(self.problems) < NUM_PROBLEMS:
            self.problems.append(text)

    def _sample(self, reason: str, texts: list[tuple[int, str]], num_samples: int) -> None:
        both = {(number, shown) for number, shown in [*self.samples.get(reason, []), *texts]}
        self.samples[reason] = sorted(both)[:num_samples]

    def merge(self, other: Tally, num_samples: int) -> None:
        """Adds the counts of other documents."""
        self.read.add(other.read)
        self.kept.add(other.kept)
        for reason, flow in other.rejected.items():
            self.rejected.setdefault(reason, Flow()).add(flow)
        for rule, (documents, characters) in other.trimmed.items():
            counts = self.trimmed.setdefault(rule, [0, 0])
            counts[0] += documents
            counts[1] += characters
        for reason, texts in other.samples.items():
            self._sample(reason, texts, num_samples)
        self.problems = (self.problems + other.problems)[:NUM_PROBLEMS]
        self.num_problems += other.num_problems
        for note, count in other.notes.items():
            self.notes[note] = self.notes.get(note, 0) + count

    def check(self) -> None:
        """Asserts that everything is accounted for: read = kept + rejected, less what was trimmed."""
        out = Flow()
        for flow in (self.kept, *self.rejected.values()):
            out.add(flow)
        assert out.documents == self.read.documents, (out, self.read)
        trimmed = sum(characters for _, characters in self.trimmed.values())
        assert out.characters + trimmed == self.read.characters, (out, trimmed, self.read)

    def to_json(self) -> dict[str, Any]:
        """As plain data, reasons in order of their names."""
        return {key: dict(sorted(v.items())) if isinstance(v, dict) and key in _BY_REASON else v
                for key, v in asdict(self).items()}  # fmt: skip

    @classmethod
    def from_json(cls, data: dict[str, Any]) -> Tally:
        """From plain data."""
        return cls(
            read=Flow(**data["read"]),
            kept=Flow(**data["kept"]),
            rejected={reason: Flow(**flow) for reason, flow in data["rejected"].items()},
            trimmed={rule: list(counts) for rule, counts in data["trimmed"].items()},
            samples={reason: [(h, text) for h, text in texts] for reason, texts in data["samples"].items()},
            problems=list(data["problems"]),
            num_problems=data["num_problems"],
            notes=dict(data["notes"]),
        )

    def table(self, tokens: bool) -> str:
        """The counts as lines to print."""
        rows = [("read", self.read), *(("- " + r, f) for r, f in sorted(self.rejected.items())), ("kept", self.kept)]
        head = f"{'':<28} {'documents':>11} {'characters':>14} {'MB':>9}" + (f" {'tokens':>13}" if tokens else "")
        lines = [head]
        for name, flow in rows:
            line = f"{name:<28} {flow.documents:>11,} {flow.characters:>14,} {flow.num_bytes / 1e6:>9.1f}"
            lines.append(line + (f" {flow.tokens:>13,}" if tokens else ""))
        lines += [
            f"  cut by {rule:<19} {documents:>11,} {characters:>14,}"
            for rule, (documents, characters) in sorted(self.trimmed.items())
        ]
        lines += [f"  {problem}" for problem in self.problems]
        if self.num_problems > len(self.problems):
            lines.append(f"  and {self.num_problems - len(self.problems):,} more broken lines")
        return "\n".join(lines)


_BY_REASON = ("rejected", "trimmed", "samples", "notes")

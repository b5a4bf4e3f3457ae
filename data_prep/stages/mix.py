"""`llmrecipes data mix`: sources into stages by tokens, in an order that only hashes decide; nothing is lost.

Passes: tokens of every document (file by file), a plan (one process), the documents of each file in the order of the
result files they go to, and the result files. (A source system took batches of 100 records in turn: it lost the last,
partial one and shuffled without a seed.)
"""

from __future__ import annotations

import hashlib
import json
import shutil
from collections.abc import Callable, Iterator
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import numpy as np

from data_prep.frame.chance import digest, unit
from data_prep.frame.config import Finding, StageConfig
from data_prep.frame.map import count_broken, token_counter, write_manifest
from data_prep.frame.records import ENDINGS, Broken, JsonlWriter, partial_name, read_documents, write_json
from data_prep.frame.shards import Advance, Shard, find_shards, open_output, run_shards
from data_prep.frame.tally import Flow, Tally
from data_prep.mix_plan import Plan, Realised, Source, make_plan, table
from data_prep.stages.dedup import save_arrays


@dataclass(frozen=True, kw_only=True)
class MixStage:
    """One stage of the curriculum.

    Args:
        name: of its folder.
        tokens: how many tokens it has.
        weights: share of each source in them; they need not sum to 1.
    """

    name: str
    tokens: int
    weights: dict[str, float]


@dataclass(frozen=True, kw_only=True)
class MixConfig(StageConfig):
    """Recipe of `data mix`; `sources` stands for `input`, and `tokenizer` is required.

    Args:
        sources: name of each source and its files or folders.
        stages: what is trained on, one after another; a source goes on where the stage before left it.
        max_epochs: how often a source may be read in all; what it cannot give is taken from the others.
        validation: share of each source's documents, chosen by hash, that no stage gets: valid/SOURCE.
        shard_mb: size of the result files, in text.
    """

    sources: dict[str, list[str]]
    stages: list[MixStage]
    input: list[str] = field(default_factory=list)
    max_epochs: int = 4
    validation: float = 0.005
    shard_mb: float = 256.0

    def problems(self) -> Iterator[Finding]:
        """Weights of unknown sources, stages without tokens, names that clash."""
        if self.input:
            yield ("input",), "input: mix takes its files from sources", "remove it"
        if self.tokenizer is None:
            yield ("tokenizer",), "tokenizer is missing: sources are mixed by tokens", "name its folder"
        if self.workers < 1 or self.max_epochs < 1 or self.shard_mb <= 0 or not 0 <= self.validation < 1:
            yield (), "workers, max_epochs and shard_mb are positive, validation is a share below 1", "correct them"
        names = [stage.name for stage in self.stages]
        for number, stage in enumerate(self.stages):
            for source in stage.weights:
                if source not in self.sources:
                    known = f"sources: {', '.join(self.sources)}"
                    yield ("stages", number, "weights", source), f"{stage.name}: there is no source {source!r}", known
            if stage.tokens <= 0 or not any(weight > 0 for weight in stage.weights.values()):
                yield ("stages", number), f"{stage.name}: tokens and a weight must be positive", "correct them"
            if min(stage.weights.values(), default=0) < 0:
                yield ("stages", number, "weights"), f"{stage.name}: a weight is negative", "write 0 to leave one out"
            if names.count(stage.name) > 1 or stage.name in ("valid", "manifest.json", "") or "/" in stage.name:
                yield ("stages", number, "name"), f"stage name {stage.name!r} is taken or no folder's", "choose another"


def mix(config: MixConfig) -> None:
    """Mixes, and writes what was planned and what became of it."""
    shards, owner = _source_shards(config)
    output = open_output("mix", config, shards)
    counted = run_shards(_count_tokens, "tokens", config, shards, output)
    if counted is None:
        print("run the same command again when the other tasks are done: the plan needs all counts")
        return
    key = hashlib.sha256(json.dumps(counted, sort_keys=True).encode()).hexdigest()
    done = output / ".done" / "plan.json"
    if not (done.is_file() and json.loads(done.read_text())["key"] == key):
        _write_plan(config, shards, owner, output)
        shutil.rmtree(output / ".done" / "files", ignore_errors=True)
        shutil.rmtree(output / ".done" / "spool", ignore_errors=True)
        write_json(done, {"key": key})
    files = [Shard(path, f"{path.parent.name}/{path.stem}") for path in sorted(_parts(output).glob("*/*.npz"))]
    if not all((output / ".done" / "files" / f"{file.name}.json").is_file() for file in files):
        if run_shards(_spool, "spool", config, shards, output) is None:
            print("run the same command again when the other tasks are done")
            return
        if run_shards(_write_file, "files", config, files, output) is None:
            return
    tally = Tally()
    for shard in shards:
        tally.merge(Tally.from_json(counted[shard.name]["tally"]), config.samples)
    plan = json.loads((output / ".done" / "table.json").read_text())
    for name, flow in plan["unused"].items():
        tally.reject(f"not_reached_{name}", Flow(**flow), "", 0)
    tally.kept = Flow(**plan["used"])
    write_manifest("mix", config, shards, output, tally, {"stages": plan["stages"], "validation": plan["validation"]})
    print(plan["table"])
    shutil.rmtree(output / ".done" / "spool-data", ignore_errors=True)


def _source_shards(config: MixConfig) -> tuple[list[Shard], dict[Shard, str]]:
    """All files, named SOURCE/file, and the source of each."""
    owner = {
        Shard(shard.path, f"{source}/{shard.name}"): source
        for source, names in config.sources.items()
        for shard in find_shards(names)
    }
    return list(owner), owner


def _parts(output: Path) -> Path:
    return output / ".done" / "plan"


def _count_tokens(config: MixConfig, shard: Shard, output: Path, advance: Advance) -> dict[str, Any]:
    """Line, hash and sizes of every document of a file."""
    count, tally, rows = token_counter(config.tokenizer), Tally(), list[tuple[int, ...]]()
    for document in read_documents(shard.path, config.field, config.max_document_mb * 1e6, advance):
        if isinstance(document, Broken):
            count_broken(document, shard, tally, config.samples)
            continue
        flow = Flow(1, len(document.text), document.num_bytes, count(document.text) + 1)  # and the end of the document
        tally.read.add(flow)
        held_out = unit(document.text, config.seed, "validation") < config.validation
        # Documents of one source that are equal differ by their place only: the order is then that of their records.
        rows.append((document.line, held_out, flow.characters, flow.num_bytes, flow.tokens))
        rows[-1] += (digest(document.raw, config.seed, "order") >> 1,)
    file = output / ".done" / "tokens" / f"{shard.name}.npz"
    file.parent.mkdir(parents=True, exist_ok=True)
    save_arrays(file, {"rows": np.array(rows, dtype=np.int64).reshape(-1, 6)})
    return {"tally": tally.to_json(), "sha256": hashlib.sha256(file.read_bytes()).hexdigest()}


def _write_plan(config: MixConfig, shards: list[Shard], owner: dict[Shard, str], output: Path) -> None:
    """Which document goes where: one small file for each result file, and the table."""
    rows = {}
    for shard in shards:
        with np.load(output / ".done" / "tokens" / f"{shard.name}.npz") as saved:
            rows[shard] = saved["rows"]
    shard_of = np.repeat(np.arange(len(shards)), [len(rows[shard]) for shard in shards])
    everything = np.concatenate([rows[shard] for shard in shards])
    line, held_out, characters, num_bytes, tokens, order = everything.T
    name_of = np.array([owner[shard] for shard in shards])[shard_of]
    sources = {}
    for name in config.sources:
        members = np.flatnonzero((name_of == name) & (held_out == 0))
        sources[name] = Source(members, tokens[members], order[members])
    plan = make_plan(sources, [(s.name, s.tokens, s.weights) for s in config.stages], config.max_epochs)
    uses = {**plan.stages}
    for name in config.sources:
        held = np.flatnonzero((name_of == name) & (held_out == 1))
        uses[f"valid/{name}"] = held[np.argsort(order[held], kind="stable")]
    shutil.rmtree(_parts(output), ignore_errors=True)
    for name, documents in uses.items():
        ends = np.cumsum(num_bytes[documents])
        part = (ends - num_bytes[documents]) // int(config.shard_mb * 1e6)
        folder, _, stem = name.rpartition("/")
        for number in range(int(part.max()) + 1 if len(part) else 1):
            chosen = documents[part == number]
            file = _parts(output) / (folder or name) / (f"{stem}-{number:05d}.npz" if folder else f"{number:05d}.npz")
            file.parent.mkdir(parents=True, exist_ok=True)
            save_arrays(file, {"shard": shard_of[chosen], "line": line[chosen]})
    used = np.zeros(len(line), dtype=bool)
    for documents in uses.values():
        used[documents] = True
    flows = {name: _flow((name_of == name) & ~used, characters, num_bytes, tokens) for name in config.sources}
    realised = {name: Realised(int(tokens[d].sum()), len(d)) for name, d in uses.items() if name.startswith("valid/")}
    write_json(
        output / ".done" / "table.json",
        {
            "used": _flow(used, characters, num_bytes, tokens).__dict__,
            "unused": {name: flow.__dict__ for name, flow in flows.items() if flow.documents},
            "stages": plan.to_json(),
            "validation": {name.partition("/")[2]: found._asdict() for name, found in realised.items()},
            "table": table(plan) + _warnings(config, plan),
        },
    )


def _flow(chosen: np.ndarray, characters: np.ndarray, num_bytes: np.ndarray, tokens: np.ndarray) -> Flow:
    sums = (int(column[chosen].sum()) for column in (characters, num_bytes, tokens))
    return Flow(int(chosen.sum()), *sums)


def _warnings(config: MixConfig, plan: Plan) -> str:
    found = [f"\nwarning: {text}" for text in plan.warnings]
    total = sum(stage.tokens for stage in config.stages)
    if len(config.stages) > 1 and (last := config.stages[-1]).tokens < 0.02 * total:
        share = f"{100 * last.tokens / total:.1f} %"
        found.append(
            f"\nwarning: the last stage {last.name} has {share} of all tokens: watch the loss of other domains"
        )
    return "".join(found)


def _spool(config: MixConfig, shard: Shard, output: Path, advance: Advance) -> dict[str, Any]:
    """The lines of a file in the order of the result files they go to, and where those of each result file are."""
    number = [s.name for s in _source_shards(config)[0]].index(shard.name)
    lines = {
        document.line: document.raw
        for document in read_documents(shard.path, config.field, config.max_document_mb * 1e6, advance)
        if not isinstance(document, Broken)
    }
    data = output / ".done" / "spool-data" / shard.name
    data.parent.mkdir(parents=True, exist_ok=True)
    places: dict[str, Any] = {}
    partial = partial_name(data)
    with partial.open("wb") as stream:
        for part in sorted(_parts(output).glob("*/*.npz")):
            with np.load(part) as plan:
                chosen = plan["line"][plan["shard"] == number].tolist()
            if chosen:
                places[f"{part.parent.name}/{part.stem}"] = stream.tell()
                stream.writelines(lines[line] + b"\n" for line in chosen)
    partial.replace(data)
    return places


def _write_file(config: MixConfig, shard: Shard, output: Path, advance: Advance) -> dict[str, Any]:
    """One result file, its documents drawn from the spools in the order of the plan."""
    shards, _ = _source_shards(config)
    with np.load(shard.path) as plan:
        order = plan["shard"].tolist()
    streams: dict[int, Callable[[], bytes]] = {}
    opened = []
    for number in set(order):
        mark = json.loads((output / ".done" / "spool" / f"{shards[number].name}.json").read_text())
        stream = (output / ".done" / "spool-data" / shards[number].name).open("rb")
        stream.seek(mark["counts"][shard.name])
        opened.append(stream)
        streams[number] = stream.readline
    with JsonlWriter(output / f"{shard.name}{ENDINGS[config.format]}", config.format) as writer:
        for number in order:
            writer.write_line(streams[number]().removesuffix(b"\n"))
    for stream in opened:
        stream.close()
    advance(shard.path.stat().st_size)
    return {"documents": len(order)}

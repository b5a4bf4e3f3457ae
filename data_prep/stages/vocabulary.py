"""`llmrecipes data tokenizer build`: a vocabulary for each language, merged by share, scored anew, exported, verified.

The steps parts, merge, reestimate and export may be run one by one; each keeps its result in `<output>.work`, named by
a hash of all that decides it, so that what is done is done.
"""

from __future__ import annotations

import hashlib
import json
import os
import re
import shutil
import time
from collections.abc import Iterator
from dataclasses import asdict, dataclass, field
from pathlib import Path
from typing import Any, Literal

from data_prep.frame.chance import unit
from data_prep.frame.config import Finding
from data_prep.frame.records import write_json
from data_prep.jsonl import check_inputs, fingerprint
from data_prep.tokenizer import (
    MAX_PROBE_CHARACTERS,
    NUM_PROBES,
    SPECIAL_PIECES,
    count_text,
    export,
    fair_shares,
    progress,
    training_lines,
    verify_or_set_aside,
)
from data_prep.vocabulary import (
    DELIMITER,
    Vocabulary,
    clean_part,
    head_pieces,
    merge_parts,
    model_of,
    read_words,
    reestimated,
    train_part,
)
from llmrecipes.errors import UserError

FORMAT = 2  # counts up when the same recipe would give other pieces
_LATIN = re.compile("[A-Za-zＡ-Ｚａ-ｚ]+")


@dataclass(frozen=True, kw_only=True)
class VocabularyPart:
    """One language.

    Args:
        files: JSONL files or dataset folders.
        vocab_size: pieces to train; about a fifth more than are to stay.
        max_piece_length: characters in a piece: 8 for Japanese, 16 for English.
        presegment: fugashi cuts Japanese into words that no piece crosses; none leaves that to the trainer, which gives
            18-41 % more characters per token.
        sample_mb: how much text to train on; more files share it equally.
        drop_latin: leave pieces of Latin letters to the other parts.
    """

    files: list[str]
    vocab_size: int
    max_piece_length: int = 16
    presegment: Literal["fugashi", "none"] = "none"
    sample_mb: float = 100.0
    drop_latin: bool = False


@dataclass(frozen=True, kw_only=True)
class VocabularyConfig:
    """Recipe of `data tokenizer build`.

    Args:
        parts: the languages.
        output: tokenizer folder to write.
        vocab_size: of the whole, exactly; a multiple of `multiple_of`.
        japanese_share: of the pieces; the rest are English, mathematics and code.
        multiple_of: what embeddings can be divided by.
        words: files of words to take in, one a line.
        specials: special pieces; unknown, begin, end and padding first.
        reestimate_mb: how much raw text of all parts to score on.
        field: name of the field that holds the text.
        seed: chooses, with a hash of the line, which lines are sampled.
        num_threads: of the trainer.
        overwrite: replace a tokenizer that is there.
    """

    parts: dict[str, VocabularyPart]
    output: str
    vocab_size: int = 56_320
    japanese_share: float = 0.4
    multiple_of: int = 128
    words: list[str] = field(default_factory=list)
    specials: list[str] = field(default_factory=lambda: [*SPECIAL_PIECES, "<CLS>", "<SEP>", "<EOD>", "<MASK>"])
    reestimate_mb: float = 40.0
    field: str = "text"
    seed: int = 0
    num_threads: int = 2
    overwrite: bool = False

    def problems(self) -> Iterator[Finding]:
        """Sizes and shares that cannot be."""
        if self.vocab_size % self.multiple_of:
            near = self.vocab_size // self.multiple_of * self.multiple_of
            what = f"vocab_size: {self.vocab_size} is no multiple of {self.multiple_of}"
            yield ("vocab_size",), what, f"write {near} or {near + self.multiple_of}"
        if not 0 <= self.japanese_share <= 1:
            yield ("japanese_share",), f"japanese_share: {self.japanese_share} is no share", "write 0.4"
        if tuple(self.specials[:4]) != SPECIAL_PIECES:
            yield ("specials",), f"specials: the first four are {', '.join(SPECIAL_PIECES)}", "begin with those"
        if not self.parts:
            yield ("parts",), "parts: none is named", "name at least one language"


def build(config: VocabularyConfig) -> None:
    """All steps; what an earlier run finished is not done again."""
    started = time.perf_counter()
    _check_output(config)
    parts(config)
    merge(config)
    reestimate(config)
    export_scored(config)
    print(f"{config.output}: {config.vocab_size:,} pieces, verified, in {time.perf_counter() - started:.0f} s")


def parts(config: VocabularyConfig) -> None:
    """First step: a vocabulary for each language."""
    for name, part in config.parts.items():
        file = _part_file(config, name)
        if file.is_file():
            print(f"{name}: {len(_load(file)):,} pieces are there already")
            continue
        lines = sampled_lines(part.files, config.field, round(part.sample_mb * 1e6), config.seed)
        if part.drop_latin:
            lines = list(without_latin(lines))
        print(f"{name}: {len(lines):,} lines sampled; training {part.vocab_size:,} pieces", flush=True)
        vocabulary = train_part(
            segmented(lines) if part.presegment == "fugashi" else lines,
            vocab_size=part.vocab_size,
            max_piece_length=part.max_piece_length,
            segmented=part.presegment == "fugashi",
            num_threads=config.num_threads,
        )
        write_json(file, vocabulary)


def merge(config: VocabularyConfig) -> None:
    """Second step: one vocabulary, its shares met."""
    file = _merged_file(config)
    if file.is_file():
        return
    found = {name: clean_part(_load(_part_file(config, name)), p.drop_latin) for name, p in config.parts.items()}
    vocabulary, counts = merge_parts(
        found, read_words(config.words), config.specials, config.vocab_size, config.japanese_share
    )
    assert len(vocabulary) == config.vocab_size == len({piece for piece, _ in vocabulary})
    write_json(file, vocabulary)
    print(f"merged: {counts['head']} head, {counts['japanese']:,} Japanese and {counts['other']:,} other pieces")


def reestimate(config: VocabularyConfig) -> None:
    """Third step: scores on raw text of all parts."""
    file = _scored_file(config)
    if file.is_file():
        return
    merged = _load(_merged_file(config))
    lines = _raw_lines(config)
    print(f"scoring {len(merged):,} pieces on {sum(len(line.encode()) for line in lines) / 1e6:.0f} MB", flush=True)
    write_json(file, reestimated(merged, len(head_pieces(config.specials)), lines, config.num_threads))


def export_scored(config: VocabularyConfig) -> None:
    """Last step: the folder, once sentencepiece and transformers agree on real lines and documents."""
    _check_output(config)
    folder = Path(config.output)
    partial = folder.with_name(f".{folder.name}.{os.getpid()}.tmp")
    try:
        export(model_of(_load(_scored_file(config)), config.specials), partial)
        verify_or_set_aside(partial, folder, _probes(config), True)
        shutil.rmtree(folder, ignore_errors=True)
        partial.rename(folder)
    finally:
        shutil.rmtree(partial, ignore_errors=True)


def _check_output(config: VocabularyConfig) -> None:
    folder = Path(config.output)
    if folder.exists() and not config.overwrite:
        raise UserError(f"{folder}: exists already; choose another output or say --overwrite true")
    if folder.exists() and not (folder / "tokenizer.model").is_file():
        raise UserError(f"{folder}: is not a tokenizer, so it is not overwritten; choose another output")


def sampled_lines(files: list[str], field: str, sample_bytes: int, seed: int) -> list[str]:
    """Lines chosen by their hash, so that order and sharding do not matter; files share the sample equally."""
    paths = check_inputs(files)
    sizes = [count_text(path, field)[1] for path in paths]
    found = list[str]()
    for path, size, share in zip(paths, sizes, fair_shares(sizes, sample_bytes), strict=True):
        for text in progress(path, field, "sampling"):
            found += [line for line in training_lines(text) if unit(line, seed, "sample") * size < share]
    if not found:
        raise UserError(f"{', '.join(files)}: no text to train on")
    return sorted(found)  # the trainer's result depends on the order


def without_latin(lines: list[str]) -> Iterator[str]:
    """Lines cut at runs of Latin letters, without them: pieces that would be dropped must not fill the vocabulary."""
    for line in lines:
        yield from (part for part in _LATIN.split(line) if part.strip())


def segmented(lines: list[str]) -> Iterator[str]:
    """Lines with DELIMITER between words; spaces stay before the word they precede. Lines that hold it are left out."""
    from data_prep.rules.segment import tagger

    parse = tagger()
    for line in lines:
        if DELIMITER not in line:
            yield DELIMITER.join(word.white_space + word.surface for word in parse(line)) or line


def _raw_lines(config: VocabularyConfig) -> list[str]:
    share = round(config.reestimate_mb * 1e6 / len(config.parts))
    return [
        line for part in config.parts.values() for line in sampled_lines(part.files, config.field, share, config.seed)
    ]


def _probes(config: VocabularyConfig) -> list[str]:
    """Lines and whole documents of every part on which the export must prove itself."""
    found = list[str]()
    wanted = max(1, NUM_PROBES // len(config.parts))
    for part in config.parts.values():
        for path in check_inputs(part.files):
            for number, text in enumerate(progress(path, config.field, "probing")):
                if number == wanted // len(part.files):
                    break
                found += [text[:MAX_PROBE_CHARACTERS], *list(training_lines(text))[:2]]
    return found


def _key(config: VocabularyConfig, name: str) -> str:
    """A hash of what decides the vocabulary of a part."""
    part = config.parts[name]
    hashes = [fingerprint(path) for path in check_inputs(part.files)]
    content: dict[str, Any] = {**asdict(part), "files": hashes, "seed": config.seed, "field": config.field}
    return _hash([FORMAT, content])


def _hash(content: Any) -> str:
    return hashlib.sha256(json.dumps(content, sort_keys=True).encode()).hexdigest()[:16]


def _part_file(config: VocabularyConfig, name: str) -> Path:
    return Path(f"{config.output}.work") / f"part-{name}-{_key(config, name)}.json"


def _merged_file(config: VocabularyConfig) -> Path:
    keys = [_key(config, name) for name in config.parts]
    drops = [part.drop_latin for part in config.parts.values()]
    content = [keys, drops, read_words(config.words), config.specials, config.vocab_size, config.japanese_share]
    return Path(f"{config.output}.work") / f"merged-{_hash(content)}.json"


def _scored_file(config: VocabularyConfig) -> Path:
    key = _hash([_merged_file(config).name, config.reestimate_mb])
    return Path(f"{config.output}.work") / f"scored-{key}.json"


def _load(file: Path) -> Vocabulary:
    if not file.is_file():
        step = {"part": "parts", "merged": "merge", "scored": "reestimate"}[file.name.partition("-")[0]]
        raise UserError(f"{file}: is not made yet, for this recipe and these files; run data tokenizer {step} first")
    return [(piece, score) for piece, score in json.loads(file.read_text())]

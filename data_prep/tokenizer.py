"""`llmrecipes data tokenizer`: a SentencePiece unigram model, exported for Hugging Face, checked before it is saved."""

from __future__ import annotations

import hashlib
import io
import json
import os
import re
import shutil
import time
from collections import Counter
from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Any

from data_prep.jsonl import check_inputs, chunks, input_size, parse
from llmrecipes.errors import UserError

if TYPE_CHECKING:
    from sentencepiece import SentencePieceProcessor

_KANJI, _HIRAGANA, _KATAKANA = "\u4e00-\u9fff\u3005", "\u3041-\u309f", "\u30a1-\u30ff"
_WORDS = re.compile(rf" *(?:[{_KANJI}]+|[{_HIRAGANA}]+|[{_KATAKANA}]+|[^ {_KANJI}{_HIRAGANA}{_KATAKANA}]+)| +$")
SPECIAL_PIECES = ("<unk>", "<s>", "</s>", "<pad>")
SPACE = "\u2581"  # SentencePiece's visible space
# SentencePiece adds scores in float32 along the whole document, tokenizers in float64. Sums of multiples of 1/16 are
# exact in both up to a million (over 100,000 tokens), so that near-ties are not broken differently: see verify_export.
SCORE_STEP = 1 / 16
MAX_LINE_CHARACTERS = 1000  # at most 4,000 bytes: SentencePiece drops lines above max_sentence_length
MAX_LINE_BYTES = 4 * MAX_LINE_CHARACTERS
ASCII = "".join(map(chr, range(33, 127)))  # always pieces, however rare: code and chat templates will need them
NEVER = -1e6  # score of a piece that no text may choose
SPLIT_SHARE = 1 / 8  # of the sampled lines are given to the trainer word by word: see split_words
MAX_PROBE_CHARACTERS = 20_000  # of a document, to keep the check short
NUM_PROBES = 1000  # lines, and as many whole documents, on which an export must prove itself


@dataclass(frozen=True)
class Sample:
    """Lines to train on, lines and documents to verify on, and sizes, of all inputs."""

    lines: list[str]
    probes: list[str]
    documents: list[list[str]]  # of each input
    bytes_used: list[int]  # of each input


def train_tokenizer(
    input: list[str],
    output: str,
    vocab_size: int = 16_000,
    seed: int = 0,
    sample_bytes: int = 60_000_000,
    field: str = "text",
    character_coverage: float = 0.9995,
    byte_fallback: bool = True,
    split_digits: bool = True,
    num_threads: int = 2,
    overwrite: bool = False,
) -> None:
    """Trains a SentencePiece unigram tokenizer and saves it for SentencePiece and transformers.

    Every input has an equal share of the sample; what a small input cannot fill goes to the others. Before the folder
    is saved, sentencepiece and transformers' AutoTokenizer must agree on real lines and documents, and restore them.

    Args:
        input: JSONL files (plain, .gz, .zst) or Hugging Face dataset folders.
        output: folder to write: tokenizer.model, tokenizer.json, tokenizer_config.json, special_tokens_map.json.
        vocab_size: number of pieces, exactly, special pieces and bytes included.
        seed: chooses which lines are sampled.
        sample_bytes: about how much text (UTF-8 bytes) to train on.
        field: name of the field that holds the text.
        character_coverage: share of characters that must be pieces of their own; rarer ones become bytes.
        byte_fallback: spell unknown characters as bytes, so that every text survives; without it they become <unk>.
        split_digits: one piece for each digit, which is what arithmetic needs.
        num_threads: threads of the trainer.
        overwrite: replace an existing folder.
    """
    paths = check_inputs(input)
    _check_arguments(Path(output), vocab_size, sample_bytes, byte_fallback, overwrite)
    started = time.perf_counter()
    sample = _sample(paths, field, seed, sample_bytes)
    size = f"{len(sample.lines):,} lines, {sum(sample.bytes_used) / 1e6:.1f} MB"
    print(f"sampled {size}; training {vocab_size:,} pieces", flush=True)
    model = train_model(
        sample.lines,
        vocab_size=vocab_size,
        character_coverage=character_coverage,
        byte_fallback=byte_fallback,
        split_digits=split_digits,
        num_threads=num_threads,
    )
    folder = Path(output)
    partial = folder.with_name(f".{folder.name}.{os.getpid()}.tmp")
    try:
        export(model, partial)
        verify_or_set_aside(partial, folder, sample.probes, byte_fallback)
        report = _report(partial, paths, sample)
        if folder.exists():
            shutil.rmtree(folder)
        partial.rename(folder)
    finally:
        shutil.rmtree(partial, ignore_errors=True)
    print(report)
    print(f"{folder}: {vocab_size:,} pieces, verified, in {time.perf_counter() - started:.0f} s")


def train_model(
    lines: list[str],
    *,
    vocab_size: int,
    character_coverage: float = 0.9995,
    byte_fallback: bool = True,
    split_digits: bool = True,
    num_threads: int = 2,
) -> bytes:
    """A serialized SentencePiece ModelProto trained on `lines` (no newlines inside, <= MAX_LINE_CHARACTERS each).

    The newline is a NORMAL piece of score 0.0. As a user-defined piece it would become an added token of Hugging Face,
    and whole documents would be split differently there than by SentencePiece. Scores are rounded to SCORE_STEP.

    Raises:
        UserError: the text is too small or too uniform for so many pieces.
    """
    import sentencepiece

    writer = io.BytesIO()
    try:
        sentencepiece.SentencePieceTrainer.train(
            sentence_iterator=iter(lines),
            model_writer=writer,
            model_type="unigram",
            vocab_size=vocab_size,
            hard_vocab_limit=True,
            normalization_rule_name="identity",
            byte_fallback=byte_fallback,
            split_digits=split_digits,
            add_dummy_prefix=False,
            remove_extra_whitespaces=False,
            allow_whitespace_only_pieces=True,
            character_coverage=character_coverage,
            required_chars=ASCII,
            max_sentence_length=MAX_LINE_BYTES,
            user_defined_symbols=["\n"],
            unk_id=0,
            bos_id=1,
            eos_id=2,
            pad_id=3,
            unk_piece=SPECIAL_PIECES[0],
            bos_piece=SPECIAL_PIECES[1],
            eos_piece=SPECIAL_PIECES[2],
            pad_piece=SPECIAL_PIECES[3],
            num_threads=num_threads,
            minloglevel=2,
        )
    except (RuntimeError, OSError) as error:
        raise UserError(f"--vocab_size {vocab_size}: " + _why_not(str(error))) from None
    return _finished(writer.getvalue())


def export(model: bytes, folder: Path) -> None:
    """Writes the model for SentencePiece (tokenizer.model) and for transformers (tokenizer.json and its configuration).

    The class is PreTrainedTokenizerFast, never LlamaTokenizer: transformers 5 rebuilds the latter as BPE, whatever the
    files say, and two thirds of all lines silently get other ids.
    """
    import sentencepiece
    from tokenizers import AddedToken, Regex, Tokenizer, decoders, normalizers
    from tokenizers.models import Unigram

    proto = model_proto(model)
    # SentencePiece never finds control and byte pieces in a text; tokenizers would: "</s>", "<0x41>", cheap at 0.0.
    # At this price they lose to single characters, which are pieces all (ASCII).
    pieces = [(piece.piece, piece.score if piece.type == piece.NORMAL else NEVER) for piece in proto.pieces]
    processor = sentencepiece.SentencePieceProcessor(model_proto=model)
    fallback = bool(proto.trainer_spec.byte_fallback)
    fast = Tokenizer(Unigram(pieces, unk_id=processor.unk_id(), byte_fallback=fallback))
    fast.normalizer = normalizers.Replace(Regex(" "), SPACE)
    fast.decoder = decoders.Sequence([decoders.Replace(SPACE, " "), decoders.ByteFallback(), decoders.Fuse()])
    special = [piece.piece for piece in proto.pieces if piece.type in (piece.UNKNOWN, piece.CONTROL)]
    fast.add_special_tokens([AddedToken(piece, special=True, normalized=False) for piece in special])
    names = dict(zip(("unk_token", "bos_token", "eos_token", "pad_token"), SPECIAL_PIECES, strict=True))
    config = {
        "tokenizer_class": "PreTrainedTokenizerFast",
        "clean_up_tokenization_spaces": False,
        "model_max_length": 1_000_000_000,
        **names,
    }
    folder.mkdir(parents=True, exist_ok=True)
    (folder / "tokenizer.model").write_bytes(model)
    fast.save(str(folder / "tokenizer.json"))
    _write_json(folder / "tokenizer_config.json", config)
    _write_json(folder / "special_tokens_map.json", names)


def verify_export(folder: Path, probes: list[str], exact: bool = True) -> None:
    """Proves that sentencepiece and `AutoTokenizer` read the folder alike.

    Ids must be equal, or be the same pieces in another order: equal Viterbi sums (`――` + `―`) are broken differently by
    the two programs, which is harmless. With `exact`, both must restore the text (a literal U+2581 returns as a space).

    Raises:
        UserError: the folder names LlamaTokenizer, or a probe differs; the folder must not be used.
    """
    import sentencepiece
    from transformers import AutoTokenizer, PreTrainedTokenizerFast

    named = json.loads((folder / "tokenizer_config.json").read_text()).get("tokenizer_class")
    if named != "PreTrainedTokenizerFast":
        raise UserError(
            f"{folder}: tokenizer_class is {named}, but must be PreTrainedTokenizerFast: transformers 5 makes another "
            "tokenizer of the same files under other names (a BPE under LlamaTokenizer)"
        )
    processor = sentencepiece.SentencePieceProcessor(model_file=str(folder / "tokenizer.model"))
    fast = AutoTokenizer.from_pretrained(str(folder))
    assert isinstance(fast, PreTrainedTokenizerFast)
    # A literal "</s>" in a web page is text for SentencePiece; here it must be for transformers too.
    fast.backend_tokenizer.encode_special_tokens = True
    if len(fast) != processor.vocab_size():
        sizes = f"{processor.vocab_size()} pieces for sentencepiece, {len(fast)} for transformers"
        raise UserError(f"{folder}: {sizes}; train again")
    problems = []
    for probe in probes:
        ids = processor.encode(probe)
        others = fast.backend_tokenizer.encode(probe, add_special_tokens=False).ids
        if ids != others and Counter(ids) != Counter(others):
            problems.append(f"{folder}: sentencepiece and transformers disagree on {_around(ids, others, processor)}")
        text = probe.replace(SPACE, " ")
        if exact and (processor.decode(ids) != text or fast.decode(others) != text):
            problems.append(f"{folder}: encoding and decoding does not restore {probe[:60]!r}")
    if problems:
        raise UserError(f"{folder}: {len(problems)} of {2 * len(probes)} checks failed", *problems[:10])


def verify_or_set_aside(partial: Path, folder: Path, probes: list[str], exact: bool) -> None:
    """`verify_export`; a failed export, the fruit of minutes of training, is kept for inspection under another name."""
    try:
        verify_export(partial, probes, exact)
    except UserError as error:
        rejected = folder.with_name(folder.name + ".rejected")
        shutil.rmtree(rejected, ignore_errors=True)
        partial.rename(rejected)
        raise UserError(*error.problems, f"{rejected}: the rejected export, for inspection only") from None


def _check_arguments(folder: Path, vocab_size: int, sample_bytes: int, byte_fallback: bool, overwrite: bool) -> None:
    problems = []
    fewest = len(SPECIAL_PIECES) + len(ASCII) + 1 + 256 * byte_fallback
    if vocab_size <= fewest:
        problems.append(f"--vocab_size {vocab_size}: special pieces, ASCII and bytes alone are {fewest}; ask for more")
    if sample_bytes <= 0:
        problems.append(f"--sample_bytes {sample_bytes}: must be positive")
    if folder.exists() and not overwrite:
        problems.append(f"{folder}: exists already; choose another --output or say --overwrite true")
    elif folder.exists() and not (folder / "tokenizer.model").is_file():
        problems.append(f"{folder}: is not a tokenizer, so it is not overwritten; choose another --output")
    if problems:
        raise UserError(*problems)


def _sample(paths: list[Path], field: str, seed: int, sample_bytes: int) -> Sample:
    """Chooses lines by a hash of their place: two passes, the first counts, the second takes."""
    counted = [count_text(path, field) for path in paths]
    shares = fair_shares([size for _, size in counted], sample_bytes)
    lines, probes = list[str](), list[str]()
    documents, used = list[list[str]](), list[int]()
    num_wanted = NUM_PROBES // len(paths)
    for path, (num_documents, size), share in zip(paths, counted, shares, strict=True):
        if not size:
            raise UserError(f"{path}: holds no text; remove it from --input")
        taken, whole, from_here = list[str](), list[str](), 0
        for number, text in enumerate(progress(path, field, "sampling")):
            if _unit_hash(seed, number, -1) * num_documents < num_wanted:
                whole.append(text[:MAX_PROBE_CHARACTERS])
            for place, line in enumerate(training_lines(text)):
                if (chance := _unit_hash(seed, number, place) * size) < share:
                    taken += split_words(line) if chance < share * SPLIT_SHARE else [line]
                    from_here += len(line.encode())
        lines += taken
        stride = max(1, len(taken) // num_wanted)
        probes += taken[::stride] + whole
        documents.append(whole)
        used.append(from_here)
    return Sample(lines, probes, documents, used)


def count_text(path: Path, field: str) -> tuple[int, int]:
    """Documents, and their UTF-8 bytes."""
    num_documents = num_bytes = 0
    for text in progress(path, field, "counting"):
        num_documents += 1
        num_bytes += len(text.encode())
    return num_documents, num_bytes


def training_lines(text: str) -> Iterator[str]:
    """The non-empty lines of a document, long ones cut: SentencePiece trains on lines and drops over-long ones."""
    for line in text.split("\n"):
        for start in range(0, len(line), MAX_LINE_CHARACTERS):
            yield line[start : start + MAX_LINE_CHARACTERS]


def split_words(line: str) -> list[str]:
    """The words of a line, each with the spaces before it; Japanese is cut where kanji, hiragana and katakana meet.

    SentencePiece takes as candidates only strings that are followed by different characters in different places; a word
    that a template always puts before the same next word is none, unless it also ends a line.
    """
    return _WORDS.findall(line)


def fair_shares(sizes: list[int], budget: int) -> list[int]:
    """Splits `budget` equally; what an input is too small to fill goes to the larger ones (water-filling)."""
    shares, left = [0] * len(sizes), budget
    by_size = sorted(range(len(sizes)), key=lambda index: sizes[index])
    for done, index in enumerate(by_size):
        shares[index] = min(sizes[index], left // (len(sizes) - done))
        left -= shares[index]
    return shares


def _unit_hash(seed: int, document: int, line: int) -> float:
    """A number in [0, 1) that depends on the place and the seed only."""
    digest = hashlib.blake2b(f"{seed}/{document}/{line}".encode(), digest_size=8).digest()
    return int.from_bytes(digest, "little") / 2**64


def progress(path: Path, field: str, verb: str) -> Iterator[str]:
    """Every document of an input, with a bar."""
    from tqdm import tqdm

    label = f"{verb} {path.name}"
    with tqdm(total=input_size(path), unit="B", unit_scale=True, desc=label, leave=False, disable=None) as bar:
        for chunk in chunks(path, field):
            yield from parse(chunk, field).texts
            bar.update(chunk.position - bar.n)


def _finished(model: bytes) -> bytes:
    """The trained model with the newline as a NORMAL piece and all scores multiples of SCORE_STEP."""
    proto = model_proto(model)
    [newline] = [piece for piece in proto.pieces if piece.piece == "\n"]
    newline.type, newline.score = type(newline).NORMAL, 0.0
    for piece in proto.pieces:
        piece.score = round(piece.score / SCORE_STEP) * SCORE_STEP
    del proto.trainer_spec.user_defined_symbols[:]
    return proto.SerializeToString()


def model_proto(model: bytes) -> Any:
    """A SentencePiece model as protobuf; of no bytes: an empty one."""
    from sentencepiece import sentencepiece_model_pb2

    proto = sentencepiece_model_pb2.ModelProto()  # type: ignore[attr-defined]
    proto.ParseFromString(model)
    return proto


def _report(folder: Path, paths: list[Path], sample: Sample) -> str:
    import sentencepiece

    processor = sentencepiece.SentencePieceProcessor(model_file=str(folder / "tokenizer.model"))
    rows = [f"{'input':<32} {'trained on':>12} {'characters/token':>17}"]
    for path, texts, used in zip(paths, sample.documents, sample.bytes_used, strict=True):
        tokens = sum(len(ids) for ids in processor.encode(texts))
        rate = f"{sum(map(len, texts)) / tokens:.2f}" if tokens else "-"
        rows.append(f"{path.name:<32} {used / 1e6:>9.1f} MB {rate:>17}")
    return "\n".join(rows)


def _around(ids: list[int], others: list[int], processor: SentencePieceProcessor) -> str:
    """The first place where two encodings part, as pieces."""
    at = next((i for i, (a, b) in enumerate(zip(ids, others, strict=False)) if a != b), min(len(ids), len(others)))
    window = slice(max(0, at - 2), at + 6)
    return f"{processor.id_to_piece(ids[window])} against {processor.id_to_piece(others[window])}"


def _why_not(complaint: str) -> str:
    """SentencePiece's complaint in words of ours; it names the largest vocabulary that the text can fill."""
    if found := re.search(r"Vocabulary size too high.*<= (\d+)", complaint):
        return f"this text gives at most {found[1]} pieces; ask for fewer, or give more or more varied text"
    if "smaller than required_chars" in complaint:
        return "fewer pieces than there are characters to cover; ask for more, or lower --character_coverage"
    return f"SentencePiece gave up ({complaint.strip()})"


def _write_json(path: Path, value: dict[str, Any]) -> None:
    path.write_text(json.dumps(value, ensure_ascii=False, indent=2) + "\n")

"""Vocabularies as lists of (piece, score): training one, merging several, scoring one anew, and the model of one."""

from __future__ import annotations

import io
import math
import re
import tempfile
from collections import Counter
from collections.abc import Iterable, Iterator
from pathlib import Path
from typing import Any

from data_prep.tokenizer import ASCII, MAX_LINE_BYTES, SCORE_STEP, SPACE, model_proto
from llmrecipes.errors import UserError

Vocabulary = list[tuple[str, float]]
DELIMITER = "||||"
SPACE_RUNS = [SPACE * n for n in range(24, 0, -1)]
BYTES = [f"<0x{byte:02X}>" for byte in range(256)]
KANJI_NUMERALS = "〇一二三四五六七八九十百千万億兆"
SYMBOLS = "、。・「」『』（）［］【】〈〉《》！？：；／＋－＝％＆＊＠＃￥〜…‥ー々〆×÷±≠≦≧∞→←↑↓°′″"
_JAPANESE = re.compile("[\u3005-\u3007\u3041-\u30ff\u3400-\u9fff\uff66-\uff9f]")
_ONLY_LATIN = re.compile(f"{SPACE}?[A-Za-zＡ-Ｚａ-ｚ]+")
_NO_WORD = re.compile(r"[^\w]+")


def is_japanese(piece: str) -> bool:
    """Whether a piece holds kana or kanji."""
    return _JAPANESE.search(piece) is not None


def train_part(
    lines: Iterable[str], *, vocab_size: int, max_piece_length: int, segmented: bool, num_threads: int
) -> Vocabulary:
    """A unigram vocabulary of one language; of text that holds less, it is smaller.

    Args:
        lines: without line ends, at most MAX_LINE_BYTES each; `segmented` ones hold DELIMITER between words.
        vocab_size: pieces at most.
        max_piece_length: characters in a piece.
        segmented: no piece crosses a DELIMITER.
        num_threads: of the trainer.
    """
    import sentencepiece

    writer = io.BytesIO()
    try:
        sentencepiece.SentencePieceTrainer.train(
            sentence_iterator=iter(lines),
            model_writer=writer,
            model_type="unigram",
            vocab_size=vocab_size,
            hard_vocab_limit=False,
            normalization_rule_name="identity",
            split_digits=True,
            add_dummy_prefix=False,
            remove_extra_whitespaces=False,
            max_sentencepiece_length=max_piece_length,
            pretokenization_delimiter=DELIMITER if segmented else "",
            max_sentence_length=2 * MAX_LINE_BYTES,
            character_coverage=0.9995,
            num_threads=num_threads,
            minloglevel=2,
        )
    except (RuntimeError, OSError) as error:
        raise UserError(f"vocab_size {vocab_size}: SentencePiece gave up ({str(error).strip()[:200]})") from None
    proto = model_proto(writer.getvalue())
    return [(piece.piece, piece.score) for piece in proto.pieces if piece.type == piece.NORMAL]


def head_pieces(specials: list[str]) -> list[str]:
    """Special pieces, the newline, runs of 24 to 1 spaces, and the 256 bytes: 289 with eight special ones."""
    return [*specials, "\n", *SPACE_RUNS, *BYTES]


def merge_parts(
    parts: dict[str, Vocabulary], words: list[str], specials: list[str], vocab_size: int, japanese_share: float
) -> tuple[Vocabulary, dict[str, int]]:
    """One vocabulary: head, required pieces, words, and the best of the parts until both shares are filled.

    Scores of models that were trained apart cannot be compared, so parts are drawn on in proportion to their size, each
    from its best piece on. A piece of two parts counts once.

    Args:
        parts: vocabulary of each language.
        words: to be taken before the pieces of the parts.
        specials: control pieces.
        vocab_size: exactly so many pieces, head included.
        japanese_share: of the pieces after the head, those with kana or kanji.

    Returns:
        Pieces with a first score, head first, and counts by kind.

    Raises:
        UserError: the parts are too small, or what is required fills more than its share.
    """
    head = head_pieces(specials)
    scores: dict[str, float] = {}
    for vocabulary in parts.values():
        lowest = min((score for _, score in vocabulary), default=-20.0)
        for piece, score in vocabulary:
            scores.setdefault(piece, score)
        for word in words:
            scores.setdefault(word, lowest)
    room = vocab_size - len(head)
    quota = {True: round(japanese_share * room)}
    quota[False] = room - quota[True]
    chosen: dict[str, None] = dict.fromkeys(_required(parts, set(head)))
    filled = Counter(map(is_japanese, chosen))
    for kind, name in ((True, "Japanese"), (False, "other")):
        if filled[kind] > quota[kind]:
            raise UserError(f"vocab_size {vocab_size}: {filled[kind]:,} {name} characters alone exceed {quota[kind]:,}")
    for piece in [*words, *_in_turn(parts)]:
        kind = is_japanese(piece)
        if piece in chosen or piece in head or filled[kind] >= quota[kind] or not _is_allowed(piece):
            continue
        chosen[piece] = None
        filled[kind] += 1
    if sum(filled.values()) < room:
        raise UserError(
            f"vocab_size {vocab_size}: the parts give {filled[True]:,} Japanese and {filled[False]:,} other pieces of "
            f"{quota[True]:,} and {quota[False]:,}; make vocab_size of the parts larger, or give more text"
        )
    counts = {"head": len(head), "japanese": filled[True], "other": filled[False]}
    lowest = min(scores.values())
    return [(piece, 0.0) for piece in head] + [(piece, scores.get(piece, lowest)) for piece in chosen], counts


def _required(parts: dict[str, Vocabulary], head: set[str]) -> Iterator[str]:
    """Every ASCII character, digit, numeral and symbol, and every single character that a part knows."""
    yield from ASCII
    yield from KANJI_NUMERALS
    yield from (sign for sign in SYMBOLS)
    for vocabulary in parts.values():
        yield from (piece for piece, _ in vocabulary if len(piece) == 1 and piece not in head)


def _in_turn(parts: dict[str, Vocabulary]) -> Iterator[str]:
    """Pieces of all parts, so that after any number of them each part has given its share."""
    ranked = []
    for place, vocabulary in enumerate(parts.values()):
        best_first = sorted(vocabulary, key=lambda entry: (-entry[1], entry[0]))
        ranked += [((rank + 1) / len(vocabulary), place, piece) for rank, (piece, _) in enumerate(best_first)]
    yield from (piece for _, _, piece in sorted(ranked))


def clean_part(vocabulary: Vocabulary, drop_latin: bool) -> Vocabulary:
    """Pieces fit for a merger: no space before a symbol, no digit in a longer piece, no letters in a Japanese part."""
    found: dict[str, float] = {}
    for piece, score in vocabulary:
        bare = piece.lstrip(SPACE)
        if bare and _NO_WORD.fullmatch(bare):
            piece = bare
        if drop_latin and len(piece) > 1 and _ONLY_LATIN.fullmatch(piece):
            continue
        if _is_allowed(piece):
            found[piece] = max(score, found.get(piece, -math.inf))
    return list(found.items())


def _is_allowed(piece: str) -> bool:
    has_digit = any(sign.isdigit() for sign in piece)
    return (
        not (len(piece) > 1 and has_digit) and "|" * 2 not in piece and "\t" not in piece and bool(piece.strip(SPACE))
    )


def reestimated(vocabulary: Vocabulary, num_head: int, lines: list[str], num_threads: int) -> Vocabulary:
    """Scores by expectation maximization on raw text: SentencePiece's own, begun with exactly these pieces.

    (Counting only the best segmentation is a trap: words with a low first score are then never chosen.) A piece whose
    expected count is below one half comes back without a score, and gets the lowest one less 2. Runs of spaces, which
    the trainer would not learn, are scored by counting.
    """
    import sentencepiece

    pieces = [piece for piece, _ in vocabulary[num_head:]]
    writer = io.BytesIO()
    with tempfile.NamedTemporaryFile("w", suffix=".tsv", encoding="utf-8") as seeds:
        for piece, score in vocabulary[num_head:]:
            seeds.write(f"{piece}\t{max(1, round(1e9 * math.exp(max(score, -20.0))))}\n")
        seeds.flush()
        try:
            sentencepiece.SentencePieceTrainer.train(
                sentence_iterator=iter(lines),
                model_writer=writer,
                model_type="unigram",
                vocab_size=2 * len(pieces) + 10_000,  # no reason to drop a piece, and room for other characters
                seed_sentencepieces_file=seeds.name,
                seed_sentencepiece_size=10 * len(pieces),
                max_sentencepiece_length=24,
                hard_vocab_limit=False,
                split_by_unicode_script=False,
                normalization_rule_name="identity",
                split_digits=True,
                add_dummy_prefix=False,
                remove_extra_whitespaces=False,
                max_sentence_length=MAX_LINE_BYTES,
                num_threads=num_threads,
                minloglevel=2,
            )
        except (RuntimeError, OSError) as error:
            raise UserError(f"reestimate: SentencePiece gave up ({str(error).strip()[:200]})") from None
    proto = model_proto(writer.getvalue())
    learned = {piece.piece: piece.score for piece in proto.pieces if piece.type == piece.NORMAL}
    lowest = min(learned[piece] for piece in pieces if piece in learned) - 2
    scored = [(piece, learned.get(piece, lowest)) for piece in pieces]
    return [*_scored_head(vocabulary[:num_head], lines, lowest), *scored]


def _scored_head(head: Vocabulary, lines: list[str], lowest: float) -> Vocabulary:
    """0 for all but the runs of spaces, which get the logarithm of their share of all words and runs."""
    counts: Counter[int] = Counter()
    total = 1
    for line in lines:
        runs = re.findall(" +", line)
        counts.update(min(len(run), len(SPACE_RUNS)) for run in runs)
        total += len(runs) + len(line) // 2
    return [
        (piece, max(lowest, math.log(max(counts[len(piece)], 0.5) / total)) if set(piece) == {SPACE} else 0.0)
        for piece, _ in head
    ]


def model_of(vocabulary: Vocabulary, specials: list[str]) -> bytes:
    """The serialized SentencePiece model of a vocabulary: identity, byte fallback, no dummy prefix, single digits."""
    proto: Any = model_proto(b"")
    trainer, normalizer = proto.trainer_spec, proto.normalizer_spec
    trainer.model_type = trainer.UNIGRAM
    trainer.vocab_size = len(vocabulary)
    trainer.byte_fallback = trainer.split_digits = trainer.allow_whitespace_only_pieces = True
    trainer.unk_id, trainer.bos_id, trainer.eos_id, trainer.pad_id = 0, 1, 2, 3
    trainer.unk_piece, trainer.bos_piece, trainer.eos_piece, trainer.pad_piece = specials[:4]
    normalizer.name = "identity"
    normalizer.add_dummy_prefix = normalizer.remove_extra_whitespaces = False
    normalizer.escape_whitespaces = True
    for place, (text, score) in enumerate(vocabulary):
        piece = proto.pieces.add()
        piece.piece, piece.score = text, round(score / SCORE_STEP) * SCORE_STEP
        if place == 0:
            piece.type = piece.UNKNOWN
        elif text in specials:
            piece.type = piece.CONTROL
        elif text in BYTES:
            piece.type = piece.BYTE
        else:
            piece.type = piece.NORMAL
    return proto.SerializeToString()


def read_words(files: list[str]) -> list[str]:
    """Words of lists, one a line, in order; spaces inside stand for themselves.

    Raises:
        UserError: a list is missing.
    """
    missing = [f"words: {name}: no such file" for name in files if not Path(name).is_file()]
    if missing:
        raise UserError(*missing)
    lines = [line.strip() for name in files for line in Path(name).read_text(encoding="utf-8").splitlines()]
    return list(dict.fromkeys(line.replace(" ", SPACE) for line in lines if line and not line.startswith("#")))

"""`llmrecipes data clean`: rules for Japanese and English text, cheap first; each counts what it cost."""

from __future__ import annotations

import re
from collections.abc import Callable, Iterator
from dataclasses import dataclass, field
from pathlib import Path
from typing import Literal

from data_prep.frame.chance import unit
from data_prep.frame.config import Finding, StageConfig
from data_prep.frame.map import Judge, Verdict, run_map
from data_prep.frame.records import Document
from data_prep.frame.shards import Shard
from data_prep.rules import english, language, lines, personal, repetition
from data_prep.rules.unicode import normalize
from llmrecipes.errors import UserError

# Control characters but newline and tab, byte order marks, zero-width spaces, and the sign of a failed decoding.
_INVISIBLE = re.compile("[\x00-\x08\x0b\x0c\x0e-\x1f\x7f-\x9f\u200b\u2060\ufeff\ufffe\uffff]")
_MANY_BLANK_LINES = re.compile(r"\n[ \t\u3000]*\n(?:[ \t\u3000]*\n)+")
_LINE_TAIL = re.compile(r"[ \t\u3000\r]+(?=\n)")


@dataclass(frozen=True, kw_only=True)
class WordList:
    """Words that speak against a document, by their rate: a long clean text may hold one.

    Args:
        file: one word a line; empty lines and lines that begin with # do not count.
        per_thousand: rejected when there are more of them in 1,000 characters.
        keep: share of such documents that are kept all the same, chosen by their hash, so that the model knows them.
    """

    file: str
    per_thousand: float = 1.0
    keep: float = 0.0


@dataclass(frozen=True, kw_only=True)
class Repetition:
    """Limits of repetition (Gopher's): shares of a document; n-grams have the limits of `data_prep.rules.repetition`.

    Args:
        lines: of lines that occurred before.
        paragraphs: of paragraphs that occurred before.
        line_characters: of characters in lines that occurred before.
        ngrams: also look at n-grams of 2 to 10 words.
    """

    lines: float = 0.30
    paragraphs: float = 0.30
    line_characters: float = 0.20
    ngrams: bool = True


@dataclass(frozen=True, kw_only=True)
class CleanConfig(StageConfig):
    """Recipe of `data clean`.

    Args:
        language: whose rules; any has only those that suit every text.
        normalize: Unicode normalization before all else; nfkc makes ＡＢＣ and ｶﾅ into ABC and カナ.
        min_share: smallest share of letters in the script of the language.
        min_characters: shorter documents (after cleaning) are rejected.
        max_characters: longer ones too; null for no limit.
        date_header: drop a first line with a date or time in it (more than 5 digits).
        date_lines: drop lines that are nothing but a date or time.
        one_character_share: drop a line when one character makes up this share of it; null keeps all.
        web_lines: drop this share of short lines with phrases of web pages, chosen by their hash.
        repeated_lines: drop a line that equals the one before.
        cut_to_sentence: cut what follows the last sentence, and reject a document without any.
        repetition: limits of repetition; null for none.
        personal: e-mail addresses and telephone numbers.
        words: lists of words that speak against a document.
        noun_share: reject a document when nouns are more than this share of its words; needs fugashi, and is slow.
        gopher: reject English that is no prose by Gopher's rules.
    """

    language: Literal["ja", "en", "any"] = "ja"
    normalize: Literal["nfkc", "nfc", "none"] = "nfkc"
    min_share: float = 0.5
    min_characters: int = 30
    max_characters: int | None = None
    date_header: bool = True
    date_lines: bool = True
    one_character_share: float | None = 0.3
    web_lines: float = 0.9
    repeated_lines: bool = True
    cut_to_sentence: bool = False
    repetition: Repetition | None = field(default_factory=Repetition)
    personal: Literal["mask", "keep"] = "mask"
    words: list[WordList] = field(default_factory=list)
    noun_share: float | None = None
    gopher: bool = False

    def problems(self) -> Iterator[Finding]:
        """Rules that need another language."""
        yield from super().problems()
        if self.gopher and self.language != "en":
            yield ("gopher",), f"gopher: its rules count words between spaces, language is {self.language}", "remove it"
        if self.noun_share is not None and self.language != "ja":
            yield ("noun_share",), "noun_share: the segmenter knows Japanese only", "remove it, or say language: ja"
        if self.max_characters is not None and self.max_characters < self.min_characters:
            yield ("max_characters",), "max_characters is below min_characters", "make it larger, or null"

    def missing(self) -> Iterator[Finding]:
        """The lists of words."""
        yield from super().missing()
        for number, words in enumerate(self.words):
            if not Path(words.file).is_file():
                yield ("words", number, "file"), f"words: {words.file}: no such file", "name a file of one word a line"


def clean(config: CleanConfig) -> None:
    """Cleans documents by rules, and counts what each rule rejected and cut."""
    run_map("clean", config, make_judge)


def make_judge(config: CleanConfig, _: Shard) -> Judge:
    """The judge of single documents: a pure function of the text and the recipe."""
    trims, checks = _trims(config), _checks(config)
    of_language = _language_check(config)

    def judge(document: Document) -> Verdict:
        text = document.text
        if (reason := of_language(text)) is not None:
            return Verdict(text, reason)
        trimmed = dict[str, int]()
        for rule, trim in trims:
            before, text = text, trim(text)
            if before is not text and before != text:
                trimmed[rule] = len(before) - len(text)
        for check in checks:
            if (reason := check(text)) is not None:
                return Verdict(document.text, reason)
        return Verdict(text, trimmed=trimmed)

    return lambda documents: [judge(document) for document in documents]


Trim = Callable[[str], str]
Check = Callable[[str], str | None]


def _trims(config: CleanConfig) -> list[tuple[str, Trim]]:
    """What changes a text, in order."""
    trims: list[tuple[str, Trim]] = [("invisible", lambda text: _INVISIBLE.sub("", text))]
    if config.normalize != "none":
        form: Literal["NFKC", "NFC"] = "NFKC" if config.normalize == "nfkc" else "NFC"
        trims.append(("normalize", lambda text: normalize(form, text)))
    trims.append(("whitespace", _tidy))
    if config.date_header:
        trims.append(("date_header", _without_date_header))
    if config.date_lines:
        trims.append(("date_lines", _without_date_lines))
    if (limit := config.one_character_share) is not None:
        trims.append(("one_character_lines", lambda text: _without_lines(text, lines.one_character_lines(text, limit))))
    if config.web_lines > 0:
        trims.append(("web_lines", _web_line_filter(config.web_lines, config.seed)))
    if config.repeated_lines:
        trims.append(("repeated_lines", _without_repeats))
    if config.cut_to_sentence:
        trims.append(("after_last_sentence", lines.until_sentence_end))
    trims.append(("whitespace_again", _tidy))
    if config.personal == "mask":
        trims.append(("personal", personal.mask))
    return trims


def _checks(config: CleanConfig) -> list[Check]:
    """What rejects a text, in order."""
    checks = [_length_check(config)]
    if config.repetition:
        checks.append(_repetition_check(config.repetition))
    checks += [_word_check(words, config.seed) for words in config.words]
    if config.gopher:
        checks.append(english.gopher_reason)
    if config.noun_share is not None:
        checks.append(_noun_check(config.noun_share))
    return checks


def _language_check(config: CleanConfig) -> Check:
    share = {"ja": language.japanese_share, "en": language.english_share, "any": lambda _: 1.0}[config.language]
    name = {"ja": "not_japanese", "en": "not_english", "any": ""}[config.language]
    return lambda text: name if share(text) < config.min_share else None


def _length_check(config: CleanConfig) -> Check:
    longest = config.max_characters or 10**18

    def check(text: str) -> str | None:
        if len(text) < config.min_characters:
            return "too_short"
        return "too_long" if len(text) > longest else None

    return check


def _repetition_check(limits: Repetition) -> Check:
    def check(text: str) -> str | None:
        share, characters = repetition.duplicate_share(text.split("\n"))
        if share > limits.lines:
            return "repeated_lines"
        if characters > limits.line_characters:
            return "characters_in_repeated_lines"
        if repetition.duplicate_share(text.split("\n\n"))[0] > limits.paragraphs:
            return "repeated_paragraphs"
        n = repetition.repeated_ngram(text) if limits.ngrams else None
        return None if n is None else f"repeated_{n}_grams"

    return check


def _word_check(words: WordList, seed: int) -> Check:
    listed = [line.strip() for line in Path(words.file).read_text(encoding="utf-8").splitlines()]
    listed = [word for word in listed if word and not word.startswith("#")]
    if not listed:
        raise UserError(f"{words.file}: holds no word; name another list, or remove it from words")
    pattern = re.compile("|".join(map(re.escape, sorted(listed, key=len, reverse=True))))
    name = f"words_{Path(words.file).stem}"

    def check(text: str) -> str | None:
        if len(pattern.findall(text)) * 1000 <= words.per_thousand * len(text):
            return None
        return None if unit(text, seed, name) < words.keep else name

    return check


def _noun_check(limit: float) -> Check:
    from data_prep.rules.segment import tagger

    parse = tagger()

    def check(text: str) -> str | None:
        kinds = [word.feature.pos1 for word in parse(text.replace("\n", " "))]
        content = [kind for kind in kinds if kind not in ("補助記号", "空白", "記号")]
        return "nouns" if content and content.count("名詞") > limit * len(content) else None

    return check


def _tidy(text: str) -> str:
    """No blanks at the ends of lines, at most one empty line in a row, none at the ends."""
    if "\r" in text:
        text = text.replace("\r\n", "\n").replace("\r", "\n")
    if " \n" in text or "\u3000\n" in text or "\t\n" in text:
        text = _LINE_TAIL.sub("", text)
    if "\n\n\n" in text:
        text = _MANY_BLANK_LINES.sub("\n\n", text)
    return text.strip("\n").rstrip()


def _without_date_header(text: str) -> str:
    first, newline, rest = text.partition("\n")
    return rest if newline and lines.is_date_header(first) else text


def _line_filter(keep: Callable[[str], bool]) -> Trim:
    def trim(text: str) -> str:
        before = text.split("\n")
        after = list(filter(keep, before))
        return text if len(after) == len(before) else "\n".join(after)

    return trim


def _without_lines(text: str, numbers: set[int]) -> str:
    if not numbers:
        return text
    return "\n".join(line for number, line in enumerate(text.split("\n")) if number not in numbers)


def _without_date_lines(text: str) -> str:
    return _line_filter(lambda line: not lines.is_date_line(line))(text) if lines.may_hold_date(text) else text


def _without_repeats(text: str) -> str:
    before = text.split("\n")
    after = lines.without_repeats(before)
    return text if len(after) == len(before) else "\n".join(after)


def _web_line_filter(share: float, seed: int) -> Trim:
    """Chance is drawn from the document and the line, so that the same line goes from one page and stays in another."""

    def trim(text: str) -> str:
        if not lines.has_web_phrase(text):
            return text
        whole = str(unit(text, seed, "web_lines"))
        return _line_filter(lambda line: not lines.is_web_line(line) or unit(whole + line, seed, "web_lines") >= share)(
            text
        )

    return trim

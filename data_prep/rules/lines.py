"""Rules about single lines: headers, dates, boilerplate of web pages, lines of one sign."""

from __future__ import annotations

import re
from functools import cache
from pathlib import Path

import numpy as np

SHORT_LINE = 40  # characters; a longer line with a web phrase in it is prose about something
_DATE_SIGNS = re.compile("[:日年/月-]")
_DATE_HINT = re.compile(r"\d\s*[-/.年月]|\d{4}")
_DIGIT = re.compile(r"\d")
# A line of nothing but a date, a time, and the labels that blog software puts around them.
_DATE_LINE = re.compile(
    r"""[\s\[(【「]*
    (?:(?:posted|投稿|更新|作成|公開|掲載|日時|date|last\ (?:modified|updated)|by|on|at)[日者]*[\s:：]*)*
    (?:(?:令和|平成|昭和)?\d{1,4}\s*[-/.年]\s*\d{1,2}\s*[-/.月]\s*\d{1,4}\s*日?
      |\d{1,2}\s*月\s*\d{1,2}\s*日
      |(?:jan|feb|mar|apr|may|jun|jul|aug|sep|oct|nov|dec)[a-z]*\.?\s+\d{1,2}(?:st|nd|rd|th)?,?\s+\d{4})
    (?:\s*[(\[]?(?:[月火水木金土日](?:曜日?)?|(?:mon|tue|wed|thu|fri|sat|sun)[a-z]*)[)\]]?)?
    (?:[\sT,]*(?:at\s+)?\d{1,2}\s*[:時]\s*\d{1,2}(?:\s*[:分]\s*\d{0,2}秒?)?\s*(?:am|pm|分)?)?
    [\s\])】」|,-]*""",
    re.VERBOSE | re.IGNORECASE,
)
SENTENCE_ENDS = "。．！？!?.」』）)…"


def is_date_header(line: str) -> bool:
    """The rule of the source system: more than 5 digits among the first 20 characters, and a sign of a date or time."""
    head = line[:20]
    return len(_DIGIT.findall(head)) > 5 and _DATE_SIGNS.search(head) is not None


def may_hold_date(text: str) -> bool:
    """Whether `is_date_line` can be true of any line: if not, no line need be looked at."""
    return _DATE_HINT.search(text) is not None


def is_date_line(line: str) -> bool:
    """Whether the line says only when something was posted."""
    return len(line) < 80 and _DIGIT.search(line) is not None and _DATE_LINE.fullmatch(line) is not None


def one_character_lines(text: str, share: float) -> set[int]:
    """Numbers (from 0) of lines of which one character makes up at least `share`, spaces aside.

    Lines of fewer than 10 characters are never among them: of those it cannot be told.
    """
    codes = np.frombuffer(text.encode("utf-32-le"), dtype=np.uint32)
    line = np.cumsum(codes == 10)
    solid = (codes > 32) & (codes != 0x3000) & (codes != 0xA0)
    line, codes = line[solid], codes[solid]
    if not len(line):
        return set()
    keys = (line.astype(np.uint64) << np.uint64(21)) | codes
    keys.sort()
    borders = np.concatenate(((0,), (keys[1:] != keys[:-1]).nonzero()[0] + 1, (len(keys),)))
    of_line = (keys[borders[:-1]] >> np.uint64(21)).astype(np.int64)
    sizes = np.bincount(line)[of_line]
    return set(of_line[(sizes >= 10) & (borders[1:] - borders[:-1] >= share * sizes)].tolist())


@cache
def web_phrases() -> tuple[tuple[str, ...], tuple[str, ...]]:
    """In lower case: (what a line of a web page's frame ends with, what it contains)."""
    lines = (Path(__file__).parent / "web_lines.txt").read_text(encoding="utf-8").lower().splitlines()
    phrases = [line for line in lines if line and not line.startswith("#")]
    ends = tuple(phrase[1:] for phrase in phrases if phrase.startswith("$"))
    return ends, tuple(phrase for phrase in phrases if not phrase.startswith("$"))


@cache
def _web_hint() -> re.Pattern[str]:
    ends, inside = web_phrases()
    return re.compile("|".join(map(re.escape, sorted({*ends, *inside}))))


def has_web_phrase(text: str) -> bool:
    """Whether any of the phrases stands anywhere: if not, no line need be looked at."""
    return _web_hint().search(text.lower()) is not None


def is_web_line(line: str) -> bool:
    """Whether a short line belongs to the frame of a web page: menus, copyright, "read more"."""
    stripped = line.strip().lower()
    if not stripped or len(stripped) > SHORT_LINE:
        return False
    ends, inside = web_phrases()
    return stripped.endswith(ends) or any(map(stripped.__contains__, inside))


def without_repeats(lines: list[str]) -> list[str]:
    """Lines that equal the non-empty line before them left out."""
    kept, last = list[str](), ""
    for line in lines:
        if not line or line != last:
            kept.append(line)
        last = line or last
    return kept


def until_sentence_end(text: str) -> str:
    """The text without what follows its last sentence; empty when there is no sentence."""
    end = max(text.rfind(sign) for sign in SENTENCE_ENDS)
    return text[: end + 1]

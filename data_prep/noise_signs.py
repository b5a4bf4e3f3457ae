"""Signs of noise that no single word shows: shares of scripts, marks, prices, parts of speech; lengths of sentences."""

from __future__ import annotations

import math
import re
from collections import Counter

import numpy as np

from data_prep.rules.segment import Word

# Matches for each character of the text.
_PATTERNS = tuple(
    map(
        re.compile,
        (
            r"[ぁ-ん]",
            r"[ァ-ヶー]",
            r"[一-龥]",
            r"[A-Za-z]",
            r"\d",
            r"。",
            r"[、,]",
            r"!",
            r"\?",
            r"…|\.\.\.",
            r"[|>«»■●★☆◆▼◎※→←]",
            r"[()\[\]【】「」『』]",
            r"\s",
            r"https?|www|\.com|\.jp",
            r"円|¥|%|無料|価格",
            r"\d+[年月日/:]",
            r"です|ます|でした|ました",
            r"ください|下さい|いたし|致し|ござい|頂|いただ",
            r"私|僕|俺|自分",
            r"[w笑♪~〜]",
        ),
    )
)
# Shares of the words; unidic's names of parts of speech.
_PARTS = (
    *("名詞", "動詞", "助詞", "助動詞", "形容詞", "副詞", "代名詞", "接続詞", "感動詞", "補助記号", "記号", "接尾辞"),
    *("接頭辞", "連体詞", "形状詞"),
)
_KINDS = (
    *("名詞-固有名詞", "名詞-数詞", "名詞-普通名詞", "助詞-格助詞", "助詞-終助詞", "助詞-接続助詞", "助詞-係助詞"),
    *("助詞-副助詞", "動詞-非自立可能"),
)
_LISTED = frozenset(("名詞", "補助記号", "記号", "接尾辞"))


def signs(text: str, words: list[Word]) -> np.ndarray:
    """The signs [53] of a text after NFKC, and of its words."""
    length, count = max(len(text), 1), max(len(words), 1)
    shares = [len(pattern.findall(text)) / length for pattern in _PATTERNS]
    sentences = [len(part) for part in re.split(r"[。!?\n]", text) if part.strip()] or [1]
    lengths = [
        math.log(length),
        count / length,
        len(set(text)) / length,
        len({word.surface for word in words}) / count,
        math.log1p(len(sentences)),
        math.log1p(sum(sentences) / len(sentences)),
        math.log1p(max(sentences)),
        float(text.rstrip().endswith(("。", "!", "?", "」", ")"))),
        math.log1p(_longest_list(words)),
    ]
    parts = Counter(word.part for word in words)
    kinds = Counter(f"{word.part}-{word.kind}" for word in words)
    return np.array([*shares, *lengths, *(parts[p] / count for p in _PARTS), *(kinds[k] / count for k in _KINDS)])


def _longest_list(words: list[Word]) -> int:
    """The longest run of nouns and marks: long in menus and lists, short in sentences."""
    longest = run = 0
    for word in words:
        run = run + 1 if word.part in _LISTED else 0
        longest = max(longest, run)
    return longest

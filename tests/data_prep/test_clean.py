"""The rules of cleaning: a table of planted lines and documents for each, and what must not be hurt."""

import unicodedata
from pathlib import Path

import pytest
from stages import manifest, run_stage, texts, write

from data_prep.frame.config import read_config
from data_prep.frame.records import Document
from data_prep.frame.shards import Shard
from data_prep.rules import english, language, lines, personal, repetition
from data_prep.rules.unicode import normalize
from data_prep.stages.clean import CleanConfig, make_judge

GOOD = "今日は朝から雨が降っていたので、家で本を読んで過ごすことにした。\n夕方には晴れて、東の空に大きな虹が見えた。"


def judge(text, **values):
    words = ["--input=[a]", "--output=b", *(f"--{key}={value}" for key, value in values.items())]
    [verdict] = make_judge(read_config(CleanConfig, words), Shard(Path("a"), "a"))([Document(text, 0, {}, 1, b"")])
    return verdict


@pytest.mark.parametrize(
    ("line", "expected"),
    [
        ("2024年04月08日 12:34 カテゴリ: 日記", True),
        ("2024-04-08T12:34:56", True),
        ("投稿 2009/12/31 by 太郎", True),
        ("12:34:56 サーバー起動", True),
        ("2024年の春、私は東京にいた。", False),  # four digits
        ("電話は0312345678", False),  # digits, but no sign of a date
        ("昔々あるところに、おじいさんが住んでいた。20240408-1234", False),  # beyond the first 20 characters
    ],
)
def test_date_headers(line, expected):
    assert lines.is_date_header(line) is expected
    assert judge(f"{line}\n{GOOD}", date_lines="false").text == (GOOD if expected else f"{line}\n{GOOD}")
    assert judge(f"{GOOD}\n{line}", date_lines="false").text == f"{GOOD}\n{line}"  # not at the head


@pytest.mark.parametrize(
    ("line", "expected"),
    [
        ("2024年4月8日", True),
        ("2024/04/08 (月) 12:34", True),
        ("[2012.3.5]", True),
        ("投稿日: 2024-04-08 12:34:56", True),
        ("令和6年4月8日(月曜日)", True),
        ("Posted on March 5, 2012 at 10:15 am", True),
        ("4月8日", True),
        ("4月8日は花祭りである。", False),
        ("2024年4月8日に開かれた会議", False),
        ("1-2-3", True),  # a date of the year 1 or a score: not worth more rules
        ("3.14", False),
    ],
)
def test_date_lines(line, expected):
    assert lines.is_date_line(line) is expected


@pytest.mark.parametrize(
    ("line", "expected"),
    [
        ("----------------------", True),
        ("あああああああああああ!", True),
        ("============ メニュー ============", True),
        ("ーーー", False),  # too short to tell
        ("The committee agreed on the seventh of December.", False),
        ("私は昨日、図書館で三冊の本を借りてきました。", False),
    ],
)
def test_lines_of_one_character(line, expected):
    assert lines.one_character_lines(line, 0.3) == ({0} if expected else set())
    assert lines.one_character_lines(f"{GOOD}\n \n{line}\nx", 0.3) == ({3} if expected else set())


@pytest.mark.parametrize(
    ("line", "expected"),
    [
        ("続きを読む", True),
        ("≫ 詳細はこちら", True),
        ("Copyright (C) 2009 Example Inc.", True),
        ("プライバシーポリシー | サイトマップ", True),
        ("READ MORE »", True),
        ("ブログのホーム", True),
        ("この本の続きを読む日を楽しみにしながら、私は毎日仕事に出かけては帰ってくるのだった。", False),  # prose
        ("彼はホームに立っていた。", False),
        ("", False),
    ],
)
def test_web_lines(line, expected):
    assert lines.is_web_line(line) is expected
    if line:
        assert judge(f"{GOOD}\n{line}", web_lines=1.0).text == (GOOD if expected else f"{GOOD}\n{line}")


def test_repeated_lines_and_the_end():
    assert judge(f"{GOOD}\n虹だ。\n\n虹だ。\n空だ。").text == f"{GOOD}\n虹だ。\n\n空だ。"
    assert judge(f"{GOOD}\nと思ったのだが、このつづ", cut_to_sentence="true").text == GOOD
    assert (
        judge("東京 大阪 名古屋 福岡 札幌 仙台 広島 京都 横浜 神戸 ひらがな", cut_to_sentence="true").reason
        == "too_short"
    )


@pytest.mark.parametrize(
    ("text", "ja", "en"),
    [
        ("これは日本語の文章です。", 1.0, 0.0),
        ("这是中文句子，没有假名。", 0.0, 0.0),
        ("This is English.", 0.0, 1.0),
        ("これはPythonです。", 0.45, 0.55),
        ("Привет, мир", 0.0, 0.0),
        ("12345 !?", 0.0, 0.0),
    ],
)
def test_shares_of_scripts(text, ja, en):
    assert language.japanese_share(text) == pytest.approx(ja, abs=0.06)
    assert language.english_share(text) == pytest.approx(en, abs=0.06)


@pytest.mark.parametrize(
    ("text", "expected"),
    [
        ("連絡は taro.yamada+x@example.co.jp まで", "連絡は xxxx@yyyy.com まで"),
        ("電話03-1234-5678です", "電話03-1234-5678です"),  # glued to a letter: not sure enough
        ("電話 03-1234-5678 です", "電話 00-0000-0000 です"),
        ("携帯: 09012345678", "携帯: 00-0000-0000"),
        ("03(1234)5678 と (03)1234-5678", "00-0000-0000 と 00-0000-0000"),
        ("call (212) 555-0100 or +81 3 1234 5678", "call 00-0000-0000 or 00-0000-0000"),
        ("2024-04-08 と 1234567890123 と 3.14159-26535", "2024-04-08 と 1234567890123 と 3.14159-26535"),
        ("数式 a@b は行列の積", "数式 a@b は行列の積"),
    ],
)
def test_personal_data(text, expected):
    assert personal.mask(text) == expected


def test_duplicate_shares_by_hand():
    assert repetition.duplicate_share(["a", "bb", "a", "", "a"]) == (2 / 4, 2 / 5)
    assert repetition.duplicate_share([]) == (0.0, 0.0)


def plain_ngram(text):
    """The same measure, slowly: characters covered by the top n-gram, or by n-grams that came before."""
    import re
    from collections import Counter

    found = re.findall(
        "[\u3041-\u309f]+|[\u30a1-\u30ff]+|[\u3400-\u4dbf\u4e00-\u9fff\u3005]+|[0-9A-Za-z\u00c0-\u024f]+|[^\\s]", text
    )
    if len(found) < repetition.FEWEST_WORDS:
        return None
    for n, limit in repetition.LIMITS.items():
        grams = [tuple(found[i : i + n]) for i in range(len(found) - n + 1)]
        if n <= 4:
            counts = Counter(grams)
            top = max(counts.values(), default=0)
            shares = [sum(len(found[i]) for i in covered(grams, {g}, n)) for g, c in counts.items() if c == top > 1]
            share = max(shares, default=0)
        else:
            seen, again = set(), set()
            for i, gram in enumerate(grams):
                if gram in seen:
                    again.update(range(i, i + n))
                seen.add(gram)
            share = sum(len(found[i]) for i in again)
        if share > limit * sum(map(len, found)):
            return n
    return None


def covered(grams, chosen, n):
    return {i + k for i, gram in enumerate(grams) if gram in chosen for k in range(n)}


def test_ngrams_equal_the_slow_measure():
    import random

    draw, found = random.Random(3), []
    for _ in range(400):
        vocabulary = [
            draw.choice(["雨", "です", "カメラ", "word", "、", "。"]) + str(i) for i in range(draw.randrange(2, 60))
        ]
        text = " ".join(draw.choice(vocabulary) for _ in range(draw.randrange(5, 120)))
        if draw.random() < 0.4:
            text += text[: draw.randrange(len(text))]
        fast, slow = repetition.repeated_ngram(text), plain_ngram(text)
        # Of several top n-grams the fast measure looks at one; where it passes, the slow one may not, for n <= 4.
        assert fast == slow or (slow is not None and slow <= 4), (text, fast, slow)
        found.append(fast)
    assert len(set(found)) >= 5 and found.count(None) > 50


def test_normalizing_equals_unicodedata():
    import random

    draw, seen = random.Random(1), 0
    ranges = ((0x20, 0x250), (0x300, 0x370), (0x1100, 0x1200), (0x3000, 0x3100), (0xAC00, 0xAD00), (0xFF00, 0xFFF0))
    for form in ("NFC", "NFKC"):
        for _ in range(5000):
            text = "".join(chr(draw.randrange(*draw.choice(ranges))) for _ in range(draw.randrange(1, 12)))
            assert normalize(form, text) == unicodedata.normalize(form, text)
            seen += normalize(form, text) != text
    assert seen > 2000


def test_documents(tmp_path):
    ng_words = tmp_path / "ng.txt"
    ng_words.write_text("# words\n宝くじ\n")
    planted = {
        "not_japanese": "The quick brown fox jumps over the lazy dog and runs away from the hunters.",
        "too_short": "短い文です。",
        "repeated_lines": "\n".join(f"{n}番目の話をここに書きます。\n\nおなじ行。" for n in range(9)),
        "repeated_2_grams": "雨 と 風 " * 30 + "でした",
        "words_ng": "宝くじに当たる方法をお教えします。宝くじ売り場へ急ぎましょう。宝くじの当せん番号を今すぐ確認。",
    }
    write(tmp_path / "a.jsonl", [GOOD, *planted.values()])
    run_stage(
        "clean",
        input=[str(tmp_path / "a.jsonl")],
        output=tmp_path / "out",
        one_character_share=None,
        words=[{"file": str(ng_words), "per_thousand": 20.0}],
    )
    found = manifest(tmp_path / "out")
    assert texts(tmp_path / "out") == [GOOD]
    assert {reason: flow["documents"] for reason, flow in found["rejected"].items()} == dict.fromkeys(planted, 1)
    for reason, text in planted.items():
        assert found["samples"][reason][0][1] == text[:300]


def test_word_lists_count_by_rate_and_keep_a_share(tmp_path):
    """The tool of the field counts words, so that long clean novels fall (pass rate 0.27)."""
    ng_words = tmp_path / "ng.txt"
    ng_words.write_text("宝くじ")
    lists = f'[{{"file": "{ng_words}", "per_thousand": 1.0, "keep": 0.5}}]'
    novel = "宝くじの話をした。" + "".join(f"{n}年の春、彼は{n * 7}人と旅に出た。" for n in range(400))
    assert judge(novel, words=lists, repetition="null").reason is None
    kept = sum(judge(f"{GOOD}宝くじ{n}", words=lists).reason is None for n in range(200))
    assert 70 < kept < 130


@pytest.mark.parametrize(
    ("text", "reason"),
    [
        ("The committee met in the town hall to discuss the budget and what it means for the schools.", None),
        ("a b c d e f g h the of x y z", "mean_word_length"),
        ("# headings of that #markup #language #everywhere with words", "symbols"),
        ("- the first item of that\n- another item with words\n* and more items here", "bullets"),
        (
            "the first line of that long story which goes on and on without an end…\nanother line with words that…",
            "ellipses",
        ),
        ("the 1234 5678 of 9012 3456 7890", "few_letters"),
        ("lorem ipsum dolor sit amet consectetur adipiscing elit", "no_stop_words"),
    ],
)
def test_gopher(text, reason):
    assert english.gopher_reason(text) == reason


def test_nouns():
    pytest.importorskip("fugashi", reason="fugashi is not installed: pip install 'llmrecipes[data]'")
    pytest.importorskip("unidic_lite", reason="unidic-lite is not installed: pip install 'llmrecipes[data]'")
    nouns = "東京 大阪 名古屋 福岡 札幌 仙台 広島 京都 横浜 神戸 の 電話 番号 一覧 住所 検索"
    assert judge(nouns, noun_share=0.7).reason == "nouns"
    assert judge(GOOD, noun_share=0.7).reason is None


def test_without_fugashi_the_extra_is_named(monkeypatch):
    import sys

    from llmrecipes.errors import UserError

    monkeypatch.setitem(sys.modules, "fugashi", None)
    with pytest.raises(UserError, match=r"fugashi is not installed: pip install 'llmrecipes\[data\]'"):
        judge(GOOD, noun_share=0.7)


@pytest.mark.real
def test_real_text_is_mostly_kept(real_corpus, tmp_path):
    for name, least in (("ja_wiki", 0.97), ("ja_dialogue", 0.99)):
        run_stage("clean", input=[str(real_corpus / f"{name}.jsonl.gz")], output=tmp_path / name)
        found = manifest(tmp_path / name)
        assert found["kept"]["documents"] > least * found["read"]["documents"], name
        assert found["kept"]["characters"] > 0.95 * found["read"]["characters"], name

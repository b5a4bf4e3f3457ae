"""Arithmetic of the demo corpus: equations, tables and word problems, with some problems kept out of all documents."""

from __future__ import annotations

import zlib
from collections.abc import Callable
from dataclasses import dataclass
from random import Random

from data_prep.demo_world import World

HELD_OUT_SHARE = 10  # one problem in so many is never shown


@dataclass(frozen=True)
class Problem:
    """`a sign b` with a and b from 0 to 99 (0 to 12 for x); differences are never negative."""

    a: int
    sign: str
    b: int

    @property
    def result(self) -> int:
        """The answer."""
        return {"+": self.a + self.b, "-": self.a - self.b, "x": self.a * self.b}[self.sign]

    @property
    def question(self) -> str:
        """For example `12 + 7`."""
        return f"{self.a} {self.sign} {self.b}"

    @property
    def equation(self) -> str:
        """For example `12 + 7 = 19`."""
        return f"{self.question} = {self.result}"

    @property
    def held_out(self) -> bool:
        """Whether no document may state the problem; a property of the problem, not of the seed."""
        return zlib.crc32(self.question.encode()) % HELD_OUT_SHARE == 0


def all_problems() -> list[Problem]:
    """Every problem there is."""
    hundred, dozen = range(100), range(13)
    return (
        [Problem(a, "+", b) for a in hundred for b in hundred]
        + [Problem(a, "-", b) for a in hundred for b in hundred if a >= b]
        + [Problem(a, "x", b) for a in dozen for b in dozen]
    )


def draw(rng: Random, signs: str = "+-x", largest: int = 99) -> Problem:
    """A problem that may be shown."""
    while True:
        sign = rng.choice(signs)
        top = 12 if sign == "x" else largest
        a, b = rng.randrange(top + 1), rng.randrange(top + 1)
        problem = Problem(max(a, b), sign, min(a, b)) if sign == "-" else Problem(a, sign, b)
        if not problem.held_out:
            return problem


def document(world: World, lang: str, rng: Random) -> str:
    """One text about numbers in `ja` or `en`."""
    kinds: list[Callable[[World, str, Random], str]] = [_drill, _drill, _table, _questions, _story, _story]
    return rng.choice(kinds)(world, lang, rng)


def question_text(problem: Problem, lang: str) -> str:
    """How a problem is asked, in documents and in questions.jsonl."""
    return f"{problem.question} はいくつですか。" if lang == "ja" else f"What is {problem.question}?"


def _drill(_world: World, lang: str, rng: Random) -> str:
    titles = {
        "ja": ["計算の練習", "今日の計算", "足し算と引き算"],
        "en": ["Practice", "Sums for today", "Addition and subtraction"],
    }
    largest = rng.choice([9, 20, 99])
    lines = [draw(rng, "+-", largest).equation for _ in range(rng.randrange(8, 30))]
    return rng.choice(titles[lang]) + "\n" + "\n".join(lines)


def _table(_world: World, lang: str, rng: Random) -> str:
    number, sign = rng.randrange(13), rng.choice("xx+")
    rows = [Problem(number, sign, other) for other in range(1, 13)]
    head = {"ja": {"x": "{}の段", "+": "{}に足す"}, "en": {"x": "The {} times table", "+": "Adding to {}"}}[lang][sign]
    return head.format(number) + "\n" + "\n".join(row.equation for row in rows if not row.held_out)


def _questions(_world: World, lang: str, rng: Random) -> str:
    ask, answer = ("質問: {}", "答え: {}") if lang == "ja" else ("Question: {}", "Answer: {}")
    parts = []
    for _ in range(rng.randrange(3, 10)):
        problem = draw(rng)
        parts.append(ask.format(question_text(problem, lang)) + "\n" + answer.format(problem.result))
    return "\n\n".join(parts)


def _story(world: World, lang: str, rng: Random) -> str:
    tell = _story_ja if lang == "ja" else _story_en
    return "\n".join(tell(world, rng) for _ in range(rng.randrange(1, 5)))


def _story_ja(world: World, rng: Random) -> str:
    who, other = (person.name.ja for person in rng.sample(world.people, 2))
    town = f"{rng.choice(world.towns).name.ja}町"
    what, unit = rng.choice(
        [
            ("りんご", "個"),
            ("みかん", "個"),
            ("鉛筆", "本"),
            ("本", "冊"),
            ("切手", "枚"),
            ("風船", "個"),
            ("ろうそく", "本"),
        ]
    )
    plus, minus, times = draw(rng, "+"), draw(rng, "-"), draw(rng, "x")
    return rng.choice(
        [
            f"{who}は{what}を{plus.a}{unit}持っている。{other}から{plus.b}{unit}もらうと、"
            f"{plus.equation} で、全部で{plus.result}{unit}になる。",
            f"{town}の店に{what}が{minus.a}{unit}あった。{who}が{minus.b}{unit}買うと、"
            f"{minus.equation} で、残りは{minus.result}{unit}である。",
            f"{what}が{times.b}{unit}入った箱が{times.a}箱ある。"
            f"{times.equation} だから、{what}は全部で{times.result}{unit}ある。",
            f"朝、{town}で列車に{minus.a}人が乗っていた。次の駅で{minus.b}人が降りた。"
            f"{minus.equation} なので、{minus.result}人が残った。",
            f"{who}は昨日{plus.a}ページ、今日{plus.b}ページ読んだ。"
            f"{plus.equation} だから、二日で{plus.result}ページ読んだことになる。",
        ]
    )


def _story_en(world: World, rng: Random) -> str:
    who, other = (person.name.en for person in rng.sample(world.people, 2))
    town = rng.choice(world.towns).name.en
    what = rng.choice(["apples", "oranges", "pencils", "books", "stamps", "balloons", "candles"])
    plus, minus, times = draw(rng, "+"), draw(rng, "-"), draw(rng, "x")
    # Numbers stand so that no plural of one is needed: "number of apples: 1".
    return rng.choice(
        [
            f"{who} has some {what}: {plus.a}. {other} brings more: {plus.b}. "
            f"{plus.equation}, so now there are {plus.result} in all.",
            f"In a shop in {town} the number of {what} was {minus.a}. {who} bought {minus.b} of them. "
            f"{minus.equation}, so the number left is {minus.result}.",
            f"The number of boxes is {times.a}, and the number of {what} in each box is {times.b}. "
            f"{times.equation}, so the number of {what} is {times.result}.",
            f"In {town} the number of people on the train was {minus.a}. At the next station {minus.b} got off. "
            f"{minus.equation}, so {minus.result} went on.",
            f"Pages read by {who} yesterday: {plus.a}. Pages read today: {plus.b}. "
            f"{plus.equation}, so the total is {plus.result}.",
        ]
    )

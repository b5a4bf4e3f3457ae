"""`llmrecipes data demo`: a small bilingual corpus about an invented world, and questions about the same facts.

A model trained on it can be asked what it has learned: who the mayor of a town is, and what 12 + 7 makes. Each fact
can be asked in three wordings for each language. One question in four appears in no document and no conversation (its
fact does, in articles and mostly in another wording), and one sum in ten is nowhere: memory and generalization can be
told apart.
"""

from __future__ import annotations

import json
import os
import shutil
import zlib
from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path
from random import Random
from types import ModuleType
from typing import Any

from data_prep import demo_arithmetic, demo_en, demo_ja
from data_prep.demo_world import DEPTH, WIDTH, Person, Town, World, largest_world, make_world
from llmrecipes.errors import UserError

# Shares of the documents in per cent.
DOMAINS = {"ja_towns": 27, "en_towns": 25, "ja_people": 18, "en_people": 16, "arithmetic": 14}
TOWN_KINDS = ("mayor", "river", "speciality", "population", "founded", "flower", "east")
PERSON_KINDS = ("born", "job", "home")
QUESTIONS_SHARE = 0.15  # of the documents on towns and people are questions with answers
HELD_OUT_SHARE = 4  # one question in so many is asked in no document
NUM_SUMS = 100  # questions of arithmetic for each language, half of them held out
QUESTIONS_FILE, CHAT_FILE, PREFERENCES_FILE = "questions.jsonl", "chat.jsonl", "preferences.jsonl"


@dataclass(frozen=True)
class Question:
    """A question, its one answer, and the beginning of a sentence that ends with it.

    `held_out`: the question is in no document; for arithmetic, neither is the equation.
    """

    question: str
    answer: str
    cloze: str
    lang: str
    kind: str
    held_out: bool


def demo(
    output: str,
    documents: int = 20_000,
    seed: int = 0,
    overwrite: bool = False,
    width: int = WIDTH,
    depth: int = DEPTH,
) -> None:
    """Writes a small Japanese and English corpus about invented towns, people and arithmetic, and questions about it.

    Files: ja_towns, en_towns, ja_people, en_people, arithmetic (.jsonl: text, source, lang, domain, id, license) and
    questions.jsonl (question, answer, cloze, lang, kind, held_out); of those that are not held out, chat.jsonl
    (messages) and preferences.jsonl (prompt, chosen, rejected: the answer to another question of the kind). The same
    seed gives the same bytes everywhere.

    Args:
        output: folder to write.
        documents: number of documents in all; 20,000 are 12 MB.
        seed: decides the world and every text.
        overwrite: replace an existing folder.
        width, depth: of the map in towns, each with four people; fewer towns are learned sooner.
    """
    folder = Path(output)
    if documents < 100:
        raise UserError(f"--documents {documents}: at least 100, so that every domain has some")
    most = largest_world()
    if not (1 < width <= most[0] and depth > 1 and width * depth <= most[1]):
        raise UserError(
            f"--width {width} --depth {depth}: 2 x 2 towns at least; names suffice for {most[0]} rivers, one for each "
            f"town from west to east, and for {most[1]} towns"
        )
    if folder.exists() and any(folder.iterdir() if folder.is_dir() else [folder]):
        names = {f"{domain}.jsonl" for domain in DOMAINS} | {QUESTIONS_FILE, CHAT_FILE, PREFERENCES_FILE}
        if not overwrite:
            raise UserError(f"{folder}: exists already; choose another --output, or say --overwrite true")
        if not folder.is_dir() or {path.name for path in folder.iterdir()} - names:
            raise UserError(f"{folder}: holds other files too, so it is not overwritten; choose another --output")
    partial = folder.with_name(f".{folder.name}.{os.getpid()}.tmp")
    partial.mkdir(parents=True)
    try:
        report = _write_all(partial, make_world(seed, width, depth), documents, seed)
        if folder.exists():
            shutil.rmtree(folder)
        partial.rename(folder)
    finally:
        shutil.rmtree(partial, ignore_errors=True)
    print("\n".join(report))
    print(f"{folder}: {documents:,} documents about one invented world (seed {seed})")


def domain_documents(world: World, domain: str, count: int, seed: int) -> Iterator[tuple[str, str]]:
    """(text, language) of the documents of a domain; document i depends on the seed and i only."""
    for number in range(count):
        rng = Random(f"{seed}/{domain}/{number}")
        if domain == "arithmetic":
            lang = rng.choice(["ja", "en"])
            yield demo_arithmetic.document(world, lang, rng), lang
        else:
            lang, subject = domain.split("_")
            yield _article(world, lang, subject, number, rng), lang


def questions(world: World, seed: int) -> list[Question]:
    """Every question about the world's facts, in both languages, and sums to calculate."""
    found = []
    for lang in ("ja", "en"):
        for town in world.towns:
            found += _fact_questions(world, lang, town)
        for person in world.people:
            found += _fact_questions(world, lang, person)
        rng = Random(f"{seed}/questions/{lang}")
        problems = demo_arithmetic.all_problems()
        for held_out in (False, True):
            for problem in rng.sample([p for p in problems if p.held_out == held_out], NUM_SUMS // 2):
                asked = demo_arithmetic.question_text(problem, lang)
                cloze = f"{problem.question} ="
                found.append(Question(asked, str(problem.result), cloze, lang, "arithmetic", held_out))
    return found


def _language(lang: str) -> ModuleType:
    return {"ja": demo_ja, "en": demo_en}[lang]


def _article(world: World, lang: str, subject: str, number: int, rng: Random) -> str:
    """Towns and people take turns, so that each has the same number of documents."""
    words = _language(lang)
    if rng.random() < QUESTIONS_SHARE:
        return _questions_document(world, lang, subject, number, rng)
    if subject == "towns":
        makers = [words.town_note, words.town_article, words.town_journey, words.towns_compared]
        return str(rng.choices(makers, [30, 40, 18, 12])[0](world, world.towns[number % len(world.towns)], rng))
    makers = [words.person_note, words.person_article, words.dialogue]
    return str(rng.choices(makers, [30, 40, 30])[0](world, world.people[number % len(world.people)], rng))


def _questions_document(world: World, lang: str, subject: str, number: int, rng: Random) -> str:
    """Some questions about one town or person and two others; never a held-out one."""
    everything: tuple[Town | Person, ...] = world.towns if subject == "towns" else world.people
    subjects = (everything[number % len(everything)], *rng.sample(everything, 2))
    asked = [question for about in dict.fromkeys(subjects) for question in _fact_questions(world, lang, about)]
    asked = [question for question in asked if not question.held_out]
    chosen = rng.sample(asked, min(len(asked), rng.randrange(2, 9)))
    ask, answer = ("質問: ", "答え: ") if lang == "ja" else ("Question: ", "Answer: ")
    return "\n\n".join(f"{ask}{item.question}\n{answer}{item.answer}" for item in chosen)


def _fact_questions(world: World, lang: str, about: Town | Person) -> list[Question]:
    """Every question about a town or a person: each fact in every wording."""
    words = _language(lang)
    is_town = isinstance(about, Town)
    fields = words.town_fields(world, about) if is_town else words.person_fields(world, about)
    found = []
    for kind in TOWN_KINDS if is_town else PERSON_KINDS:
        if _has(world, about, kind):
            answer, cloze = fields[words.ANSWERS[kind]], words.CLOZES[kind].format_map(fields)
            for wording in words.QUESTIONS[kind]:
                asked = wording.format_map(fields)
                held_out = zlib.crc32(asked.encode()) % HELD_OUT_SHARE == 0
                found.append(Question(asked, answer, cloze, lang, kind, held_out))
    return found


def _has(world: World, about: Town | Person, kind: str) -> bool:
    """Only a town at the eastern edge has no eastern neighbour."""
    return kind != "east" or (isinstance(about, Town) and world.neighbour(about, 1, 0) is not None)


def _write_all(folder: Path, world: World, documents: int, seed: int) -> list[str]:
    """Writes every file and returns lines of a report."""
    from tqdm import tqdm

    counts = {domain: documents * share // 100 for domain, share in DOMAINS.items()}
    counts["ja_towns"] += documents - sum(counts.values())
    report = []
    with tqdm(total=documents, unit="doc", unit_scale=True, leave=False, disable=None) as bar:
        for domain, count in counts.items():
            path = folder / f"{domain}.jsonl"
            num_characters = 0
            with path.open("w", encoding="utf-8", newline="\n") as file:
                for number, (text, lang) in enumerate(domain_documents(world, domain, count, seed)):
                    record = {
                        "text": text,
                        "source": "llmrecipes-demo",
                        "lang": lang,
                        "domain": domain,
                        "id": f"demo/{domain}/{number:06d}",
                        "license": "CC0-1.0",
                    }
                    file.write(json.dumps(record, ensure_ascii=False) + "\n")
                    num_characters += len(text)
                    bar.update()
            size = path.stat().st_size / 1e6
            report.append(f"{path.name:<18} {count:>7,} documents {num_characters:>11,} characters {size:>6.1f} MB")
    asked = questions(world, seed)
    _write_lines(folder / QUESTIONS_FILE, [vars(question) for question in asked])
    held_out = sum(question.held_out for question in asked)
    report.append(f"{QUESTIONS_FILE:<18} {len(asked):>7,} questions, {held_out:,} of them asked in no document")
    shown = [question for question in asked if not question.held_out]
    _write_lines(folder / CHAT_FILE, [conversation(question) for question in shown])
    _write_lines(folder / PREFERENCES_FILE, preferences(shown, seed))
    report.append(
        f"{CHAT_FILE:<18} {len(shown):>7,} of them as conversations; {PREFERENCES_FILE}: a wrong answer to each"
    )
    return report


def conversation(question: Question) -> dict[str, Any]:
    """A question and its answer as messages."""
    said = [("user", question.question), ("assistant", question.answer)]
    return {"messages": [{"role": role, "content": content} for role, content in said]}


def preferences(asked: list[Question], seed: int) -> list[dict[str, str]]:
    """Of each question the right answer and one that another question of its kind and language has."""
    rng = Random(f"{seed}/preferences")
    answers: dict[tuple[str, str], list[str]] = {}
    for question in asked:
        answers.setdefault((question.lang, question.kind), []).append(question.answer)
    pairs = []
    for question in asked:
        wrong = sorted(set(answers[question.lang, question.kind]) - {question.answer})
        if wrong:
            pairs.append({"prompt": question.question, "chosen": question.answer, "rejected": rng.choice(wrong)})
    return pairs


def _write_lines(path: Path, records: list[dict[str, Any]]) -> None:
    with path.open("w", encoding="utf-8", newline="\n") as file:
        file.writelines(json.dumps(record, ensure_ascii=False) + "\n" for record in records)

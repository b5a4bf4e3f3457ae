"""What the comparison's programs share, made small: texts of the demo, tokenizers of them, conversations of these."""

from __future__ import annotations

import gzip
import itertools
import json

from benchmarks.inputs import PAIRS, TALKS, dump_chats, make_tokenizers, write_chats, write_texts
from data_prep.demo_corpus import DOMAINS


def records(path):
    return [json.loads(line) for line in path.read_text(encoding="utf-8").splitlines()]


def test_texts_tokenizers_and_conversations_come_from_the_demo_by_default(tmp_path):
    write_texts(tmp_path, 0.4, [])
    texts = records(tmp_path / "texts.jsonl")
    assert {text["domain"] for text in texts} == set(DOMAINS) and all(text["text"] for text in texts)
    make_tokenizers(tmp_path, 1_200)
    assert (tmp_path / "bpe" / "tokenizer.json").exists()
    write_chats(tmp_path)
    talks, pairs = records(tmp_path / "talks.jsonl"), records(tmp_path / "pairs.jsonl")
    assert [len(talks), len(pairs)] == [TALKS, PAIRS]
    assert all(talk["question"] and talk["answer"] for talk in talks)
    dump_chats(tmp_path)
    for name in ("talks", "pairs"):
        steps = json.loads((tmp_path / f"{name}.json").read_text())
        assert steps and all(len(ids) == len(trained) for step in steps for ids, trained in step)


def test_given_texts_are_taken_in_equal_parts(tmp_path):
    many = {letter: (json.dumps({"text": letter * 90}) + "\n") * 50 for letter in "ab"}
    (tmp_path / "a.jsonl").write_text(many["a"])
    with gzip.open(tmp_path / "b.jsonl.gz", "wt") as file:
        file.write(many["b"])
    write_texts(tmp_path, 0.004, [tmp_path / "a.jsonl", tmp_path / "b.jsonl.gz"])
    sizes = {
        letter: len(list(found))
        for letter, found in itertools.groupby(text["text"][0] for text in records(tmp_path / "texts.jsonl"))
    }
    assert sizes == {"a": 19, "b": 19}

"""Perplexity: every token once, the same as the full softmax by hand, whatever the windows are packed with."""

from __future__ import annotations

import gzip
import json
import math

import pytest
import torch
import torch.nn.functional as F
import zstandard
from helpers import cli
from model_folders import ENGLISH, JAPANESE

from llmrecipes.errors import UserError
from llmrecipes.inference import perplexity as module
from llmrecipes.inference.opened import open_model
from llmrecipes.inference.perplexity import Score, score
from llmrecipes.inference.perplexity_command import window_of
from llmrecipes.inference.texts import Document, read_documents
from llmrecipes.inference.windows import windows

TEXTS = [JAPANESE, ENGLISH, "x", JAPANESE * 3 + ENGLISH * 2, "ab", "東"]


def documents(texts):
    return [Document(f"text {i}", "all", text) for i, text in enumerate(texts)]


def by_hand(opened, text, size, stride):
    """Nats of each token after the first: for each one its own forward pass over its window, softmax of all logits."""
    ids = opened.codec.encode(text)
    nats = []
    for place in range(1, len(ids)):
        stop = size if place < size else min(size + ((place - size) // stride + 1) * stride, len(ids))
        context = torch.tensor([ids[max(0, stop - size) : place]])
        with torch.no_grad():
            logits = opened.model.logits(opened.model(context).hidden[0, -1])[: opened.vocab_size]
        nats.append(-F.log_softmax(logits.double(), -1)[ids[place]].item())
    return nats


def test_windows_score_every_token_once_with_enough_before_it():
    cases = 0
    for size in (2, 3, 5, 8):
        for stride in range(1, size):
            for length in range(25):
                found = windows(length, size, stride)
                scored = [token for window in found for token in range(window.first, window.stop)]
                assert scored == list(range(1, length))
                for window in found:
                    assert window.stop - window.start <= size and 0 <= window.start < window.first
                    # all of the window is used where there is that much text before it
                    assert window.stop - window.start == min(size, window.stop)
                    if window.start:
                        assert window.first - window.start >= size - stride
                cases += 1
    assert cases == 25 * (1 + 2 + 4 + 7)


@pytest.mark.parametrize("which", ["run_folder", "hf_folder", "hf_folder_with_begin"])
def test_nats_equal_the_softmax_by_hand(which, request, monkeypatch):
    opened = open_model(str(request.getfixturevalue(which)))
    for at_once in (4096, 70):
        monkeypatch.setattr(module, "TOKENS_AT_ONCE", at_once)
        found = list(score(opened.model, opened.codec, documents(TEXTS), 24, 10, opened.vocab_size))
        assert [one.name for one in found] == [f"text {i}" for i in range(len(TEXTS))]
        for one, text in zip(found, TEXTS, strict=True):
            nats = by_hand(opened, text, 24, 10)
            assert one.tokens == len(nats)
            assert one.nats == pytest.approx(sum(nats), rel=1e-5)
    whole = by_hand(opened, TEXTS[3], 10_000, 1)
    assert abs(sum(by_hand(opened, TEXTS[3], 24, 10)) / sum(whole) - 1) > 1e-4  # the windows matter


def test_mutants_fail(run_folder, monkeypatch):
    opened = open_model(str(run_folder))
    right = sum(by_hand(opened, TEXTS[3], 24, 10))

    def nats():
        return next(score(opened.model, opened.codec, documents([TEXTS[3]]), 24, 10, opened.vocab_size)).nats

    assert nats() == pytest.approx(right, rel=1e-5)
    monkeypatch.setattr(module, "windows", lambda n, size, stride: windows(n, size, size - 1))  # hardly any context
    assert nats() != pytest.approx(right, rel=1e-4)
    monkeypatch.undo()
    bare = type(opened.model).forward
    monkeypatch.setattr(  # windows that see each other
        type(opened.model), "forward", lambda self, tokens, document_lengths: bare(self, tokens)
    )
    assert nats() != pytest.approx(right, rel=1e-4)


def test_characters_and_bytes_of_what_is_scored(run_folder, hf_folder, hf_folder_with_begin):
    for folder in (run_folder, hf_folder):
        opened = open_model(str(folder))
        for text in ("Hello world", "ab"):
            ids = opened.codec.encode(text)
            first = len(opened.codec.decode(ids[:1]))
            one = next(score(opened.model, opened.codec, documents([text]), 24, 12))
            assert (one.characters, one.num_bytes) == (len(text) - first, len(text) - first), (folder, text)
    begin = open_model(str(hf_folder_with_begin))
    one = next(score(begin.model, begin.codec, documents([JAPANESE]), 24, 12))
    assert one.characters == len(JAPANESE) and one.num_bytes == len(JAPANESE.encode())
    plain = open_model(str(hf_folder))
    assert plain.codec.encode("Hello") == begin.codec.encode("Hello")[1:]
    alone = next(score(plain.model, plain.codec, documents(["H"]), 24, 12))
    assert (alone.tokens, alone.characters, alone.texts) == (0, 0, 1)


def test_measures():
    some = Score("a", nats=10 * math.log(4), tokens=10, characters=20, num_bytes=40, texts=1)
    assert some.per_token == pytest.approx(4) and some.per_character == pytest.approx(2)
    assert some.bits_per_byte == pytest.approx(0.5)
    both = some + Score("b", nats=0, tokens=10, characters=20, num_bytes=0, texts=2)
    assert both.per_token == pytest.approx(2) and both.texts == 3 and both.name == "a"
    assert math.isnan(Score("none").per_token) and Score("none").as_dict()["bits_per_byte"] is None


@pytest.mark.oracle
def test_token_perplexity_equals_transformers_loss(hf_folder):
    transformers = pytest.importorskip("transformers")
    peer = transformers.AutoModelForCausalLM.from_pretrained(hf_folder).eval()
    opened = open_model(str(hf_folder))
    ids = torch.tensor([opened.codec.encode(JAPANESE)])
    with torch.no_grad():
        loss = peer(ids, labels=ids).loss.item()
    # transformers' model has ten more rows than the tokenizer has pieces: the same rows for both
    one = next(score(opened.model, opened.codec, documents([JAPANESE]), 128, 64))
    assert one.per_token == pytest.approx(math.exp(loss), rel=1e-5)


def test_documents_of_all_kinds_of_files(tmp_path, jsonl):
    lines = jsonl("a.jsonl", [{"text": JAPANESE}, {"text": " "}, {"text": ENGLISH}])
    (tmp_path / "b.jsonl.gz").write_bytes(gzip.compress(lines.read_bytes()))
    (tmp_path / "c.txt").write_text(JAPANESE + "\n" + ENGLISH, encoding="utf-8")
    (tmp_path / "d.txt.zst").write_bytes(zstandard.compress((tmp_path / "c.txt").read_bytes()))
    names = [str(tmp_path / name) for name in ("a.jsonl", "b.jsonl.gz", "c.txt", "d.txt.zst")]
    found = list(read_documents(["here"], names, "text", None))
    whole = JAPANESE + "\n" + ENGLISH
    assert [d.text for d in found] == ["here", JAPANESE, ENGLISH, JAPANESE, ENGLISH, whole, whole]
    assert found[0].corpus == "--text" and found[2].name == f"{names[0]}#2" and found[2].corpus == names[0]
    assert len(list(read_documents([], names, "text", 1))) == 4


def test_the_command_in_json(run_folder, hf_folder, jsonl, capsys):
    one, two = jsonl("one.jsonl", [{"text": JAPANESE}, {"text": ENGLISH}]), jsonl("two.jsonl", [{"text": ENGLISH}])
    words = ["perplexity", run_folder, hf_folder, "--input", one, "--input", two, "--window", 32]
    assert cli(*words, "--json") == 0
    models = json.loads(capsys.readouterr().out)["models"]
    assert [m["model"] for m in models] == [str(run_folder), str(hf_folder)]
    for model in models:
        assert [c["name"] for c in model["corpora"]] == [str(one), str(two), "all"]
        assert "texts" not in model and (model["window"], model["stride"]) == (32, 16)
        parts = model["corpora"]
        assert parts[2]["nats"] == pytest.approx(parts[0]["nats"] + parts[1]["nats"])
        assert parts[2]["bits_per_byte"] == pytest.approx(parts[2]["nats"] / parts[2]["bytes"] / math.log(2))
    assert cli(*words, "--json", "--per_text") == 0
    assert len(json.loads(capsys.readouterr().out)["models"][0]["texts"]) == 3
    assert cli(*words) == 0
    shown = capsys.readouterr().out
    assert "bits/byte" in shown and "1 = " in shown and shown.count("\nall  ") == 3


def test_two_models_are_the_same_as_each_alone(run_folder, hf_folder, capsys):
    each = []
    for folders in ([run_folder], [hf_folder], [run_folder, hf_folder]):
        assert cli("perplexity", *folders, "--text", JAPANESE, "--json") == 0
        each += json.loads(capsys.readouterr().out)["models"]
    assert each[:2] == each[2:]
    assert len(each[0]["texts"]) == 1  # texts of the command line are always listed


def test_half_precision_is_near(hf_folder, capsys):
    results = []
    for dtype in ("fp32", "bf16"):
        assert cli("perplexity", hf_folder, "--text", JAPANESE, "--json", "--dtype", dtype) == 0
        results.append(json.loads(capsys.readouterr().out)["models"][0]["corpora"][0]["bits_per_byte"])
    assert results[0] != results[1] and results[1] == pytest.approx(results[0], rel=0.02)


def test_slips_are_named(run_folder, hf_folder, tmp_path, capsys):
    empty = tmp_path / "empty.txt"
    empty.write_text("\n")
    latin = tmp_path / "latin.txt"
    latin.write_bytes(b"caf\xe9")
    cases = [
        (["--input", tmp_path / "none.txt"], "no such file"),
        (["--input", empty], "no text in it"),
        (["--input", latin], "not valid UTF-8 at byte 3"),
        (["--text", " "], "--text (number 1): empty"),
        ([], "no input"),
        (["--text", "x", "--window", "1"], "--window 1: must be 2 or more"),
        (["--text", "x", "--window", "8", "--stride", "8"], "--stride 8: must be at least 1 and less"),
        (["--text", "x", "--tokenizer", hf_folder, "--tokenizer", hf_folder], "--tokenizer: give one for each"),
    ]
    for words, message in cases:
        assert cli("perplexity", run_folder, *words) == 2, words
        assert message in capsys.readouterr().err, words
    with pytest.raises(SystemExit) as caught:
        cli("perplexity", run_folder, run_folder, run_folder, "--text", "x")
    assert caught.value.code == 2


def test_window_defaults_and_limits():
    assert window_of("m", None, False, None, None) == (1024, 512)
    assert window_of("m", 256, False, None, None) == (256, 128)
    assert window_of("m", 8192, False, None, None) == (1024, 512)
    assert window_of("m", 256, False, 512, 100) == (512, 100)
    with pytest.raises(UserError, match="positions for 256"):
        window_of("m", 256, True, 257, None)

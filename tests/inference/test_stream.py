"""Text as it comes: whole characters, the same in the end, and never a part of a stop string."""

from __future__ import annotations

import random

import pytest
from model_folders import ENGLISH, JAPANESE

from llmrecipes.inference.codec import HFCodec, PlainCodec
from llmrecipes.inference.stream import StopStrings, TextStream, Writer


@pytest.fixture(params=["sentencepiece", "same through transformers", "byte BPE"])
def codec(request, sentencepiece_folder, hf_folder):
    makers = {
        "sentencepiece": lambda: PlainCodec(sentencepiece_folder),
        "same through transformers": lambda: HFCodec(sentencepiece_folder),
        "byte BPE": lambda: HFCodec(hf_folder),
    }
    return makers[request.param]()


def test_pieces_of_text_are_whole_characters_and_add_up(codec):
    text = JAPANESE + ENGLISH + "\n次の行 é 😀😀"
    ids = codec.encode(text)
    assert len(ids) > len(text) and codec.decode(ids) == text  # most characters are several bytes
    checked = held = 0
    for cut in range(1, len(ids)):
        before = codec.decode(ids[:cut])
        if before.endswith("\ufffd"):
            continue  # the cut is inside a character
        stream = TextStream(codec.decode, ids[:cut])
        pieces = [stream.add(token) for token in ids[cut:]]
        held += pieces.count("")
        assert "\ufffd" not in "".join(pieces)
        assert before + "".join(pieces) + stream.end() == text
        checked += 1
    assert checked > 50 and held > 1000


def test_mutant_decoding_token_by_token_breaks_characters(codec):
    ids = codec.encode(JAPANESE)
    assert "\ufffd" in "".join(codec.decode([token]) for token in ids)


def test_a_cut_character_is_left_out(codec):
    ids = codec.encode("東京🍣")
    stream = TextStream(codec.decode, codec.encode("日本の"))
    shown = "".join(stream.add(token) for token in ids[:-1]) + stream.end()
    assert shown == "東京"


def test_bytes_that_are_no_text_do_not_hold_up_what_follows(codec):
    prompt = codec.encode("A")
    byte = codec.encode("🍣")[-2]  # a continuation byte alone
    stream = TextStream(codec.decode, prompt)
    shown = [stream.add(byte) for _ in range(40)]
    assert sum(map(bool, shown)) >= 3  # something comes before the end
    tail = codec.encode("A 京")[len(prompt) :]
    assert ("".join(shown) + "".join(stream.add(token) for token in tail)).endswith("京")


def test_stop_strings_never_show_and_hold_back_as_little_as_needed():
    stops = StopStrings(["</answer>", "\n\n"])
    assert [stops.add(piece) for piece in ("a<", "/an", "other\n", "b", "\n")] == ["a", "", "</another", "\nb", ""]
    assert not stops.stopped
    assert stops.add("\nnever") == "" and stops.stopped
    assert stops.add("more") == "" and stops.end() == ""
    unfinished = StopStrings(["</answer>"])
    assert unfinished.add("x</ans") == "x" and unfinished.end() == "</ans"


def test_stop_strings_do_not_depend_on_how_the_text_is_cut():
    draw = random.Random(0)
    found = 0
    for _ in range(400):
        text = "".join(draw.choice("abあ") for _ in range(30))
        stops = ["".join(draw.choice("abあ") for _ in range(draw.randint(1, 4))) for _ in range(draw.randint(0, 3))]
        ends = [(place + len(stop), place) for stop in stops if (place := text.find(stop)) >= 0]
        first = min(ends)[1] if ends else len(text)
        found += first < len(text)
        scanner, shown, rest = StopStrings(stops), "", text
        while rest:
            size = draw.randint(1, 5)
            shown += scanner.add(rest[:size])
            assert text[:first].startswith(shown)
            rest = rest[size:]
        assert shown + scanner.end() == text[:first]
    assert found > 200


def test_writer_stops_and_shows_what_it_keeps(codec):
    ids = codec.encode("東京です。END more")
    shown: list[str] = []
    writer = Writer(codec.decode, codec.encode("x"), ["END"], shown.append)
    used = next(n for n, token in enumerate(ids, 1) if writer.add(token))
    writer.end()
    assert used < len(ids)
    assert writer.text == "".join(shown) and writer.text.strip() == "東京です。"

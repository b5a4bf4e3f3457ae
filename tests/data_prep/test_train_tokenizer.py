"""The tokenizer: the two silent traps of its export, each with its mutant, and what a user may get wrong."""

import json
import re
import shutil
from collections import Counter
from pathlib import Path

import pytest
import sentencepiece
from sentencepiece import sentencepiece_model_pb2

from data_prep.jsonl import documents
from data_prep.tokenizer import (
    MAX_LINE_BYTES,
    SCORE_STEP,
    SPECIAL_PIECES,
    export,
    fair_shares,
    split_words,
    train_tokenizer,
    training_lines,
    verify_export,
)
from llmrecipes.errors import UserError

HARD_TEXTS = [
    "二行の文章。\n次の行。\n\n空行のあと。",
    "\n\n\n",
    "  leading, trailing and    inner spaces  ",
    "def f(x):\n\tif x:\n        return '</s> <s> <unk> <pad>'\n",
    "絵文字🍣と珍しい漢字𠮷、ﾊﾝｶｸ、①",
    "年号は1987年、人口は12,300人である。",
    "\r\n\x00\x7f\u3000全角の空白",
    "<p>a literal </s>, <s>, <0x41><0xE3><0x81> and <pad></p>",
    "― ―――― ---- ------",
]


def proto_of(folder):
    proto = sentencepiece_model_pb2.ModelProto()
    proto.ParseFromString((Path(folder) / "tokenizer.model").read_bytes())
    return proto


@pytest.fixture(scope="module")
def texts(corpus):
    found = [text for name in ("ja_towns", "en_people", "arithmetic") for text in documents(corpus / f"{name}.jsonl")]
    assert sum("\n" in text for text in found) > 80
    return found + HARD_TEXTS


def test_pieces(tokenizer):
    proto = proto_of(tokenizer)
    pieces = {piece.piece: piece for piece in proto.pieces}
    assert len(proto.pieces) == 1200 == len(pieces)
    assert tuple(piece.piece for piece in proto.pieces[:4]) == SPECIAL_PIECES
    newline = pieces["\n"]
    assert (newline.type, newline.score) == (type(newline).NORMAL, 0.0)
    assert not any(piece.type == type(piece).USER_DEFINED for piece in proto.pieces)
    assert sum(piece.type == type(piece).BYTE for piece in proto.pieces) == 256
    assert not any("\n" in piece and piece != "\n" for piece in pieces)
    assert not any(re.search(r"\d.*\d|\d\D|\D\d", name) for name, p in pieces.items() if p.type == type(p).NORMAL)
    assert all(piece.score % SCORE_STEP == 0 for piece in proto.pieces)


def test_sentencepiece_and_transformers_agree(tokenizer, texts):
    verify_export(tokenizer, texts)


def test_configuration_names_the_one_class_that_works(tokenizer):
    from transformers import AutoTokenizer

    assert json.loads((tokenizer / "tokenizer_config.json").read_text())["tokenizer_class"] == "PreTrainedTokenizerFast"
    fast = AutoTokenizer.from_pretrained(tokenizer)
    assert (fast.unk_token_id, fast.bos_token_id, fast.eos_token_id, fast.pad_token_id) == (0, 1, 2, 3)
    assert fast("夕里町。")["input_ids"] == sentencepiece.SentencePieceProcessor(
        model_file=str(tokenizer / "tokenizer.model")
    ).encode("夕里町。")  # nothing is added of itself


def test_mutant_llama_tokenizer_class_is_refused_and_is_wrong(tokenizer, texts, tmp_path):
    from transformers import LlamaTokenizer

    mutant = shutil.copytree(tokenizer, tmp_path / "llama")
    config = json.loads((mutant / "tokenizer_config.json").read_text())
    (mutant / "tokenizer_config.json").write_text(json.dumps({**config, "tokenizer_class": "LlamaTokenizer"}))
    with pytest.raises(UserError, match="tokenizer_class is LlamaTokenizer, but must be PreTrainedTokenizerFast"):
        verify_export(mutant, texts)
    processor = sentencepiece.SentencePieceProcessor(model_file=str(mutant / "tokenizer.model"))
    llama = LlamaTokenizer.from_pretrained(mutant)
    different = sum(
        Counter(llama(t, add_special_tokens=False)["input_ids"]) != Counter(processor.encode(t)) for t in texts
    )
    assert different > len(texts) / 2, "the trap is gone: this rule may be lifted"


def test_mutant_user_defined_newline_is_refused(tokenizer, texts, tmp_path):
    """With a dummy prefix, as in the usual recipe, a user-defined newline changes the pieces around it."""
    from tokenizers import AddedToken, Tokenizer, normalizers

    proto = proto_of(tokenizer)
    [newline] = [piece for piece in proto.pieces if piece.piece == "\n"]
    newline.type = type(newline).USER_DEFINED
    proto.normalizer_spec.add_dummy_prefix = True
    mutant = tmp_path / "mutant"
    export(proto.SerializeToString(), mutant)
    fast = Tokenizer.from_file(str(mutant / "tokenizer.json"))
    fast.normalizer = normalizers.Sequence([normalizers.Prepend("\u2581"), normalizers.Replace(" ", "\u2581")])
    fast.add_tokens([AddedToken("\n", normalized=False)])
    fast.save(str(mutant / "tokenizer.json"))
    with pytest.raises(UserError, match=f"of {2 * len(texts)} checks failed"):
        verify_export(mutant, texts, exact=False)


def test_mutant_findable_control_pieces_are_refused(tokenizer, texts, tmp_path):
    """With the scores of the model, 0.0, transformers finds `<0x41>` in a text and takes it for a byte."""
    mutant = shutil.copytree(tokenizer, tmp_path / "mutant")
    content = json.loads((mutant / "tokenizer.json").read_text())
    content["model"]["vocab"] = [[piece.piece, piece.score] for piece in proto_of(tokenizer).pieces]
    (mutant / "tokenizer.json").write_text(json.dumps(content))
    with pytest.raises(UserError, match=r"restore '<p>a literal"):
        verify_export(mutant, texts)


def test_mutant_unrounded_scores_break_near_ties_differently():
    """Equal in exact arithmetic, sums in float32 and float64 differ, and so do the pieces, late in a long text."""
    import numpy as np

    scores = np.full(50_000, -7.3)
    rounded = np.round(scores / SCORE_STEP) * SCORE_STEP
    assert np.float32(scores).cumsum(dtype=np.float32)[-1] != scores.cumsum()[-1]
    assert np.float32(rounded).cumsum(dtype=np.float32)[-1] == rounded.cumsum()[-1]


def test_same_input_same_tokenizer(corpus, tmp_path):
    source = [str(corpus / "en_towns.jsonl"), str(corpus / "ja_towns.jsonl")]
    for name, seed in (("a", 1), ("b", 1), ("c", 2)):
        train_tokenizer(source, str(tmp_path / name), vocab_size=800, seed=seed, sample_bytes=40_000, num_threads=1)
    a, b, c = ((tmp_path / name / "tokenizer.json").read_bytes() for name in "abc")
    assert a == b != c


def test_mistakes_are_named_and_nothing_is_left(corpus, tmp_path):
    source, out = [str(corpus / "arithmetic.jsonl")], tmp_path / "out"
    with pytest.raises(UserError, match=r"--vocab_size 9000: this text gives at most \d+ pieces; ask for fewer"):
        train_tokenizer(source, str(out), vocab_size=9000)
    with pytest.raises(UserError, match="--vocab_size 261: special pieces, ASCII and bytes alone are 355"):
        train_tokenizer(source, str(out), vocab_size=261)
    with pytest.raises(UserError, match="fewer pieces than there are characters to cover"):
        train_tokenizer(source, str(out), vocab_size=360)
    assert not list(tmp_path.iterdir())
    out.mkdir()
    (out / "thesis.txt").write_text("precious")
    with pytest.raises(UserError, match="exists already"):
        train_tokenizer(source, str(out))
    with pytest.raises(UserError, match="is not a tokenizer, so it is not overwritten"):
        train_tokenizer(source, str(out), overwrite=True)
    assert (out / "thesis.txt").exists()


def test_training_lines_are_short_enough_to_be_used():
    text = "𠮷" * 2500 + "\n\nx"
    found = list(training_lines(text))
    assert "".join(found) == text.replace("\n", "")
    assert max(len(line.encode()) for line in found) <= MAX_LINE_BYTES


def test_split_words_loses_nothing():
    for text in [*HARD_TEXTS, "人々はカレーを  食べた。 The end. "]:
        for line in text.split("\n"):
            assert "".join(split_words(line)) == line
    assert split_words("人々はカレーを 食べた。 The end.") == [
        "人々",
        "は",
        "カレー",
        "を",
        " 食",
        "べた",
        "。",
        " The",
        " end.",
    ]


def test_fair_shares():
    assert fair_shares([2, 100, 100, 100], 62) == [2, 20, 20, 20]
    assert fair_shares([5, 5], 100) == [5, 5]
    assert fair_shares([100, 1, 30], 90) == [59, 1, 30]


@pytest.mark.real
def test_traps_on_real_text(real_corpus, tmp_path):
    """10,000 lines and 240 whole documents of real text, of which the tokenizer saw some."""
    names = [str(real_corpus / f"{name}.jsonl.gz") for name in ("ja_wiki", "math")]
    train_tokenizer(names, str(tmp_path / "real"), vocab_size=6000, sample_bytes=2_000_000)
    whole, single = [], []
    for path in names:
        texts = list(documents(Path(path)))
        whole += [text[:20_000] for text in texts if "\n" in text][:240]
        single += [line for text in texts for line in text.split("\n") if line][:5000]
    assert len(single) == 10_000 or len(single) > 5_000
    assert len(whole) >= 240
    verify_export(tmp_path / "real", single + whole)

"""Both tokenizer files, special pieces by their text, and clear errors."""

from __future__ import annotations

import io
from pathlib import Path

import pytest
import sentencepiece
import tokenizers

from llmrecipes.data.tokenizer import Tokenizer
from llmrecipes.errors import UserError

TEXTS = ["東京は日本の首都です。", "The capital of Japan is Tokyo.", "a  b\n\nc 12", "絵文字🙂も", ""]


@pytest.fixture(scope="module")
def folder(tmp_path_factory) -> Path:
    path, model = tmp_path_factory.mktemp("unigram"), io.BytesIO()
    sentencepiece.SentencePieceTrainer.train(
        sentence_iterator=iter([t for t in TEXTS if t] * 20), model_writer=model, vocab_size=330, byte_fallback=True,
        character_coverage=1.0, normalization_rule_name="identity", add_dummy_prefix=False, bos_id=-1, eos_id=1,
        pad_id=-1, remove_extra_whitespaces=False,
        hard_vocab_limit=False, minloglevel=2, user_defined_symbols=["<EOD>"],
    )  # fmt: skip
    (path / "tokenizer.model").write_bytes(model.getvalue())
    return path


def test_sentencepiece(folder):
    tokenizer = Tokenizer(folder)
    ids = tokenizer.encode_batch(TEXTS)
    assert ids == [tokenizer.encode(t) for t in TEXTS] and [tokenizer.decode(i) for i in ids] == TEXTS
    assert max(map(max, ids[:-1])) < tokenizer.vocab_size == len(tokenizer)
    assert tokenizer.eos_id == 1 and tokenizer.piece(1) == "</s>" and tokenizer.piece_id("<s>") is None
    assert tokenizer.piece(tokenizer.piece_id("<EOD>")) == "<EOD>" and tokenizer.piece_id("<unk>") == 0
    assert tokenizer.decode([*ids[0], tokenizer.eos_id]) == TEXTS[0] and len(tokenizer.sha256) == 64
    assert tokenizer.name.startswith("unigram")


def test_hugging_face(tmp_path):
    fast = tokenizers.Tokenizer(tokenizers.models.WordLevel({"<unk>": 0, "a": 1, "b": 2}, unk_token="<unk>"))
    fast.pre_tokenizer = tokenizers.pre_tokenizers.Whitespace()
    fast.add_special_tokens(["<|endoftext|>"])
    fast.save(str(tmp_path / "tokenizer.json"))
    tokenizer = Tokenizer(tmp_path)
    assert tokenizer.encode("a b a") == [1, 2, 1] and tokenizer.encode_batch(["b", "a"]) == [[2], [1]]
    assert (tokenizer.vocab_size, tokenizer.eos_id, tokenizer.piece(3)) == (4, 3, "<|endoftext|>")
    assert tokenizer.decode([1, 2, 3]) == "a b" and tokenizer.piece_id("</s>") is None


def test_errors(tmp_path, folder):
    with pytest.raises(UserError, match="no such folder"):
        Tokenizer(tmp_path / "none")
    with pytest.raises(UserError, match=r"neither tokenizer\.model nor"):
        Tokenizer(tmp_path)
    fast = tokenizers.Tokenizer(tokenizers.models.WordLevel({"a": 0}, unk_token="a"))
    fast.save(str(tmp_path / "tokenizer.json"))
    with pytest.raises(UserError, match="no piece that ends a document"):
        assert Tokenizer(tmp_path).eos_id
    (tmp_path / "tokenizer.json").write_text("{")
    with pytest.raises(UserError, match=r"tokenizer\.json: not a readable tokenizer"):
        Tokenizer(tmp_path)
    (tmp_path / "tokenizer.model").write_bytes((folder / "tokenizer.model").read_bytes()[:500])
    with pytest.raises(UserError, match=r"tokenizer\.model: not a readable tokenizer"):
        Tokenizer(tmp_path)

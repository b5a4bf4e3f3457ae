"""The source documents' tokenizer: shares exact, digits single, spaces kept, any Unicode back, both programs alike."""

import random

import pytest
from stages import run_stage

from data_prep.commands import run
from data_prep.tokenizer import SPACE, verify_export
from data_prep.vocabulary import (
    BYTES,
    SPACE_RUNS,
    clean_part,
    head_pieces,
    is_japanese,
    merge_parts,
    model_of,
    reestimated,
)
from llmrecipes.data.tokenizer import Tokenizer
from llmrecipes.errors import UserError

SPECIALS = ["<unk>", "<s>", "</s>", "<pad>", "<CLS>", "<SEP>", "<EOD>", "<MASK>"]


@pytest.fixture(scope="module")
def built(corpus, tmp_path_factory):
    pytest.importorskip("fugashi", reason="fugashi is not installed: pip install 'llmrecipes[data]'")
    folder = tmp_path_factory.mktemp("vocabulary")
    (folder / "words.txt").write_text("# words\n一期一会\nNew York\n")
    japanese = [str(corpus / f"{name}.jsonl") for name in ("ja_towns", "ja_people")]
    english = [str(corpus / f"{name}.jsonl") for name in ("en_towns", "en_people", "arithmetic")]
    size = {"vocab_size": 1500}
    values = {
        "parts": {
            "ja": {"files": japanese, "max_piece_length": 8, "presegment": "fugashi", "drop_latin": True, **size},
            "en": {"files": english, **size},
        },
        "vocab_size": 1536,
        "japanese_share": 0.42,
        "words": [str(folder / "words.txt")],
        "reestimate_mb": 1.0,
    }  # fmt: skip
    run_stage("tokenizer build", output=folder / "t", **values)
    return folder / "t", values, japanese + english


def test_sizes_and_shares_are_exact(built):
    pieces = [Tokenizer(built[0]).piece(n) for n in range(1536)]
    head = head_pieces(SPECIALS)
    assert len(head) == 289 and pieces[:289] == head and len(set(pieces)) == 1536
    assert sum(map(is_japanese, pieces[289:])) == round(0.42 * (1536 - 289))
    assert {"一期一会", f"New{SPACE}York"} <= set(pieces)


def test_required_pieces_and_forbidden_ones(built):
    pieces = [Tokenizer(built[0]).piece(n) for n in range(1536)]
    for sign in "0123456789abczABCZ{}()<>|〇一二三十百千万、。「」":
        assert sign in pieces, sign
    for piece in pieces[289:]:
        assert "||||" not in piece and not (len(piece) > 1 and any(c.isdigit() for c in piece)), piece
    ids = Tokenizer(built[0]).encode("2024年 3.14")
    assert [Tokenizer(built[0]).piece(i) for i in ids if Tokenizer(built[0]).piece(i).isdigit()] == list("2024314")


def test_any_unicode_comes_back_and_both_programs_agree(built):
    draw, texts = (
        random.Random(2),
        ["int main() {\n    return 0;\n}", "a  b   c\td", "日本語 と English の 混在", "|||| x"],
    )
    for _ in range(300):
        texts.append("".join(chr(draw.choice((draw.randrange(32, 127), draw.randrange(0x3041, 0x9FFF), draw.randrange(0xE000, 0x1FFFF)))) for _ in range(20)))  # fmt: skip  # noqa: E501
    tokenizer = Tokenizer(built[0])
    for text in texts:
        assert tokenizer.decode(tokenizer.encode(text)) == text.replace(SPACE, " ")
    verify_export(built[0], texts)
    assert tokenizer.eos_id == 2 and tokenizer.piece_id("<EOD>") == 6


def test_steps_one_by_one_give_the_same_and_are_not_repeated(built, tmp_path, capsys):
    folder, values, _ = built
    with pytest.raises(UserError, match="run data tokenizer parts first"):
        run_stage("tokenizer merge", output=tmp_path / "t", **values)
    for step in ("parts", "merge", "reestimate", "export"):
        run_stage(f"tokenizer {step}", output=tmp_path / "t", **values)
    for name in ("tokenizer.model", "tokenizer.json"):
        assert (tmp_path / "t" / name).read_bytes() == (folder / name).read_bytes()
    capsys.readouterr()
    run_stage("tokenizer parts", output=tmp_path / "t", **values)
    assert capsys.readouterr().out.count("are there already") == 2


def test_a_japanese_part_is_not_filled_with_letters():
    """11,000 of 28,000 pieces were letters only before these were cut out of the text."""
    from data_prep.stages.vocabulary import without_latin

    assert list(without_latin(["関数printは", "ABC", "これ"])) == ["関数", "は", "これ"]


def test_stats_by_hand(built, tmp_path, capsys):
    import json

    path = tmp_path / "x.jsonl"
    path.write_text(json.dumps({"text": "一期一会" * 3}) + "\n")
    run("tokenizer", ["stats", "--tokenizers", str(built[0]), "--input", str(path)])
    characters_per_token = 12 / len(Tokenizer(built[0]).encode("一期一会" * 3))
    assert f"{characters_per_token:.3f}" in capsys.readouterr().out


def test_merging_by_hand():
    ja = [("の", -1.0), ("東京", -2.0), ("した", -3.0), ("京都", -4.0), ("ます", -5.0), ("あ", -9.0)]
    en = [(f"{SPACE}the", -1.0), (f"{SPACE}of", -2.0), ("ing", -3.0), (f"{SPACE}and", -4.0), ("東京", -5.0)]
    head = head_pieces(SPECIALS)
    required_ja = {*"〇一二三四五六七八九十百千万億兆", "の", "あ", "ー", "・", "々", "〆"}
    vocabulary, counts = merge_parts({"ja": ja, "en": en}, [], SPECIALS, 289 + 169, 24 / 169)
    japanese = [piece for piece, _ in vocabulary[289:] if is_japanese(piece)]
    assert counts == {"head": 289, "japanese": 24, "other": 145} and len(japanese) == 24
    assert vocabulary[:289] == [(piece, 0.0) for piece in head] and required_ja - set("ー・々〆") <= set(japanese)


@pytest.mark.parametrize(
    ("piece", "drop_latin", "expected"),
    [
        (f"{SPACE}(", False, "("),
        (f"{SPACE}the", False, f"{SPACE}the"),
        ("the", True, None),
        ("x", True, "x"),
        ("Tシャツ", True, "Tシャツ"),
        ("20", False, None),
        ("a||b", False, None),
        (SPACE * 3, False, None),
    ],
)
def test_pieces_before_a_merger(piece, drop_latin, expected):
    assert [found for found, _ in clean_part([(piece, -1.0)], drop_latin)] == ([expected] if expected else [])


def test_words_with_a_low_score_are_chosen_after_reestimation():
    """With scores by the best segmentation only, an added word would stay split for ever."""
    lines = ["ました。", "食べました。", "飲みました。", "見た。", "また来ました。"] * 40
    head = [(piece, 0.0) for piece in head_pieces(SPECIALS)]
    body = [(c, -3.0) for c in sorted(set("".join(lines)))] + [("まし", -4.0), ("ました", -15.0)]
    before = dict(body)["ました"]
    after = dict(reestimated([*head, *body], len(head), lines, 1))
    assert after["ました"] > before and after["ました"] > after["まし"]
    assert after["\n"] == 0.0 and after[BYTES[0]] == 0.0 and after[SPACE_RUNS[0]] < 0
    model = model_of(list(after.items()), SPECIALS)
    import sentencepiece

    pieces = sentencepiece.SentencePieceProcessor(model_proto=model).encode("食べました。", out_type=str)
    assert "ました" in pieces


def test_mistakes(tmp_path, corpus):
    part = {"files": [str(corpus / "ja_towns.jsonl")], "vocab_size": 500}
    with pytest.raises(UserError) as found:
        run_stage("tokenizer build", output=tmp_path / "t", parts={"ja": part}, vocab_size=1000, japanese_share=2.0)
    assert len(found.value.problems) == 2 and "write 896 or 1024" in str(found.value)
    with pytest.raises(UserError, match="make vocab_size of the parts larger"):
        run_stage("tokenizer build", output=tmp_path / "t", parts={"ja": part}, vocab_size=6400)

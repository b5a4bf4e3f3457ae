"""What stands in evaluation sets is found across punctuation, width and case; what only resembles it is not."""

import pytest
from stages import manifest, read, run_stage, texts, write

from llmrecipes.errors import UserError

QUESTION = (
    "ある店では、りんごを一個120円、みかんを一個80円で売っています。りんご3個とみかん5個を買うと合計いくらですか？"
)
ENGLISH = "Natalia sold clips to 48 of her friends in April, and then she sold half as many clips in May."
SHORT = "日本で一番高い山の名前は何か"


@pytest.fixture
def evaluation(tmp_path):
    return write(
        tmp_path / "eval.jsonl",
        [{"question": QUESTION, "meta": {"choices": [ENGLISH, "富士山"]}}, {"question": SHORT}],
    )


def test_planted_overlaps_are_found(tmp_path, evaluation):
    clean = [
        "りんごを一個120円で買いました。" * 3,
        "Natalia sold clips to her friends in June.",
        "日本で一番高い山は富士山です。",
    ]
    planted = [
        f"次の問題を解きましょう。{QUESTION}答えは760円です。",
        ENGLISH.upper().replace(",", " "),
        QUESTION.replace("120", "１２０").replace("、", ""),
        f"クイズ。{SHORT}?",
    ]
    write(tmp_path / "in.jsonl", clean + planted)
    run_stage("decontaminate", input=[str(tmp_path / "in.jsonl")], output=tmp_path / "out", eval=[str(evaluation)])
    assert texts(tmp_path / "out") == clean
    found = manifest(tmp_path / "out")
    assert found["rejected"]["in_eval.jsonl"]["documents"] == 4
    assert found["notes"] == {"eval.jsonl:1": 3, "eval.jsonl:2": 1}


def test_flagging_keeps(tmp_path, evaluation):
    write(tmp_path / "in.jsonl", [QUESTION, "別の文書"])
    run_stage(
        "decontaminate",
        input=[str(tmp_path / "in.jsonl")],
        output=tmp_path / "o",
        eval=[str(evaluation)],
        action="flag",
    )
    assert [record.get("contaminated") for record in read(tmp_path / "o")] == [["eval.jsonl:1"], None]


def test_mistakes(tmp_path, evaluation):
    write(tmp_path / "in.jsonl", ["x"])
    with pytest.raises(UserError, match="no such file"):
        run_stage("decontaminate", input=["in"], output=tmp_path / "o", eval=["no.jsonl"])
    with pytest.raises(UserError, match="no text of 8 words"):
        run_stage(
            "decontaminate",
            input=[str(tmp_path / "in.jsonl")],
            output=tmp_path / "o",
            eval=[str(evaluation)],
            eval_fields=["answer"],
        )


@pytest.mark.real
def test_real_contexts_are_found_where_they_are(real_corpus, tmp_path):
    """LICENCES.md says that the contexts of JSQuAD's valid part stand in ja_wiki."""
    evaluation = real_corpus.parent / "eval" / "jsquad.jsonl"
    run_stage(
        "decontaminate",
        input=[str(real_corpus / "ja_wiki.jsonl.gz"), str(real_corpus / "ja_dialogue.jsonl.gz")],
        output=tmp_path / "o",
        eval=[str(evaluation)],
    )
    found = manifest(tmp_path / "o")
    dropped = found["rejected"]["in_jsquad.jsonl"]["documents"]
    assert 40 <= dropped < 70  # 55 articles, some of which no question asks about

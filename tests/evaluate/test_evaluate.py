"""Prompts, cuts, and the command on a little model."""

from __future__ import annotations

import json
import sys
from pathlib import Path

import pytest

from llmrecipes.cli import main
from llmrecipes.errors import UserError
from llmrecipes.evaluate.config import TaskConfig
from llmrecipes.evaluate.questions import prompt, read_task
from llmrecipes.evaluate.scoring import cut, figures, score_one

sys.path.insert(0, str(Path(__file__).parents[1] / "inference"))
REAL = Path(__file__).parents[3] / "shared" / "data" / "eval"


def write(path, records):
    path.write_text("".join(json.dumps(r, ensure_ascii=False) + "\n" for r in records), encoding="utf-8")
    return str(path)


def choices(question, label):
    return {"question": question, **{f"choice{i}": c for i, c in enumerate("あいうえお")}, "label": label}


def test_the_prompt_is_llm_jp_evals(tmp_path):
    train = write(tmp_path / "train.jsonl", [choices("例", 2)])
    file = write(tmp_path / "test.jsonl", [choices("問", 0)])
    task = TaskConfig(kind="jcommonsenseqa", file=file, few_shot_file=train, few_shots=1, instruction="選べ")
    asked = read_task(task)
    assert prompt(asked, asked.questions[0]) == (
        "以下は、タスクを説明する指示と、文脈のある入力の組み合わせです。要求を適切に満たす応答を書きなさい。\n\n"
        "### 指示:\n選べ\n\n"
        "### 入力:\n質問：例\n選択肢：0.あ,1.い,2.う,3.え,4.お\n\n### 応答:\n2\n\n"
        "### 入力:\n質問：問\n選択肢：0.あ,1.い,2.う,3.え,4.お\n\n### 応答:\n"
    )
    assert asked.max_new_tokens == 1
    same = TaskConfig(kind="jcommonsenseqa", file=train, few_shot_file=train, few_shots=1)
    with pytest.raises(UserError, match="no question left"):  # an example is not asked
        read_task(same)


def test_jnli_and_jsts(tmp_path):
    rows = [{"sentence1": "犬がいる", "sentence2": "猫がいる", "label": label} for label in ("neutral", 1)]
    task = TaskConfig(kind="jnli", file=write(tmp_path / "jnli.jsonl", rows))
    asked = read_task(task)
    assert [q.reference for q in asked.questions] == ["neutral", "contradiction"] and asked.max_new_tokens == 3
    assert asked.questions[0].text == "前提：犬がいる\n仮説：猫がいる" and task.group == "NLI"
    assert "- そのいずれでもない場合はneutralと出力\n\n### 入力:" in prompt(asked, asked.questions[0])
    bad = TaskConfig(kind="jnli", file=write(tmp_path / "bad.jsonl", [rows[0] | {"label": 3}]))
    with pytest.raises(UserError, match="the label is 3"):
        read_task(bad)
    samples = [{"input": str(i), "output": str(float(i))} for i in range(5)]
    text = json.dumps({"instruction": "類似度", "output_length": 3, "samples": samples})
    (tmp_path / "jsts.json").write_text(text, encoding="utf-8")
    task = TaskConfig(kind="llm_jp_eval", file=str(tmp_path / "jsts.json"), metric="pearson")
    rows = [
        score_one(task, q, str(i**2), None) | {"reference": q.reference}
        for i, q in enumerate(read_task(task).questions)
    ]
    found = figures(task, rows)
    assert list(found)[:2] == ["pearson", "spearman"] and found["spearman"].value == pytest.approx(1)
    assert found["pearson"].value == pytest.approx(0.9589, abs=1e-4)


def test_cut_and_form():
    assert cut(" ３\n\nその理由は", "blank_line") == "3" and cut("a\nb", "line") == "a"
    task = TaskConfig(kind="jcommonsenseqa", file="x")
    question = read_task_question()
    good, talk = (score_one(task, question, text, "[0-4]") for text in ("３", "答えは3です"))
    assert good["scores"] == {"exact_match": 1.0} and good["obeys"] is True
    assert talk["scores"] == {"exact_match": 0.0} and talk["obeys"] is False
    found = figures(task, [good, talk])
    assert found["exact_match"].value == found["format_obeyed"].value == 0.5 and found["exact_match"].n == 2


def read_task_question():
    from llmrecipes.evaluate.questions import Question

    return Question(1, "q", "3")


@pytest.mark.real
def test_the_real_files_are_read():
    if not REAL.is_dir():
        pytest.skip(f"{REAL} is not there")
    counts = {"jcommonsenseqa": 1119, "jsquad": 400, "jmmlu": 1060, "mgsm_ja": 125}
    for kind, count in counts.items():
        asked = read_task(TaskConfig(kind=kind, file=str(REAL / f"{kind}.jsonl")))
        assert len(asked.questions) == count
        for question in asked.questions:  # the reference itself is right and in the form asked for
            scored = score_one(TaskConfig(kind=kind, file=""), question, question.reference, asked.form)
            assert set(scored["scores"].values()) == {1.0} and scored["obeys"] is not False, question


def test_mistakes_are_all_named(tmp_path, capsys):
    recipe = tmp_path / "e.yaml"
    recipe.write_text("model: nowhere\ntasks:\n  - {kind: jsquad, file: none.jsonl, ask: cloze, few_shots: 4}\n")
    assert main(["evaluate", "--config", str(recipe)]) == 2
    error = capsys.readouterr().err
    for text in ("model: nowhere", "none.jsonl: no such file", "cloze is for questions", "no file to take examples"):
        assert text in error
    bad = write(tmp_path / "bad.jsonl", [{"question": "q"}])
    with pytest.raises(UserError, match=r"bad\.jsonl:1: .*no field 'answer'"):
        read_task(TaskConfig(kind="questions", file=bad))
    known = [{"question": f"{n}?", "answer": "1", "held_out": n == 1, "kind": "ab"[n % 2]} for n in range(3)]
    file = write(tmp_path / "known.jsonl", known)
    for held_out, ids in ((None, [1, 2, 3]), (True, [2]), (False, [1, 3])):
        task = TaskConfig(kind="questions", file=file, held_out=held_out)
        assert [question.id for question in read_task(task).questions] == ids and not list(task.problems())
    kept = read_task(TaskConfig(kind="questions", file=file, kinds=["b"])).questions
    assert [question.id for question in kept] == [2]
    with pytest.raises(UserError, match=r"no question of kinds \['c'\]; there are \['a', 'b'\]"):
        read_task(TaskConfig(kind="questions", file=file, kinds=["a", "c"]))
    assert "kinds: jsquad does not tell" in str(list(TaskConfig(kind="jsquad", file=file, kinds=["a"]).problems()))
    assert "held_out: jsquad does not tell" in str(list(TaskConfig(kind="jsquad", file=file, held_out=True).problems()))


def test_evaluate_goes_on_where_it_stopped(tmp_path, monkeypatch, capsys):
    from model_folders import make_hf_folder

    folder = make_hf_folder(tmp_path / "model")
    asked = [{"question": f"{i} + 1", "answer": str(i + 1), "cloze": f"{i} + 1 =", "lang": "en"} for i in range(6)]
    file = write(tmp_path / "questions.jsonl", asked)
    text = write(tmp_path / "text.jsonl", [{"text": "The river runs."}, {"text": "It is long and cold."}])
    recipe = tmp_path / "e.yaml"
    tasks = [
        {"name": "sums", "kind": "questions", "file": file, "ask": "cloze", "max_new_tokens": 3},
        {"kind": "perplexity", "file": text},
    ]
    settings = {"model": str(folder), "output": str(tmp_path / "out"), "batch_size": 2, "tasks": tasks}
    recipe.write_text(json.dumps(settings), encoding="utf-8")
    assert main(["evaluate", "--config", str(recipe)]) == 0
    out = capsys.readouterr().out
    assert "n=6" in out and "bits_per_byte" in out and "no average" in out
    answers = tmp_path / "out" / "sums" / "answers.jsonl"
    whole = answers.read_bytes()
    assert len(whole.splitlines()) == 6

    (tmp_path / "out" / "sums" / "result.json").unlink()
    answers.write_bytes(whole[: whole.index(b"\n") + 20])  # killed within the second line
    assert main(["evaluate", "--config", str(recipe)]) == 0
    assert sorted(answers.read_bytes().splitlines()) == sorted(whole.splitlines())
    assert "measured already" in capsys.readouterr().err  # the other task

    assert main(["evaluate", "--config", str(recipe), "--dtype", "bf16"]) == 2
    assert "made with another how" in capsys.readouterr().err

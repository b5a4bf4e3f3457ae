"""MT-Bench: marks out of judgements, and a judge behind an address that fails in every way, on this machine."""

from __future__ import annotations

import json
import sys
import threading
from collections import Counter
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer
from pathlib import Path

import pytest
import yaml
from helpers import cli

from llmrecipes.errors import UserError
from llmrecipes.evaluate.mt_bench.config import JudgeConfig, MTBenchConfig
from llmrecipes.evaluate.mt_bench.cost import about_tokens, estimate
from llmrecipes.evaluate.mt_bench.endpoint import Endpoint, Unanswered
from llmrecipes.evaluate.mt_bench.judge_prompts import NAMES, ask, judge_prompts
from llmrecipes.evaluate.mt_bench.questions import Conversation, read_conversations
from llmrecipes.evaluate.mt_bench.scores import (
    Mark,
    by_category,
    category_mean,
    figures,
    judgement_table,
    parse_mark,
    read_judgements,
)

sys.path.insert(0, str(Path(__file__).parents[1] / "inference"))
REAL = Path(__file__).parents[3] / "shared" / "data" / "eval"
KEY = "sk-secret-0123456789"


@pytest.mark.parametrize(
    ("text", "mark"),
    [
        ("Rating: [[8]]", 8),
        ("評価：[[8.5]]です", 8.5),
        ("first [[3]], no: [[9]]", 3),
        ("Rating: [7]", 7),
        ("[5] but really [[2]]", 2),
        ("no mark", -1),
        ("[[ten]]", -1),
        ("", -1),
    ],
)
def test_marks_are_read_as_fastchat_reads_them(text, mark):
    assert parse_mark(text) == mark


def test_the_table_is_the_mean_of_category_means():
    marks = [Mark("1", 1, "math", 2.0), Mark("1", 2, "math", 4.0), Mark("2", 1, "writing", 9.0)]
    marks.append(Mark("2", 2, "writing", -1.0))
    found = figures(marks)
    assert found["score"].value == (3.0 + 9.0) / 2 and found["score"].n == 3
    assert found["mean"].value == 5.0  # over turns: the other way to count, and another number
    assert found["turn_1"].value == 5.5 and found["turn_2"].value == 4.0
    assert (found["judged"].value, found["judged"].n) == (0.75, 4)
    assert {name: figure.value for name, figure in by_category(marks).items()} == {"math": 3.0, "writing": 9.0}
    assert category_mean([]).value is None
    wide = [Mark(str(i), turn, "a", float(1 + i % 10)) for i in range(100) for turn in (1, 2)]
    half = 1.96 * 2.872 / 100**0.5  # by questions: their two turns say the same, so 100 cases and not 200
    assert category_mean(wide).high - category_mean(wide).low == pytest.approx(2 * half, rel=0.1)


@pytest.mark.real
def test_recorded_judgements_of_gpt_4_give_the_right_table(capsys):
    if not REAL.is_dir():
        pytest.skip(f"{REAL} is not there")
    file = REAL / "ja_mt_bench_gpt4_judgments.jsonl"
    records = [json.loads(line) for line in file.read_text(encoding="utf-8").splitlines()]
    found = read_judgements(str(file))
    assert len(found) == len(records) == 282
    assert [one["score"] for one in found] == [record["score"] for record in records]
    conversations = read_conversations(
        str(REAL / "ja_mt_bench_questions.jsonl"), str(REAL / "ja_mt_bench_reference.jsonl")
    )
    assert len(conversations) == 40 and all(len(one.reference) == 2 for one in conversations)
    categories = {one.id: one.category for one in conversations}
    table = judgement_table(str(file), categories)
    assert len(table) == 7
    for model, (score, parts) in table.items():
        wanted: dict[str, list[float]] = {}
        for record in records:
            if record["model"] == model:
                wanted.setdefault(categories[record["question_id"]], []).append(record["score"])
        means = {name: sum(scores) / len(scores) for name, scores in wanted.items()}
        assert len(means) == 8 and {n: f.value for n, f in parts.items()} == pytest.approx(means)
        assert score.value == pytest.approx(sum(means.values()) / 8)
        assert score.low < score.value < score.high
    assert cli("evaluate", "--judgements", file, "--questions", REAL / "ja_mt_bench_questions.jsonl") == 0
    out = capsys.readouterr().out
    best = max(table, key=lambda model: table[model][0].value)
    assert out.count("  score ") == 7 and out.splitlines()[0] == best
    # Which judge prompt these were made with is which categories have a reference.
    with_reference = {categories[r["question_id"]] for r in records if r["judge"][1] == "single-math-v1"}
    assert with_reference == set(MTBenchConfig(judge=JudgeConfig()).with_reference)
    prompts = judge_prompts(str(REAL / "ja_mt_bench_judge_prompts.jsonl"), "ja")
    name, messages = ask(prompts, conversations[0], ["回答{answer}"], 1, True)
    assert name == "single-math-v1" and "回答{answer}" in messages[1]["content"]
    assert conversations[0].reference[0] in messages[1]["content"] and "{question}" not in messages[1]["content"]
    with pytest.raises(UserError, match="second turn"):
        ask(prompts, conversations[0], ["a", "b"], 2, False)


@pytest.mark.parametrize("language", ["en", "ja"])
def test_built_in_judge_prompts_show_everything(language):
    one = Conversation("1", 1, "math", ("Q1 {answer_2}", "Q2"), ("R1", "R2"))
    prompts = judge_prompts(None, language)
    assert tuple(prompts) == NAMES
    for turn, with_reference in ((1, False), (1, True), (2, False), (2, True)):
        name, (system, user) = ask(prompts, one, ["A1", "A2"], turn, with_reference)
        both = system["content"] + user["content"]
        assert "[[5]]" in both and name == NAMES[2 * (turn - 1) + with_reference]
        shown = ["Q1 {answer_2}", "A1", *(["Q2", "A2"] * (turn == 2)), *(["R1"] * with_reference)]
        assert all(text in user["content"] for text in shown), (name, user)
        assert ("R2" in user["content"]) == (with_reference and turn == 2)


# ---- the endpoint


class Judge(ThreadingHTTPServer):
    """Answers with what it was told to, then with a mark that depends on the question."""

    daemon_threads = True

    def __init__(self):
        super().__init__(("127.0.0.1", 0), Handler)
        self.script, self.seen, self.lock = [], [], threading.Lock()
        self.broken = False
        threading.Thread(target=self.serve_forever, daemon=True).start()
        self.url = f"http://127.0.0.1:{self.server_address[1]}/v1"


class Handler(BaseHTTPRequestHandler):
    def do_POST(self):
        body = json.loads(self.rfile.read(int(self.headers["Content-Length"])))
        judge = self.server
        with judge.lock:
            judge.seen.append((self.path, self.headers.get("Authorization"), body))
            status = judge.script.pop(0) if judge.script else 503 if judge.broken else 200
        if status == "hang up":
            self.connection.close()
            return
        if status == "silence":
            threading.Event().wait(1.0)
            return
        good = {"choices": [{"message": {"content": f"Fine. Rating: [[{len(judge.seen) % 5 + 3}]]"}}]}
        good["usage"] = {"prompt_tokens": 100, "completion_tokens": 5}
        text = {200: json.dumps(good), "nonsense": "<html>", "empty": json.dumps({"choices": []})}.get(
            status, f"no, {self.headers.get('Authorization')} is not welcome"
        )
        self.send_response(status if isinstance(status, int) else 200)
        if status == 429:
            self.send_header("Retry-After", "7")
        if status == 307:
            self.send_header("Location", "http://127.0.0.1:1/elsewhere")
        self.end_headers()
        self.wfile.write(text.encode())

    def log_message(self, *_):
        pass


@pytest.fixture
def judge(monkeypatch):
    monkeypatch.setenv("JUDGE_KEY", KEY)
    server = Judge()
    yield server
    server.shutdown()
    server.server_close()


def endpoint(judge, waits, **more):
    config = JudgeConfig(url=judge.url, model="gpt-test", key_env="JUDGE_KEY", **({"timeout": 0.3} | more))
    return Endpoint(config, waits.append)


def test_failures_are_tried_again_and_longer_each_time(judge):
    judge.script = [429, 500, "hang up", "silence", "nonsense"]
    waits = []
    text, usage = endpoint(judge, waits).judge([{"role": "user", "content": "x"}])
    assert "[[" in text and usage == {"prompt": 100, "completion": 5}
    assert len(waits) == 5 and waits[0] == 7.0  # what the server asked for
    assert waits[1] < waits[4] <= 32
    path, authorization, body = judge.seen[-1]
    assert path == "/v1/chat/completions" and authorization == f"Bearer {KEY}" and body["model"] == "gpt-test"
    judge.script = ["empty"] * 3
    with pytest.raises(Unanswered, match="3 tries"):
        endpoint(judge, [], retries=2).judge([])


@pytest.mark.parametrize("status", [400, 401, 404, 307])
def test_a_refusal_is_final_and_shows_no_key(judge, status):
    judge.script = [status]
    waits = []
    with pytest.raises(UserError) as caught:
        endpoint(judge, waits).judge([])
    assert waits == [] and len(judge.seen) == 1
    assert str(status) in str(caught.value) and KEY not in str(caught.value) and "***" in str(caught.value)


def test_the_cost_is_estimated(capsys):
    assert about_tokens("a" * 400) == 100 and about_tokens("日本") == pytest.approx(2.2)
    config = JudgeConfig(url="http://x", model="m", price_in=10.0, price_out=30.0)
    found = estimate(config, [[{"role": "user", "content": "a" * 4000}]] * 10)
    assert (found.calls, found.tokens_in, found.tokens_out) == (10, 10_040, 2500)
    assert found.cost == pytest.approx(0.1004 + 0.075) and "0.18" in found.sentence()
    assert estimate(JudgeConfig(url="http://x", model="m"), []).cost is None


# ---- the whole


@pytest.fixture(scope="module")
def model(tmp_path_factory):
    from model_folders import make_hf_folder

    return make_hf_folder(tmp_path_factory.mktemp("mt_bench") / "model", max_position_embeddings=256)


QUESTIONS = [
    {"question_id": f"q{i}", "category": c, "turns": [f"Question {i}?", "And then?"][: 1 if c == "stem" else 2]}
    | ({"reference": ["five", "six"]} if c == "math" else {})
    for i, c in enumerate(["math", "writing", "stem", "math", "writing", "coding"])
]


def recipe(folder, model, judge, **more):
    questions = folder / "questions.jsonl"
    questions.write_text("".join(json.dumps(q) + "\n" for q in QUESTIONS))
    given = {"judge": judge, "with_reference": ["math"]} | more
    task = {"kind": "mt_bench", "file": str(questions), "max_new_tokens": 6, "mt_bench": given}
    settings = {"model": str(model), "output": str(folder / "out"), "batch_size": 4, "tasks": [task]}
    (folder / "e.yaml").write_text(yaml.safe_dump(settings))
    return folder / "e.yaml"


def test_a_model_is_judged_and_goes_on_after_a_failure(tmp_path, model, judge, capsys, caplog):
    address = {"kind": "endpoint", "url": judge.url, "model": "m", "key_env": "JUDGE_KEY", "workers": 1, "retries": 0}
    address |= {"price_in": 2.0, "price_out": 8.0}
    path = recipe(tmp_path, model, address)
    judge.script, judge.broken = [200] * 4, True
    capsys.readouterr()
    assert cli("evaluate", "--config", path) == 2
    out = capsys.readouterr()
    assert "11 judgements to ask for" in out.out and "at the prices of the recipe" in out.out
    assert "repeat the command to go on" in out.err and "HTTP 503" in out.err
    folder = tmp_path / "out" / "mt_bench"
    written = (folder / "written.jsonl").read_bytes()
    assert len(written.splitlines()) == 6 and len((folder / "answers.jsonl").read_bytes().splitlines()) == 4

    judge.broken = False
    asked = len(judge.seen)
    assert cli("evaluate", "--config", path) == 0
    out = capsys.readouterr()
    assert "7 judgements to ask for" in out.out and "score" in out.out and "n=11" in out.out
    assert len(judge.seen) - asked == 7 and (folder / "written.jsonl").read_bytes() == written
    result = json.loads((folder / "result.json").read_text())
    assert set(result["breakdowns"]["category"]) == {"math", "writing", "stem", "coding"} and result["n"] == 11
    second = [body for _, _, body in judge.seen if "Question 0?" in str(body) and "And then?" in str(body)]
    assert second and all("five" in str(body) and "six" in str(body) for body in second)
    everything = b"".join(p.read_bytes() for p in tmp_path.rglob("*") if p.is_file())
    assert KEY.encode() not in everything and KEY not in out.out + out.err + caplog.text
    # Temperature 0.7 for writing alone; the same seed writes the same.
    rows = [json.loads(line) for line in written.splitlines()]
    assert Counter(len(row["answers"]) for row in rows) == {2: 5, 1: 1}


def test_too_dear_is_not_begun(tmp_path, model, judge, capsys):
    address = {"kind": "endpoint", "url": judge.url, "model": "m", "key_env": "JUDGE_KEY"}
    address |= {"price_in": 2.0, "price_out": 8.0, "max_cost": 0.001}
    assert cli("evaluate", "--config", recipe(tmp_path, model, address)) == 2
    assert "nothing was asked" in capsys.readouterr().err and judge.seen == []


def test_recorded_and_local_judges(tmp_path, model, capsys):
    lines = [
        {"question_id": q["question_id"], "turn": t, "model": "mine", "judgment": f"[[{3 + t}]]"}
        for q in QUESTIONS
        for t in range(1, len(q["turns"]) + 1)
    ]
    lines[0]["judgment"] = "I cannot say"
    (tmp_path / "marks.jsonl").write_text("".join(json.dumps(line) + "\n" for line in lines))
    path = recipe(tmp_path, model, {"kind": "recorded", "file": str(tmp_path / "marks.jsonl")})
    assert cli("evaluate", "--config", path) == 0
    out = capsys.readouterr().out
    assert "1 of 11 judgements held no mark" in out
    result = json.loads((tmp_path / "out" / "mt_bench" / "result.json").read_text())
    assert result["figures"]["turn_2"]["value"] == 5.0 and result["figures"]["judged"]["n"] == 11

    local = tmp_path / "local"
    local.mkdir()
    path = recipe(local, model, {"kind": "model", "model": str(model), "max_tokens": 4})
    assert cli("evaluate", "--config", path) == 0
    assert "11 of 11 judgements held no mark" in capsys.readouterr().out  # random weights say nothing
    result = json.loads((local / "out" / "mt_bench" / "result.json").read_text())
    assert result["figures"]["score"]["value"] is None  # not measured is not 0


def test_mistakes_are_named(tmp_path, model, monkeypatch, capsys):
    monkeypatch.delenv("NO_KEY", raising=False)
    wrong = {"kind": "endpoint", "url": "http://me:pw@host/v1", "key_env": "NO_KEY", "max_cost": 1.0}
    assert cli("evaluate", "--config", recipe(tmp_path, model, wrong, references="none.jsonl")) == 2
    error = capsys.readouterr().err
    for text in ("holds a name or password", "model is missing", "no NO_KEY", "without prices", "none.jsonl: no such"):
        assert text in error, text

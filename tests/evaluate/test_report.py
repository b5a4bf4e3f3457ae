"""The page is whole, and nothing that a model wrote is more than text in it."""

from __future__ import annotations

import json
import re
from html.parser import HTMLParser

import pytest
import yaml

from llmrecipes.cli import main
from llmrecipes.convert.writing import write_origin
from llmrecipes.evaluate.report.gather import lineage, read_runs

HOSTILE = "</script><script>alert(1)</script><img src=x onerror=alert(2)>\u2028&amp;\"'"


class Tags(HTMLParser):
    def __init__(self):
        super().__init__()
        self.found, self.data, self._inside = [], {}, None

    def handle_starttag(self, tag, attrs):
        self.found.append((tag, dict(attrs)))
        self._inside = dict(attrs).get("id") if tag == "script" else None

    def handle_data(self, data):
        if self._inside:
            self.data[self._inside] = self.data.get(self._inside, "") + data


def make_run(folder, name, init_from=None, experts=True):
    run = folder / "runs" / name
    (run / "checkpoints" / "step=000002").mkdir(parents=True)
    model = {"class_path": "llmrecipes.modules.PretrainModule", "init_args": {"init_from": init_from}}
    recipe = {"name": name, "seed": 1, "model": model, "data": {"init_args": {"train": {"a/<b>": 1.0, "c": 3.0}}}}
    (run / "recipe.yaml").write_text(yaml.safe_dump(recipe), encoding="utf-8")
    load = {"expert_load": [[0.25, 0.75], [0.5, 0.5]]} if experts else {}
    lines = [
        {"step": i, "tokens": 10 * i, "loss": 3 / i, "grad_norm": 1.0, "lr": 0.1, "tokens_per_second": 5.0, **load}
        for i in (1, 2)
    ]
    lines.append({"step": 2, "val_loss": 1.5, "val_loss/a": 1.5})
    (run / "metrics.jsonl").write_text("".join(json.dumps(line) + "\n" for line in lines), encoding="utf-8")
    return run


def make_evaluation(run, count):
    place = run / "evaluation" / "demo"
    (place / "asked").mkdir(parents=True)
    figure = {"value": 0.5, "n": count, "low": 0.4, "high": 0.6, "interval": "wilson"}
    task = {"task": "asked", "ask": "chat", "metric": "contains", "figures": {"contains": figure}}
    task |= {"breakdowns": {"lang": {"ja": figure}}, "notes": [HOSTILE]}
    average = {"sentence": "no average"}
    (place / "summary.json").write_text(json.dumps({"weights": "w", "average": average, "tasks": [task]}))
    row = {"question": HOSTILE, "reference": "r", "answer": HOSTILE, "scores": {"contains": 1.0}, "obeys": None}
    rows = [{**row, "id": i, "about": {"lang": HOSTILE}} for i in range(count)]
    (place / "asked" / "answers.jsonl").write_text("".join(json.dumps(r) + "\n" for r in rows))


def test_report_and_diff(tmp_path, monkeypatch, capsys):
    monkeypatch.chdir(tmp_path)
    first = make_run(tmp_path, "base")
    second = make_run(tmp_path, "tuned", "runs/base", experts=False)
    make_evaluation(second, 3000)
    assert main(["report", str(first), str(second), "--output", "out", "--title", HOSTILE]) == 0
    names = {"loss", "lr", "grad_norm", "tokens_per_second", "expert_load_0", "data_mix"}
    assert {p.stem for p in (tmp_path / "out").glob("*.png")} == names
    text = (tmp_path / "out" / "report.html").read_text(encoding="utf-8")
    tags = Tags()
    tags.feed(text)
    assert [tag for tag, _ in tags.found].count("script") == 2
    assert len([a for tag, a in tags.found if tag == "img"]) == len(names)
    for _, attributes in tags.found:  # nothing is fetched, nothing runs but the page's own script
        assert not any(key.startswith("on") for key in attributes)
        address = attributes.get("src") or attributes.get("href") or "#"
        assert address.startswith(("data:", "#")), address
    policy = next(a["content"] for tag, a in tags.found if a.get("http-equiv"))
    assert policy.startswith("default-src 'none'") and re.search(r"script-src 'sha256-[\w+/=]{44}'", policy)
    answers = json.loads(tags.data["answers"])
    assert len(answers["rows"]) == 3000 and answers["rows"][7]["x"] == HOSTILE
    assert "<img src=x" not in text and "innerHTML" not in text
    assert len(text) < 3_000_000

    assert [one.name for one in lineage(read_runs([second])[0])] == ["base", "tuned"]
    capsys.readouterr()
    assert main(["diff", str(first), str(second)]) == 0
    shown = capsys.readouterr().out
    assert "name: base -> tuned" in shown and "model.init_args.init_from: " in shown and "seed" not in shown


def test_lineage_goes_through_a_merge(tmp_path):
    make_run(tmp_path, "seed")
    make_run(tmp_path, "wiki", "runs/seed")
    merged = tmp_path / "models" / "experts"
    merged.mkdir(parents=True)
    (merged / "model.yaml").write_text("model: {init_args: {init_from: models/experts}}\n")
    write_origin(merged, "merge lora", "runs/seed", ["runs/wiki", "runs/gone"])
    last = make_run(tmp_path, "router", "models/experts")
    chain = lineage(read_runs([last])[0])
    assert [one.name for one in chain] == ["seed", "experts", "router"]
    facts = chain[1].facts
    assert ("made by", "llmrecipes merge lora") in facts
    assert [value for key, value in facts if key == "of"] == ["runs/wiki (2 steps, 20 tokens)", "runs/gone"]


def test_what_is_no_run_is_refused(tmp_path, capsys):
    assert main(["report", str(tmp_path), str(tmp_path / "none")]) == 2
    error = capsys.readouterr().err
    assert "neither a run folder" in error and "no such folder" in error
    assert main(["diff", str(tmp_path), str(tmp_path)]) == 2


@pytest.mark.parametrize("folder", ["."])
def test_a_broken_recipe_is_named(tmp_path, capsys, folder):
    (tmp_path / "recipe.yaml").write_text("a: [", encoding="utf-8")
    assert main(["report", str(tmp_path)]) == 2
    assert "recipe.yaml:" in capsys.readouterr().err

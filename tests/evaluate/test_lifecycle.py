"""What each stage changed: the tables hold the figures of the runs' own files, and compare only what is comparable."""

from __future__ import annotations

import json

import pytest
import yaml
from helpers import cli

from llmrecipes.evaluate.report.gather import read_runs
from llmrecipes.evaluate.report.lifecycle import lifecycle

SHARDS = ["data/towns", "data/sums"]


def make_run(folder, name, stage, validations, train=None, **data):
    """A run folder with a recipe and validations: ``{step: {figure: value}}``."""
    run = folder / name
    run.mkdir()
    kind = "PackedShards" if train else "ChatExamples"
    init = {"train": dict.fromkeys(train or ["chat.jsonl"], 1.0), "split": "96,2,2", "seq_len": 8} | data
    recipe = {
        "name": name,
        "model": {"class_path": f"llmrecipes.modules.{stage}", "init_args": {}},
        "data": {"class_path": f"llmrecipes.data.{kind}", "init_args": init},
    }
    (run / "recipe.yaml").write_text(yaml.safe_dump(recipe), encoding="utf-8")
    lines = [{"step": step, **figures} for step, figures in validations.items()]
    (run / "metrics.jsonl").write_text("".join(json.dumps(line) + "\n" for line in lines), encoding="utf-8")
    return run


def losses(towns, sums):
    return {"val_loss": (towns + sums) / 2, "val_loss/towns": towns, "val_loss/sums": sums}


@pytest.fixture
def runs(tmp_path):
    all_of_it = {"valid_from": SHARDS}
    return [
        make_run(tmp_path, "seed", "PretrainModule", {4: losses(2, 2)}, SHARDS),
        make_run(tmp_path, "towns", "LoraExpertModule", {0: losses(2, 2), 9: losses(1, 3)}, SHARDS[:1], **all_of_it),
        make_run(tmp_path, "sums", "LoraExpertModule", {0: losses(2, 2), 9: losses(3, 1.5)}, SHARDS[1:], **all_of_it),
        make_run(tmp_path, "router", "RouterModule", {0: losses(1.75, 2), 5: losses(1.25, 1.5)}, SHARDS),
        make_run(tmp_path, "sft", "SFTModule", {0: {"val_loss": 4.0}, 3: {"val_loss": 2.0}, 6: {"val_loss": 0.5}}),
        make_run(
            tmp_path,
            "dpo",
            "PreferenceModule",
            {0: {"val_loss": 0.6931, "val_logps/preferred": 0.5, "val_rewards/margins": 0.0},
             6: {"val_loss": 0.2, "val_logps/preferred": 0.75, "val_rewards/margins": 1.5}},
        ),
    ]  # fmt: skip


def evaluated(run, value, low, high):
    place = run / "evaluation" / "asked"
    place.mkdir(parents=True)
    figure = {"value": value, "n": 40, "low": low, "high": high, "interval": "wilson"}
    task = {"task": "asked", "ask": "chat", "metric": "exact_match", "figures": {"exact_match": figure}, "notes": []}
    task["breakdowns"] = {"lang": {"ja": figure}}
    summary = {"weights": "w", "average": {"sentence": "none"}, "tasks": [task]}
    (place / "summary.json").write_text(json.dumps(summary), encoding="utf-8")
    (place / "asked").mkdir()
    answers = [json.dumps({"finish": finish}) + "\n" for finish in ("eos", "eos", "eos", "length")]
    (place / "asked" / "answers.jsonl").write_text("".join(answers), encoding="utf-8")


def rows(table):
    return {str(row[0]): [str(cell) for cell in row[1:]] for row in table.rows}


def test_every_stage_before_and_after(runs):
    evaluated(runs[3], 0.1, 0.05, 0.2)
    evaluated(runs[4], 0.6, 0.45, 0.75)
    domains, stages, answers = lifecycle(read_runs(runs))
    assert domains.columns == ["model", "towns", "sums", "all"]
    assert rows(domains) == {
        "seed": ["2.0000", "2.0000", "2.0000"],
        "towns": ["1.0000*", "3.0000", "2.0000"],
        "sums": ["3.0000", "1.5000*", "2.2500"],
        "router, random routers": ["1.7500", "2.0000", "1.8750"],
        "router, trained": ["1.2500", "1.5000", "1.3750"],
    }
    best = {str(row[0]): [cell.best for cell in row[1:]] for row in domains.rows}
    assert best["towns"] == [True, False, True] and best["sums"] == [False, True, False]
    assert not any(best["router, trained"]), "best of the experts"
    assert "2 of 2 experts are the best" in domains.note
    assert [[str(cell) for cell in row][::2] for row in stages.rows] == [
        ["router", "1.8750"], ["sft", "4.0000"], ["dpo", "0.6931"], ["dpo", "0.5000"], ["dpo", "0.0000"]
    ]  # fmt: skip
    assert [str(row[3]) for row in stages.rows] == ["1.3750", "0.5000", "0.2000", "0.7500", "1.5000"]
    assert rows(answers) == {
        "router": [*["0.100 (0.050-0.200)"] * 2, "0.750"],
        "sft": [*["0.600 (0.450-0.750)"] * 2, "0.750"],
    }
    assert "40 asked" in answers.heading


def test_an_expert_that_is_not_the_best_at_home_is_not_praised(runs, tmp_path):
    better = make_run(tmp_path, "better", "LoraExpertModule", {9: losses(0.5, 9)}, SHARDS[1:], valid_from=SHARDS)
    table = lifecycle(read_runs([*runs, better]))[0]
    assert "1 of 3 experts are the best" in table.note


def test_other_validation_sets_are_not_compared(runs, tmp_path):
    """The mutant of one table for everything: other windows, or other documents, are other figures."""
    other = make_run(tmp_path, "long", "PretrainModule", {4: losses(0.1, 0.1)}, SHARDS, seq_len=16)
    assert "long" not in rows(lifecycle(read_runs([*runs, other]))[0])
    alone = lifecycle(read_runs(runs[1:]))[0]
    assert rows(alone)["seed"] == ["2.0000", "2.0000", "2.0000"], "what the experts began with"
    assert lifecycle(read_runs([other])) == []


def test_validation_sets_of_their_own_are_compared_too(tmp_path):
    """Whole shards of `valid`, whatever is trained on; other shards under the same names are other figures."""
    valid = {"valid": {name: f"data/held_out/{name}" for name in ("towns", "sums")}, "split": "1,0,0"}
    found = [
        make_run(tmp_path, "seed", "PretrainModule", {4: losses(2, 2)}, SHARDS, **valid),
        make_run(tmp_path, "towns", "LoraExpertModule", {0: losses(2, 2), 9: losses(1, 3)}, SHARDS[:1], **valid),
    ]
    assert rows(lifecycle(read_runs(found))[0]) == {
        "seed": ["2.0000", "2.0000", "2.0000"],
        "towns": ["1.0000*", "3.0000", "2.0000"],
    }
    other = valid | {"valid": {name: f"data/others/{name}" for name in ("towns", "sums")}}
    other_run = make_run(tmp_path, "other", "PretrainModule", {4: losses(0.1, 0.1)}, SHARDS, **other)
    assert "other" not in rows(lifecycle(read_runs([*found, other_run]))[0])


def test_the_console_and_the_page_show_the_same(runs, tmp_path, capsys):
    assert cli("report", *runs, "--output", tmp_path / "out") == 0
    shown = capsys.readouterr().out
    page = (tmp_path / "out" / "report.html").read_text(encoding="utf-8")
    tables = lifecycle(read_runs(runs))
    assert len(tables) == 2
    for table in tables:
        assert str(table) in shown and f"<h3>{table.heading}</h3>" in page
        assert all(f"{cell}<" in page for row in table.rows for cell in row)

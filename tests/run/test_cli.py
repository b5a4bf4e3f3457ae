"""The command as people meet it: exit codes, messages, overrides, resuming, refusing."""

from __future__ import annotations

import json
import random
import re
import shutil
import subprocess
import sys
import time

import pytest
import yaml
from helpers import cli, trajectory, write_recipe

from llmrecipes.cli import COMMANDS, TRAINER_COMMANDS
from llmrecipes.run.folder import lock


def error_lines(capsys, code, expected=2):
    """What went to stderr, without a traceback, by a command that was refused."""
    captured = capsys.readouterr()
    assert code == expected, captured
    assert "Traceback" not in captured.err + captured.out
    return captured.err.splitlines()


def losses(folder):
    return {r["step"]: r["loss"] for r in trajectory(folder) if "loss" in r}


# ---- help, unknown words


def test_help_is_quick_and_lists_the_commands():
    seconds = []
    for _ in range(3):  # the machine may be busy
        start = time.monotonic()
        done = subprocess.run([sys.executable, "-m", "llmrecipes", "--help"], capture_output=True, text=True)
        seconds.append(time.monotonic() - start)
        if seconds[-1] < 1:
            break
    assert min(seconds) < 1
    assert (done.returncode, done.stderr) == (0, "")
    names = [*TRAINER_COMMANDS, *COMMANDS]
    assert len(names) >= 4
    for name in names:
        assert re.search(rf"^  {name} +\S", done.stdout, re.MULTILINE), name


def test_help_and_version_in_process(capsys):
    for words in ([], ["-h"], ["help"]):
        assert cli(*words) == 0
        assert capsys.readouterr().out.startswith("usage: llmrecipes")
    assert cli("--version") == 0
    assert re.fullmatch(r"llmrecipes \d+\.\d+\.\d+\S*\n", capsys.readouterr().out)


@pytest.mark.parametrize(("word", "guess"), [("fti", "fit"), ("chekc", "check"), ("validat", "validate")])
def test_unknown_command_suggests(capsys, word, guess):
    lines = error_lines(capsys, cli(word))
    assert lines == [f"error: unknown command '{word}' - did you mean '{guess}'? (llmrecipes --help lists them)"]


def test_hopeless_command_suggests_nothing(capsys):
    assert error_lines(capsys, cli("zzzzzz")) == ["error: unknown command 'zzzzzz' (llmrecipes --help lists them)"]


def test_check_exit_codes(capsys, path, tmp_path):
    assert cli("check", path) == 0
    assert capsys.readouterr().err == "checked 1 recipe: 0 problems\n"
    assert cli("check", path, "--trainer.max_step", "3") == 2
    assert "did you mean 'max_steps'?" in capsys.readouterr().err
    assert list(tmp_path.iterdir()) == [path]


# ---- what is refused before anything starts


def test_four_planted_mistakes_are_four_lines_and_nothing_starts(tmp_path, recipe, capsys, monkeypatch):
    monkeypatch.chdir(tmp_path)
    config = recipe(moe=True)
    config["model"]["init_args"]["config"]["moe"]["top_k"] = "two"
    text = yaml.safe_dump(config)
    for old, new in (("model:\n", "modle:\n"), ("max_steps:", "max_step:"), ("seq_len:", "seq_lenn:")):
        assert text.count(f" {old}") + text.count(f"\n{old}") == 1
        text = text.replace(old, new)
    (tmp_path / "planted.yaml").write_text(text)
    lines = error_lines(capsys, cli("fit", "--config", "planted.yaml", "--run_root", "runs"))
    assert len(lines) == 4, lines
    for word in ("modle", "max_step'", "seq_lenn", "two"):
        (line,) = [line for line in lines if word in line]
        number = int(re.match(r"planted\.yaml:(\d+): ", line)[1])
        assert word.strip("'") in text.splitlines()[number - 1]
    assert sum("did you mean" in line for line in lines) == 3
    assert [p.name for p in tmp_path.iterdir()] == ["planted.yaml"]


@pytest.mark.parametrize(
    ("words", "message"),
    [
        (["--trainer.max_step", "3"], "did you mean 'max_steps'?"),
        (["--trainer.max_steps", "many"], "expected an integer"),
        (["--trainer.max_steps"], "the value is missing"),
        (["--nmae", "x"], "did you mean 'name'?"),
        (["--resume", "sometimes"], "resume"),
        (["--cool_down", "4"], "4"),
        (["--cool_down", "4 iterations"], "4 iterations"),
        (["--model.init_args.optimizer.lr", "-1"], "not positive"),
        (["--model", "llmrecipes.modules.PretrainModul"], "PretrainModul"),
        (["--model.config.dim", "33"], "33"),
        (["stray"], "stray"),
        (["--config", "absent.yaml"], "absent.yaml"),
    ],
)
def test_wrong_words_after_fit(fit, tmp_path, path, capsys, words, message):
    lines = error_lines(capsys, fit(*words))
    assert any(message in line for line in lines), lines
    assert len(lines) <= 3
    assert list(tmp_path.iterdir()) == [path]


@pytest.mark.parametrize(
    ("words", "message"),
    [
        (["--trainer.accelerator", "cuda"], "cuda"),  # as on every laptop
        (["--trainer.accelerator", "abacus"], "abacus"),
        (["--trainer.strategy", "bold"], "bold"),
        (["--trainer.max_time", "tomorrow"], "tomorrow"),
        (["--trainer.num_nodes", "0"], "num_nodes"),
        (["--trainer.profiler", "x"], "profiler"),
        (["--trainer.devices", "2"], "2 processes"),
    ],
)
def test_what_only_the_trainer_can_refuse(fit, tmp_path, path, capsys, words, message, monkeypatch):
    monkeypatch.setattr("torch.cuda.is_available", lambda: False)
    (line,) = error_lines(capsys, fit(*words))
    assert message in line.lower(), line
    assert list(tmp_path.iterdir()) == [path]


def test_no_recipe_and_recipe_without_config(capsys, path):
    assert error_lines(capsys, cli("fit")) == ["error: no recipe: write --config RECIPE.yaml"]
    assert f"write --config {path}" in error_lines(capsys, cli("fit", "--config", path, path))[0]
    assert error_lines(capsys, cli("fit", "--config"))


def test_fuzz_wrong_words_never_give_a_traceback(tmp_path, path, capsys):
    """Whatever is typed: exit code 2 and a message, or help; never a traceback, never a run."""
    generator = random.Random(5)
    good = ["--config", str(path)]
    pool = [
        *("fit", "check", "data", "validate", "--config", "--config=", "-", "--", "=", "--=3", "--a.b.c", "--trainer"),
        *("--trainer.max_steps", "--trainer.max_steps=x", "--model=3", "--model.init_args", "--data", "[", "{", "}: :"),
        *("--model.init_args.config.dim=[1", "--seed", "--seed=1.5", "--name", "\0", "あ", "--あ=い", "--data.train=3"),
        *("--resume=maybe", "--cool_down=x", "--logging.every=0", "--samples+=1", "--trainer.callbacks+=3", "--no"),
        *(
            "--model.class_path=os.system",
            "--trainer.logger=builtins.eval",
            "/",
            str(tmp_path),
            "*",
            "--config=/dev/null",
        ),
    ]
    seen = 0
    for _ in range(60):
        words = [generator.choice(pool) for _ in range(generator.randint(1, 5))]
        command = generator.choice(["fit", "fit", "validate", "check"])
        words = [command, *(good if generator.random() < 0.6 else []), *words, "--definitely.wrong=1"]
        code = cli(*words)
        captured = capsys.readouterr()
        assert code == 2, (words, captured)
        assert captured.err.strip(), words
        assert "Traceback" not in captured.err, words
        seen += 1
    assert seen == 60
    assert list(tmp_path.iterdir()) == [path]


# ---- one recipe of several parts


def printed_config(capsys, *words):
    with pytest.raises(SystemExit) as stop:
        cli("fit", *words, "--print_config")
    assert stop.value.code in (0, None)
    return capsys.readouterr().out


def test_files_merge_and_the_command_line_wins(tmp_path, path, capsys):
    overlay = {"seed": 8, "trainer": {"max_steps": 5}, "model": {"init_args": {"config": {"dim": 64}}}}
    more = write_recipe(tmp_path, overlay, "more.yaml")
    printed = yaml.safe_load(
        printed_config(
            capsys, "--config", path, "--config", more, "--trainer.max_steps", 2, "--checkpoint.every", "1 steps"
        )
    )
    assert printed["seed"] == 8  # of the overlay
    assert printed["name"] == "dense"  # of the first file
    assert printed["trainer"]["max_steps"] == 2  # of the command line
    assert printed["trainer"]["val_check_interval"] == 4
    config = printed["model"]["init_args"]["config"]
    assert (config["dim"], config["num_layers"]) == (64, 2)
    assert printed["checkpoint"] | {"every": "1 steps", "keep_last": 2} == printed["checkpoint"]


def test_printed_config_is_a_recipe(tmp_path, fit, path, finished, capsys):
    text = printed_config(capsys, "--config", path)
    assert text.startswith(("#", "name:"))
    printed = tmp_path / "printed.yaml"
    printed.write_text(text)
    assert cli("check", printed) == 0
    assert fit(config=printed) == 0
    assert trajectory(tmp_path / "dense") == trajectory(finished)


def test_the_resolved_recipe_reruns_the_run(tmp_path, fit, finished):
    resolved = yaml.safe_load((finished / "recipe.yaml").read_text())
    assert resolved["checkpoint"]["keep_best"] is True  # defaults are written out
    assert fit(config=finished / "recipe.yaml") == 0
    assert trajectory(tmp_path / "dense") == trajectory(finished)


def test_a_recipe_without_a_name_is_named_after_its_file(tmp_path, path, capsys):
    config = yaml.safe_load(path.read_text())
    del config["name"]
    nameless = write_recipe(tmp_path, config, "my_run.yaml")
    words = ["--run_root", tmp_path / "runs", "--trainer.max_steps", 3]
    assert cli("fit", "--config", nameless, *words) == 0
    resolved = tmp_path / "runs" / "my_run" / "recipe.yaml"
    assert yaml.safe_load(resolved.read_text())["name"] == "my_run"
    capsys.readouterr()
    assert cli("fit", "--config", resolved, *words) == 0
    assert "nothing to do: 3 of 3 steps are done" in capsys.readouterr().out


def test_seed_changes_the_weights_and_belongs_to_the_recipe(tmp_path, fit, path, finished, capsys):
    assert fit("--trainer.max_steps", 3, "--seed", 8) == 0
    assert losses(tmp_path / "dense")[1] != losses(finished)[1]
    capsys.readouterr()
    printed = yaml.safe_load(printed_config(capsys, "--config", path, "--seed", 8))
    assert printed["seed"] == 8
    assert "seed" not in printed["model"]["init_args"]  # linked, never written twice


def test_a_seed_in_the_module_would_be_ignored_and_is_refused(fit, path, capsys):
    """The recipe's seed is linked to it: a key with no effect is an error."""
    config = yaml.safe_load(path.read_text())
    config["model"]["init_args"]["seed"] = 99
    path.write_text(yaml.safe_dump(config))
    (line,) = error_lines(capsys, fit())
    assert re.search(r"recipe\.yaml:\d+: model\.init_args\.seed has no effect: .* - write seed at the top level$", line)


# ---- validate, run folder


def test_validate_repeats_the_last_validation(fit, over, tmp_path, path, capsys):
    assert cli("validate", "--config", path, "--run_root", tmp_path) == 0
    out = capsys.readouterr().out
    assert f"validating {over}/checkpoints/step=000012 (12 steps)" in out
    last = trajectory(over)[-1]
    assert f"val_loss {last['val_loss']:.4f}" in out
    assert f"a {last['val_loss/a']:.4f}  b {last['val_loss/b']:.4f}" in out
    assert trajectory(over)[-1] == last  # nothing is written


def test_validate_without_a_run(tmp_path, path, capsys):
    lines = error_lines(capsys, cli("validate", "--config", path, "--run_root", tmp_path / "runs"))
    assert len(lines) == 1
    assert "no whole checkpoint" in lines[0]
    assert not (tmp_path / "runs").exists()


def test_run_folder_holds_what_it_should_and_no_secrets(finished, tmp_path, recipe, monkeypatch):
    names = {p.name for p in finished.iterdir()}
    assert {"recipe.yaml", "environment.json", "metrics.jsonl", "log.txt", "checkpoints", "DONE"} <= names
    assert json.loads((finished / "DONE").read_text()) == {"step": 12}
    monkeypatch.setenv("WANDB_API_KEY", "s3cr3t-of-the-test")
    monkeypatch.setenv("HF_TOKEN", "hf_s3cr3t-of-the-test")
    path = write_recipe(tmp_path, recipe(steps=3))
    assert cli("fit", "--config", path, "--run_root", tmp_path) == 0
    files = [p for p in (tmp_path / "dense").rglob("*") if p.is_file()]
    assert len(files) > 8
    for file in files:
        assert b"s3cr3t" not in file.read_bytes(), file
    launches = json.loads((tmp_path / "dense" / "environment.json").read_text())
    assert len(launches) == 1
    assert {"time", "command", "python", "packages", "git", "cpus"} <= set(launches[0])
    assert not {"env", "environ", "environment"} & set(launches[0])


# ---- resuming


def test_resume_says_from_where_and_equals_one_go(fit, go_on, finished, capsys):
    assert fit() == 0
    out = capsys.readouterr().out
    assert f"resuming from {go_on}/checkpoints/step=000009: 9 steps, 1,152 tokens done" in out
    assert trajectory(go_on) == trajectory(finished)
    assert len(json.loads((go_on / "environment.json").read_text())) == 2


def test_a_broken_newest_checkpoint_falls_back_and_still_equals_one_go(fit, go_on, finished, capsys):
    weights = go_on / "checkpoints" / "step=000009" / "model" / "shard-00000.safetensors"
    data = bytearray(weights.read_bytes())
    data[-1] ^= 1
    weights.write_bytes(data)
    assert fit() == 0
    out = capsys.readouterr().out
    warnings = [line for line in out.splitlines() if line.startswith("warning:")]
    assert len(warnings) == 1
    assert "step=000009 is broken and passed over: model/shard-00000.safetensors has a wrong checksum" in warnings[0]
    assert "resuming from" in out and "step=000008: 8 steps" in out
    assert trajectory(go_on) == trajectory(finished)


@pytest.mark.parametrize("content", ["", '{"step": ', '{"step": 12, "best_step": 12, "best_loss": 0.1}', None])
def test_a_kill_around_a_validation_leaves_one_record_of_it(fit, go_on, finished, content):
    """Step 8 was validated and logged; ``validated.json`` was not yet written, or is of steps that were lost."""
    newest = go_on / "checkpoints" / "step=000009"
    (newest / "manifest.json").unlink()  # back to step 8, whose validation is on record
    validated = go_on / "checkpoints" / "validated.json"
    validated.unlink() if content is None else validated.write_text(content)
    assert fit() == 0
    assert trajectory(go_on) == trajectory(finished)


def test_nothing_to_do(fit, over, capsys):
    before = {p: p.read_bytes() for p in (over / "checkpoints").rglob("*") if p.is_file()}
    records = trajectory(over)
    assert fit() == 0
    assert "nothing to do: 12 of 12 steps are done" in capsys.readouterr().out
    assert {p: p.read_bytes() for p in (over / "checkpoints").rglob("*") if p.is_file()} == before
    assert trajectory(over) == records


@pytest.mark.parametrize("validated", [True, False], ids=["before DONE", "before the last validation"])
def test_a_kill_after_the_last_checkpoint_leaves_nothing_undone(fit, over, finished, capsys, validated):
    (over / "DONE").unlink()
    if not validated:
        lines = (over / "metrics.jsonl").read_text().splitlines(keepends=True)
        assert "val_loss" in lines[-1]
        (over / "metrics.jsonl").write_text("".join(lines[:-1]))
    assert fit() == 0
    assert ("validating" in capsys.readouterr().out) != validated
    assert trajectory(over) == trajectory(finished)
    assert json.loads((over / "DONE").read_text()) == {"step": 12}


def test_resume_required_needs_something_to_resume(fit, go_on, finished, tmp_path, capsys):
    lines = error_lines(capsys, fit("--resume", "required", "--name", "fresh"))
    assert len(lines) == 1
    assert "nothing to resume from (resume: required)" in lines[0]
    assert fit("--resume", "required") == 0
    assert trajectory(go_on) == trajectory(finished)


def test_resume_never_moves_the_old_files_aside(fit, go_on, finished, tmp_path):
    old = (go_on / "metrics.jsonl").read_bytes()
    assert fit("--resume", "never") == 0
    assert fit("--resume", "never", "--trainer.max_steps", 6) == 0  # again, in the same second or not
    aside = sorted(go_on.glob("before-*"))
    assert len(aside) == 2
    assert old in [(folder / "metrics.jsonl").read_bytes() for folder in aside]
    assert all((folder / "checkpoints" / "step=000009" / "manifest.json").exists() for folder in aside)
    assert trajectory(aside[1]) == trajectory(finished)
    assert list(losses(go_on)) == [1, 2, 3, 4, 5, 6]


def test_nothing_whole_is_said_and_not_overwritten(fit, go_on, capsys):
    for folder in (go_on / "checkpoints").glob("step=*"):
        (folder / "manifest.json").unlink()
    lines = error_lines(capsys, fit())
    assert len(lines) == 1
    assert "no checkpoint is whole" in lines[0] and "--resume never" in lines[0]
    assert len(list((go_on / "checkpoints").glob("step=*"))) == 2


@pytest.mark.parametrize(
    ("words", "change"),
    [
        (["--model.init_args.optimizer.init_args.lr", "0.004"], "model.optimizer.init_args.lr: 0.003 -> 0.004"),
        (["--seed", "8"], "seed: 7 -> 8"),
        (["--data.init_args.seed", "1"], "data.seed: 0 -> 1"),
        (["--data.init_args.global_batch", "8"], "data.global_batch: 4 -> 8"),
        (["--model.init_args.config.dropout", "0.2"], "model.config.dropout: 0.1 -> 0.2"),
        (["--model.init_args.schedule.init_args.decay", "14 steps"], "decay: 12 steps -> 14 steps"),
        (["--model.init_args.clip_norm", "0.5"], "model.clip_norm: 1 -> 0.5"),
    ],
)
def test_another_recipe_is_refused_naming_what_changed(fit, go_on, capsys, words, change):
    records = (go_on / "metrics.jsonl").read_bytes()
    lines = error_lines(capsys, fit(*words))
    assert "was trained with another recipe" in lines[0]
    assert any(change in line for line in lines), lines
    assert len(lines) <= 6
    assert "--resume never" in lines[-1]
    assert (go_on / "metrics.jsonl").read_bytes() == records


def test_another_length_is_another_schedule_when_decay_is_null(tmp_path, recipe, capsys):
    path = write_recipe(tmp_path, recipe(steps=4))  # decay: null
    words = ["fit", "--config", path, "--run_root", tmp_path]
    assert cli(*words) == 0
    lines = error_lines(capsys, cli(*words, "--trainer.max_steps", 8))
    assert any("reaches its floor: 4 -> 8" in line for line in lines), lines


def test_extending_a_run_whose_decay_is_explicit(fit, over, finished):
    assert fit("--trainer.max_steps", 14) == 0
    assert trajectory(over)[: len(trajectory(finished))] == trajectory(finished)
    assert list(losses(over)) == list(range(1, 15))
    floor = [r["lr"] for r in trajectory(over) if "lr" in r][-2:]
    assert floor == [pytest.approx(0.0003)] * 2


def test_another_micro_batch_goes_on(fit, go_on, finished):
    """It changes rounding only, and neither the rates nor the batches."""
    assert fit("--data.init_args.micro_batch", 4) == 0
    mine, reference = trajectory(go_on), trajectory(finished)
    assert [(r["step"], r.get("lr"), r.get("batch")) for r in mine] == [
        (r["step"], r.get("lr"), r.get("batch")) for r in reference
    ]
    assert all(losses(go_on)[s] == losses(finished)[s] for s in range(1, 10))


@pytest.mark.parametrize("micro_batch", [1, 4])
def test_schedule_counts_optimizer_steps_whatever_the_micro_batch(fit, tmp_path, finished, micro_batch):
    words = ["--data.init_args.micro_batch", micro_batch, "--model.init_args.schedule.init_args.warmup", "384 tokens"]
    assert fit(*words, "--model.init_args.config.dropout", 0) == 0
    mine, reference = trajectory(tmp_path / "dense"), trajectory(finished)
    assert [r["lr"] for r in mine if "lr" in r] == [r["lr"] for r in reference if "lr" in r]
    assert [r["batch"] for r in mine if "batch" in r] == [r["batch"] for r in reference if "batch" in r]
    assert [r["lr"] for r in mine if "lr" in r][:3] == pytest.approx([0.001, 0.002, 0.003])


# ---- one owner, cool-down, failures


def test_a_second_process_in_the_folder_is_refused(fit, go_on, capsys):
    before = (go_on / "log.txt").read_bytes()
    owner = lock(go_on)
    lines = error_lines(capsys, fit())
    assert len(lines) == 1
    assert re.search(r"belongs to process \d+, which trains there", lines[0])
    owner.close()
    assert (go_on / "log.txt").read_bytes() == before
    assert fit() == 0


def test_cool_down_lets_the_rate_fall_and_ends_the_run(fit, go_on, finished, capsys):
    before = [r for r in trajectory(finished) if r["step"] <= 9]
    assert fit("--cool_down", "4 steps", "--trainer.max_steps", 20, "--checkpoint.every", "2 steps") == 0
    out = capsys.readouterr().out
    assert "cooling down from step 9 to the end at step 13" in out
    assert "done: 13 steps" in out
    records = trajectory(go_on)
    assert records[: len(before)] == before
    rates = {r["step"]: r["lr"] for r in records if "lr" in r}
    assert list(rates) == list(range(1, 14))
    assert [rates[s] for s in (10, 11, 12, 13)] == pytest.approx([rates[9] * f for f in (0.75, 0.5, 0.25, 0)])
    assert fit("--trainer.max_steps", 20) == 0
    assert "nothing to do: 13 of 13 steps are done" in capsys.readouterr().out


def test_a_cool_down_that_was_killed_goes_on(fit, go_on, capsys):
    words = ["--trainer.max_steps", 20, "--checkpoint.every", "2 steps"]
    assert fit("--cool_down", "4 steps", *words) == 0
    whole = trajectory(go_on)
    shutil.rmtree(go_on / "checkpoints" / "step=000013")  # as if killed after the checkpoint of step 12
    capsys.readouterr()
    assert fit(*words) == 0  # without asking again
    out = capsys.readouterr().out
    assert "step=000012: 12 steps" in out
    assert "the end at step 13" in out
    assert trajectory(go_on) == whole
    shutil.rmtree(go_on / "checkpoints" / "step=000013")
    assert fit("--cool_down", "8 steps", *words) == 0  # a chain of jobs repeats its command
    assert "goes on; --cool_down is not applied again" in capsys.readouterr().out
    assert trajectory(go_on) == whole


def test_cool_down_of_nothing_is_refused(fit, capsys):
    lines = error_lines(capsys, fit("--cool_down", "4 steps"))
    assert len(lines) == 1
    assert "no checkpoint to start it from" in lines[0]


@pytest.mark.filterwarnings("ignore")
def test_a_diverging_run_stops_before_the_step_and_says_where_to_go_on(fit, go_on, tmp_path, path, capsys):
    config = yaml.safe_load(path.read_text())
    config["model"]["init_args"]["optimizer"]["init_args"]["lr"] = 1e30
    code = fit("--name", "wild", config=write_recipe(tmp_path, config, "wild.yaml"))
    captured = capsys.readouterr()
    assert code == 1
    assert "Traceback" not in captured.err + captured.out
    lines = captured.err.strip().splitlines()
    assert len(lines) == 1
    assert re.match(r"stopped: step \d+: .* is (nan|inf); the step was not applied\.", lines[0])
    assert f"{tmp_path}/wild/checkpoints" in lines[0]
    assert not (tmp_path / "wild" / "DONE").exists()


def test_a_full_disk_is_one_line(fit, tmp_path, capsys, monkeypatch):
    from llmrecipes.checkpoint import durable

    def full(*arguments):
        raise OSError(28, "No space left on device")

    monkeypatch.setattr(durable, "put", full)
    lines = error_lines(capsys, fit(), expected=1)
    assert len(lines) == 1
    assert re.match(r"stopped: writing .*step=000003 failed: .*No space left on device", lines[0])
    assert not (tmp_path / "dense" / "DONE").exists()
    monkeypatch.undo()
    assert not list((tmp_path / "dense" / "checkpoints").glob("*"))

"""What the documents say is true: both READMEs alike, every file and target there, every command run, in miniature."""

from __future__ import annotations

import dataclasses
import functools
import glob
import importlib
import inspect
import math
import re
import shlex
import shutil
import subprocess
import sys
from pathlib import Path

import pytest
import yaml

from data_prep.commands import STAGES
from llmrecipes.cli import COMMANDS, TRAINER_COMMANDS, main
from llmrecipes.convert.commands import STAGES as CONVERSIONS
from llmrecipes.convert.merge_commands import STAGES as MERGES
from llmrecipes.recipe import check
from llmrecipes.recipe.check import USAGE as CHECK_USAGE

REPOSITORY = Path(__file__).parents[1]
READMES = ("README.md", "README.ja.md")
DOCUMENTS = (*READMES, "CONTRIBUTING.md", "CHANGELOG.md", *(f"docs/{p.name}" for p in REPOSITORY.glob("docs/*.md")))

# Only sizes are cut; every word of a command is kept.
SMALLER = {"--vocab_size": "1000", "--sample_bytes": "1_000_000", "--width": "2", "--depth": "2"}
MORE = {
    "data demo": "--documents 600",
    "data tokenizer": "--num_threads 1",
    "data tokenize": "--workers 1",
    "validate": "--data.init_args.seq_len 32 --data.init_args.micro_batch 4 --data.init_args.valid_batches 1",
    "fit": "--data.init_args.micro_batch 4 --data.init_args.valid_batches 1 --data.init_args.global_batch 4 "
    "--trainer.max_steps 6 --trainer.val_check_interval 3 --logging.every 2 "
    "--model.init_args.schedule.init_args.warmup '2 steps' --checkpoint.every '3 steps'",
}
SHORT = "--data.init_args.seq_len 32"  # of shards; a conversation needs its length
NO_BUDGET = "--model.init_args.token_budget null"
MORE_OF = {"lora_expert": f"{SHORT} {NO_BUDGET}", "router_train": f"{SHORT} {NO_BUDGET}", "sft": "", "dpo": ""}


def read(name: str) -> str:
    return (REPOSITORY / name).read_text(encoding="utf-8")


def blocks(text: str, language: str) -> list[str]:
    """The fenced blocks of a language."""
    return re.findall(rf"^```{language}\n(.*?)^```", text, re.MULTILINE | re.DOTALL)


def commands(text: str) -> list[str]:
    """The lines of all shell blocks."""
    return [line for block in blocks(text, "bash") for line in block.splitlines() if line]


def make_targets(text: str) -> set[str]:
    return set(re.findall(r"^([a-z]+):", text, re.MULTILINE))


def named_targets(text: str) -> list[str]:
    """Targets of ``make X`` in shell blocks and code spans."""
    return re.findall(r"^make ([a-z]+)$", "\n".join(commands(text)), re.MULTILINE) + re.findall(
        r"`make ([a-z]+)`", text
    )


def named_files(document: str, text: str) -> set[str]:
    """Links to files, and code spans that are paths of the repository; relative to its root."""
    links = re.findall(r"\]\(([^)#:]+)(?:#[^)]*)?\)", text)
    found = {str(Path(document).parent / link) for link in links}
    folders = "recipes|slurm|llmrecipes|data_prep|tests|docs|benchmarks"
    return found | set(re.findall(rf"`((?:{folders})/[\w./-]*|\.ci/run|constraints\.txt)`", text))


def test_both_readmes_say_the_same():
    english, japanese = map(read, READMES)
    assert commands(english) == commands(japanese)
    assert len(commands(english)) == 12
    assert blocks(english, "text") == blocks(japanese, "text") and len(blocks(english, "text")) == 2
    ours, theirs = ([yaml.safe_load(block) for block in blocks(text, "yaml")] for text in (english, japanese))
    assert ours == theirs and len(ours) == 2
    assert [len(re.findall(r"^## ", text, re.MULTILINE)) for text in (english, japanese)] == [11, 11]
    rows = [re.findall(r"^\| `([^|]*?)` ", text, re.MULTILINE) for text in (english, japanese)]
    assert len(rows[0]) == len(rows[1]) == 26


def test_every_make_target_exists():
    targets, seen = make_targets(read("Makefile")), 0
    for document in DOCUMENTS:
        for target in named_targets(read(document)):
            assert target in targets, f"{document}: make {target}"
            seen += 1
    assert seen >= 15
    assert named_targets("```bash\nmake dmeo\n```\n") == ["dmeo"] and "dmeo" not in targets


def test_every_named_file_exists():
    seen = 0
    for document in DOCUMENTS:
        for name in named_files(document, read(document)):
            assert (REPOSITORY / name).exists(), f"{document} names {name}"
            seen += 1
    assert seen >= 55
    assert named_files("docs/x.md", "[a](nowhere.md) `recipes/none.yaml`") == {"docs/nowhere.md", "recipes/none.yaml"}


def named(text: str, exist: set[str]) -> str:
    """The command that a text begins with: the longest of those there are, else the text."""
    return max((name for name in exist if f"{text} ".startswith(f"{name} ")), key=len, default=text)


def test_the_command_tables_are_complete():
    stages = {f"data {stage}" for stage in STAGES} | {f"convert {stage}" for stage in CONVERSIONS}
    exist = ({*TRAINER_COMMANDS, *COMMANDS} | stages) - {"data", "convert"}
    for document in READMES:
        table = [line for line in read(document).splitlines() if line.startswith("| `llmrecipes ")]
        texts = [text for line in table for text in re.findall(r"`llmrecipes ([^`]+)`", line)]
        assert {named(text, exist) for text in texts} == exist, document
    assert len(exist) == 47


@functools.cache
def help_of(command: str) -> str:
    return subprocess.run(
        [sys.executable, "-m", "llmrecipes", command, "--help"], capture_output=True, text=True
    ).stdout


def mistakes(words: list[str]) -> list[str]:
    """What is wrong with the words after ``llmrecipes``, found without running them."""
    if words[0] == "data":
        name = named(" ".join(words[1:]), set(STAGES))
        stage, rest = STAGES[name], words[1 + len(name.split()) :]
        if stage.recipe is None:
            known = set(inspect.signature(stage.load()).parameters)
        else:
            config = getattr(importlib.import_module(stage.module), stage.recipe)
            known = {"config", "help", *(field.name for field in dataclasses.fields(config))}
        return [word for word in rest if word.startswith("--") and word[2:].partition(".")[0] not in known]
    if words[0] == "convert":
        return [] if words[1] in CONVERSIONS else [words[1]]
    if words[0] == "merge":
        options = inspect.signature(MERGES[words[1]].load()).parameters if words[1] in MERGES else {}
        return [word for word in words[1:] if word.startswith("--") and word[2:] not in options]
    if words[0] in (
        "generate",
        "perplexity",
        "ensemble",
        "plan",
        "budget",
        "doctor",
        "evaluate",
        "report",
        "diff",
        "submit",
        "watch",
        "sweep",
    ):
        return [word for word in words[1:] if word.startswith("--") and f"{word} " not in help_of(words[0])]
    if words[0] not in (*TRAINER_COMMANDS, "check"):
        return [words[0]]
    rest = [word for word in words[1:] if word not in ("--print_config", "--without_files")]
    files, overrides = [], []
    while rest:
        word = rest.pop(0)
        if word == "--config" or not word.startswith("--"):
            files.append(REPOSITORY / (rest.pop(0) if word == "--config" else word))
        else:
            overrides += [word, rest.pop(0)]
    return [str(problem) for problem in check(files, overrides, files=False)]


def test_commands_of_the_other_documents_are_understood():
    seen = 0
    for document in DOCUMENTS[len(READMES) :]:
        for line in commands(read(document)):
            words = shlex.split(line)
            if words[0] == "llmrecipes":
                assert mistakes([w for w in words[1:] if w[0] not in "[<"]) == [], f"{document}: {line}"
                seen += 1
    assert seen >= 10
    assert mistakes(["data", "tokenize", "--inputs", "a"]) == ["--inputs"]
    assert len(mistakes(["fit", "--config", "recipes/moe_pretrain.yaml", "--trainer.max_step", "1"])) == 1


def test_recipe_snippets_are_sound(tmp_path):
    """The pieces of recipes in the documents, each laid over a whole recipe."""
    seen = 0
    for document in DOCUMENTS[len(READMES) :]:
        for block in blocks(read(document), "yaml"):
            piece = tmp_path / f"piece{seen}.yaml"
            piece.write_text(block, encoding="utf-8")
            recipes = [
                REPOSITORY / "recipes/cpu/dense_pretrain.yaml",
                REPOSITORY / "recipes/cpu/real_corpus.yaml",
                piece,
            ]
            overrides = ["--model.init_args.config.tie_embeddings", "false", "--data.init_args.micro_batch", "8"]
            overrides += ["--data.init_args.global_batch", "192"]  # what three nodes with eight processes can share
            found = [str(p) for p in check(recipes, overrides, files=False)]
            assert found == [], document
            seen += 1
    assert seen >= 3


# ---- the commands, run


@pytest.fixture(scope="module")
def workspace(tmp_path_factory) -> Path:
    """A folder like a fresh clone's, with the README's recipe and somebody's text in it."""
    folder = tmp_path_factory.mktemp("clone")
    (folder / "recipes").symlink_to(REPOSITORY / "recipes")
    recipe, _ = blocks(read("README.md"), "yaml")
    (folder / "first.yaml").write_text(recipe, encoding="utf-8")
    return folder


def in_miniature(words: list[str]) -> list[str]:
    """The same command with smaller sizes."""
    cut = [SMALLER.get(before, word) for before, word in zip(["", *words], words, strict=False)]
    key = " ".join(words[:2]) if words[0] == "data" else words[0]
    own = MORE_OF.get(Path(words[2]).stem, SHORT) if key == "fit" else ""
    return [*cut, *shlex.split(f"{MORE.get(key, '')} {own}")]


def demo_commands() -> tuple[list[str], list[str]]:
    """The ``llmrecipes`` commands of ``make demo``, and the run's files that it points to."""
    arguments = ["make", "--dry-run", "--always-make", "demo", "VENV=.venv"]
    done = subprocess.run(arguments, cwd=REPOSITORY, capture_output=True, text=True, check=True)
    lines = done.stdout.splitlines()
    run = [line.removeprefix(".venv/bin/") for line in lines if line.startswith(".venv/bin/llmrecipes ")]
    return run, re.findall(r"\bruns/[\w./]+", "\n".join(line for line in lines if line.startswith("echo")))


LIFE_CYCLE = """\
data demo, data tokenizer, data tokenize, fit dense_pretrain, fit lora_expert, fit lora_expert_people,
fit lora_expert_arithmetic, merge lora, fit router_train, evaluate router_train_cpu, fit sft, evaluate sft_cpu, fit dpo,
evaluate dpo_cpu, report"""


def run(line: str) -> int:
    words = shlex.split(line)
    assert words[0] == "llmrecipes"
    expanded = [w for word in words[1:] for w in (sorted(glob.glob(word)) if "*" in word else [word])]
    return main(in_miniature(expanded))


def named_stage(words: list[str]) -> str:
    """What a command of the demo is for."""
    last = {"fit": Path(words[-1]).stem, "evaluate": Path(words[-1]).name, "report": ""}
    return f"{words[0]} {last.get(words[0], words[1])}".strip()


def every_effect_is_a_number(shown: str, page: str) -> None:
    """The report of the demo, on the console and on the page: each stage, before and after."""
    rows = {line.split("  ")[1]: line.split()[-6:] for line in shown.splitlines() if line.startswith("  ")}
    models = ["dense_pretrain_cpu", *(f"lora_{name}_cpu" for name in ("towns", "people", "arithmetic"))]
    models += [f"router_train_cpu, {routers}" for routers in ("random routers", "trained")]
    for model in models:
        losses = [float(cell.strip("*")) for cell in rows[model]]
        assert len(losses) == 6 and all(0 < loss < 10 for loss in losses), model
    assert [cell[-1] == "*" for cell in rows["lora_people_cpu"]] == [False, False, True, True, False, False]
    tables = shown.split("Each stage, before and after")[1]
    stages = re.findall(r"^  (\w+_cpu) .*?(-?[\d.]+) +(-?[\d.]+)$", tables, re.MULTILINE)
    assert [name for name, _, _ in stages] == ["router_train_cpu", "sft_cpu", *["dpo_cpu"] * 4]
    first = dict(zip(["loss", "preferred", "accuracies", "margins"], stages[2:], strict=True))
    # Policy and reference are the same before the first step, but for the bf16 rounding of rows packed otherwise.
    assert float(first["loss"][1]) == pytest.approx(math.log(2), abs=2e-3)
    assert float(first["margins"][1]) == pytest.approx(0, abs=5e-3)
    answers = tables.split("held_out / held_out: exact_match, chat")[1]
    assert len(re.findall(r"^  \w+_cpu +[\d.]+ \([\d.]+-[\d.]+\)", answers, re.MULTILINE)) == 2 * 3  # facts, and sums
    assert page.count("<h3>Loss on every domain</h3>") == page.count("<h3>Each stage, before and after</h3>") == 1


def test_the_demo_and_every_command_of_the_readme_run(workspace, monkeypatch, capsys):
    monkeypatch.chdir(workspace)
    demo, pointed = demo_commands()
    assert [named_stage(line.split()[1:]) for line in demo] == re.split(r",\s", LIFE_CYCLE)
    for line in demo:
        capsys.readouterr()
        assert run(line) == 0, line
    assert len(pointed) >= 3 and all(Path(name).exists() for name in pointed), pointed
    assert list(Path("runs/dense_pretrain_cpu/samples").iterdir())
    every_effect_is_a_number(capsys.readouterr().out, Path("runs/report/report.html").read_text(encoding="utf-8"))

    Path("text").mkdir()
    for language in ("ja", "en"):
        shutil.copy(f"data/demo/text/{language}_towns.jsonl", f"text/{language}.jsonl")
    done = []
    for line in commands(read("README.md")):
        if line.startswith("llmrecipes "):
            capsys.readouterr()
            code = run(line)
            if "typo.yaml" in line:
                assert code == 2
                assert capsys.readouterr().err == blocks(read("README.md"), "text")[1]
            else:
                assert code == 0, line
            done.append(line.split()[1])
        elif line.startswith("sed "):
            subprocess.run(["bash", "-c", line], check=True)
        else:
            assert line in ("make demo", "make test", "source .venv/bin/activate")
    assert done == ["check", "fit", "validate", "check", *["data"] * 4]
    assert Path("runs/first/DONE").exists()
    assert {p.name for p in Path("data/mine/shards").glob("*.bin")} == {"ja.bin", "en.bin"}


def test_help_answers(capsys):
    for words in ([], ["--help"], ["check", "--help"], ["data", "--help"]):
        assert main(words) == 0
    shown = capsys.readouterr().out
    assert CHECK_USAGE in shown
    for name in (*TRAINER_COMMANDS, *COMMANDS, *STAGES):
        assert re.search(rf"^  {name} ", shown, re.MULTILINE), name


def test_a_wrong_command_would_be_noticed(workspace, monkeypatch, capsys):
    """The mutants of the tests above: a misspelt stage, option and key do not pass for running."""
    monkeypatch.chdir(workspace)
    assert run("llmrecipes data tokenise --input text/ja.jsonl") == 2
    assert run("llmrecipes fitt --config first.yaml") == 2
    assert run("llmrecipes check first.yaml --trainer.max_step 5") == 2
    assert "did you mean 'tokenize'?" in capsys.readouterr().err

"""The jobs of ``slurm/`` as files, and ``llmrecipes submit``. On a real Slurm: tests/slurm."""

from __future__ import annotations

import os
import re
import shutil
import subprocess
import sys
from pathlib import Path

import pytest
from helpers import REPOSITORY, cli, write_recipe

from llmrecipes.errors import UserError
from llmrecipes.recipe.slurm import Shape, allocation_problems

FILES = sorted(REPOSITORY.glob("slurm/*.s*"))
JOBS = {"train", "chain_array", "experts_array", "evaluate", "evaluate_each", "data_array", "convert_cpu"}


def test_all_files_were_seen():
    assert {path.stem for path in FILES if path.suffix == ".sbatch"} == JOBS
    assert {path.name for path in FILES if path.suffix == ".sh"} == {"site.sh", "launch.sh"}


def faults(path: Path) -> str:
    """What bash and shellcheck say of a file."""
    found = shutil.which("shellcheck", path=f"{Path(sys.executable).parent}:{os.environ['PATH']}")
    commands = [["bash", "-n", str(path)]]
    if found is None:
        pytest.skip("shellcheck is not here (make setup installs it): only bash has read the file")
    commands.append([found, "--shell=bash", "--external-sources", "--source-path=SCRIPTDIR/..", str(path)])
    return "".join(
        done.stdout + done.stderr
        for done in (subprocess.run(command, capture_output=True, text=True, cwd=REPOSITORY) for command in commands)
    )


@pytest.mark.parametrize("path", FILES, ids=lambda path: path.name)
def test_shellcheck_finds_nothing(path):
    assert subprocess.run(["bash", "-n", str(path)]).returncode == 0
    assert faults(path) == ""


def test_shellcheck_would_find_something(tmp_path):
    """The mutant: a variable without quotes."""
    bad = tmp_path / "bad.sbatch"
    bad.write_text("#!/bin/bash\nrm -r $1\n")
    assert "SC2086" in faults(bad)


@pytest.fixture
def work(tmp_path, monkeypatch, recipe):
    """The top of a clone, with a recipe for 2 nodes x 4 devices."""
    (tmp_path / "slurm").symlink_to(REPOSITORY / "slurm")
    strategy = {"class_path": "llmrecipes.distributed.ShardedStrategy", "init_args": {"mode": "full_shard"}}
    made = recipe(global_batch=16) | {"name": "wide"}
    made["trainer"] |= {"num_nodes": 2, "devices": 4, "strategy": strategy, "accelerator": "gpu"}
    write_recipe(tmp_path, made, "wide.yaml")
    monkeypatch.chdir(tmp_path)
    monkeypatch.delenv("SLURM_JOB_ID", raising=False)
    return tmp_path


def options(text: str) -> dict[str, str]:
    return dict(re.findall(r"(?m)^#SBATCH --([\w-]+)=(.*)$", text))


def test_submit_fills_in_the_recipe(work, capsys):
    assert cli("submit", "wide.yaml", "--nodes", 2, "--time", "20h", "--seed", 3) == 0
    written = (work / "runs" / "wide.sbatch").read_text()
    assert written in capsys.readouterr().out, "what is written is shown"
    found = options(written)
    wanted = {"nodes": "2", "ntasks-per-node": "4", "gpus-per-node": "4", "time": "20:00:00", "signal": "USR1@300"}
    assert found.items() >= wanted.items() and found["job-name"] == "wide"
    assert "WORDS=(--config wide.yaml --seed 3)\n" in written and '"$@")' not in written
    assert faults(work / "runs" / "wide.sbatch") == ""

    assert cli("submit", "wide.yaml", "--chain", 10, "--cpus_per_task", 8, "--output", "chain.sbatch") == 0
    found = options((work / "chain.sbatch").read_text())
    assert found["array"] == "1-10%1" and found["cpus-per-task"] == "8" and "nodes" in found
    assert "hand_over_or_end" in (work / "chain.sbatch").read_text()


@pytest.mark.parametrize(
    ("words", "said"),
    [
        (["--nodes", 3], ["--nodes=2", "--ntasks-per-node=4", "--gpus-per-node=4", "num_nodes: 3, devices: 4"]),
        (["--gpus_per_node", 8], ["num_nodes: 2, devices: 8"]),
        (["--nodes", 3, "--gpus_per_node", 1], ["num_nodes: 3, devices: 1", "has to change too", "global_batch"]),
        (["--tasks_per_node", 4, "--gpus_per_node", 2], ["--tasks_per_node 4 --gpus_per_node 4"]),
        (["--time", "5m"], ["--time 5m leaves less than half"]),
        (["--time", "soon"], ["--time: 'soon' is not a time"]),
        (["--trainer.max_step", 5], ["did you mean"]),
    ],
)
def test_mismatches_are_refused_with_the_corrected_lines(work, capsys, words, said):
    assert cli("submit", "wide.yaml", *words) == 2
    error = capsys.readouterr().err
    assert all(text in error for text in said), error
    assert not (work / "runs").exists(), "nothing is written"


def test_a_list_becomes_an_array(work, capsys):
    seeds = [f"--config wide.yaml --seed {seed} --name seed{seed}" for seed in (1, 2, 3)]
    (work / "seeds.txt").write_text("# seeds\n\n" + "\n".join(seeds) + "\n")
    assert cli("submit", "seeds.txt") == 0
    written = (work / "runs" / "seeds.sbatch").read_text()
    assert options(written)["array"] == "0-2" and "LIST=seeds.txt\n" in written

    narrow = "--config wide.yaml --name narrow --trainer.devices 2"
    (work / "bad.txt").write_text("\n".join([*seeds, seeds[0], narrow, "--config none.yaml"]))
    assert cli("submit", "bad.txt") == 2
    error = capsys.readouterr().err
    assert "2 lines train in runs/seed1" in error and "(2 x 2, 2 x 4)" in error and "bad.txt:6: " in error
    assert cli("submit", "seeds.txt", "--chain", 3) == cli("submit", "seeds.txt", "--seed", 3) == 2


def test_the_list_that_is_shipped(monkeypatch, tmp_path):
    monkeypatch.chdir(REPOSITORY)
    assert cli("submit", "slurm/experts.txt", "--without_files", "--output", tmp_path / "x.sbatch") == 0
    assert options((tmp_path / "x.sbatch").read_text())["array"] == "0-2"


def test_sent_as_the_site_says(work, monkeypatch, capsys):
    """A stand-in for sbatch shows what it is given; the real one is in tests/slurm."""
    stand_in = work / "bin" / "sbatch"
    stand_in.parent.mkdir()
    stand_in.write_text('#!/bin/bash\n[ -d logs ] && [ "${!#}" = runs/wide.sbatch ] && echo "17;cluster"\n')
    stand_in.chmod(0o755)
    monkeypatch.setenv("PATH", f"{stand_in.parent}:{os.environ['PATH']}")
    assert cli("submit", "wide.yaml", "--submit", "true") == 0
    assert "runs/wide.sbatch sent as job 17" in capsys.readouterr().out
    stand_in.write_text("#!/bin/bash\necho 'invalid partition' >&2\nexit 1\n")
    assert cli("submit", "wide.yaml", "--submit", "true") == 2
    assert "invalid partition" in capsys.readouterr().err


def test_a_newcomers_array_takes_a_recipe_and_the_variables_block(recipe, tmp_path, monkeypatch, capsys):
    """A fresh copy of `slurm/`, its block edited line by line, and one recipe: nothing else is edited."""
    shutil.copytree(REPOSITORY / "slurm", tmp_path / "slurm")
    before = {path: path.read_bytes() for path in (tmp_path / "slurm").iterdir() if path.name != "site.sh"}
    site = tmp_path / "slurm" / "site.sh"
    text, edited = (
        site.read_text(),
        {"# export SBATCH_PARTITION=gpu SBATCH_ACCOUNT=mylab": "export SBATCH_PARTITION=long"},
    )
    edited |= {"INTERFACE=${INTERFACE:-}": "INTERFACE=ib0"}
    for line, instead in edited.items():
        assert text.count(f"\n{line}\n") == 1, "the block has no such line to edit"
        text = text.replace(line, instead)
    site.write_text(text)
    write_recipe(tmp_path, recipe() | {"name": "mine"}, "mine.yaml")
    stand_in = tmp_path / "bin" / "sbatch"
    stand_in.parent.mkdir()
    stand_in.write_text(
        '#!/bin/bash\necho "$SBATCH_PARTITION $NCCL_SOCKET_IFNAME $*" > told; cp "${!#}" job; echo 17\n'
    )
    stand_in.chmod(0o755)
    monkeypatch.setenv("PATH", f"{stand_in.parent}:{os.environ['PATH']}")
    monkeypatch.chdir(tmp_path)
    assert cli("submit", "mine.yaml", "--chain", 3, "--submit", "true") == 0
    assert "runs/mine.sbatch sent as job 17" in capsys.readouterr().out
    assert (tmp_path / "told").read_text() == "long ib0 --parsable runs/mine.sbatch\n"
    assert options((tmp_path / "job").read_text())["array"] == "1-3%1"
    assert len(before) == 9 and all(path.read_bytes() == data for path, data in before.items())
    # what is not there yet is named, with what to do; and the job can be looked at before
    write_recipe(tmp_path, recipe(train={"data/none": 1.0}) | {"name": "later"}, "later.yaml")
    assert cli("submit", "later.yaml", "--chain", 3) == 2
    assert "data/none.bin" in (error := capsys.readouterr().err) and "llmrecipes data tokenize" in error
    assert cli("submit", "later.yaml", "--chain", 3, "--without_files") == 0


def test_somewhere_else(work, monkeypatch, capsys):
    monkeypatch.setenv("PATH", str(work))
    assert cli("submit", "wide.yaml", "--submit", "true") == 2
    assert "sbatch is not here" in capsys.readouterr().err
    (work / "slurm").unlink()
    assert cli("submit", "wide.yaml") == 2
    assert "top of the repository" in capsys.readouterr().err


# ---- what Slurm started against the recipe

WIDE = Shape(2, 4, gpu=True)
STEP = {
    "SLURM_JOB_ID": "7",
    "SLURM_STEP_ID": "0",
    "SLURM_NNODES": "2",
    "SLURM_NTASKS": "8",
    "SLURM_NTASKS_PER_NODE": "4",
    "SLURM_GPUS_ON_NODE": "4",
}


@pytest.mark.parametrize(
    ("changes", "said"),
    [
        ({}, None),
        ({"SLURM_JOB_ID": None}, None),
        ({"SLURM_NTASKS": None}, None),  # a shell in an allocation
        (
            {"SLURM_NNODES": "3", "SLURM_NTASKS": "12"},
            "started 3 nodes x 4 tasks.* --nodes=2.*num_nodes: 3, devices: 4",
        ),
        ({"SLURM_NTASKS": "4", "SLURM_NTASKS_PER_NODE": "2"}, "2 nodes x 2 tasks.*--ntasks-per-node=4.*devices: 2"),
        ({"SLURM_NTASKS_PER_NODE": "8"}, "2 nodes x 8 tasks"),
        ({"SLURM_NTASKS_PER_NODE": None}, "says --ntasks.*--nodes=2.*--ntasks-per-node=4.*--gpus-per-node=4"),
        ({"SLURM_STEP_ID": None}, "8 tasks, but only this process.*srun llmrecipes fit"),
        ({"SLURM_JOB_NAME": "interactive"}, "name is interactive.*--job-name=train"),
        ({"SLURM_JOB_NAME": "interactive", "SLURM_STEP_ID": None}, None),
        ({"CUDA_VISIBLE_DEVICES": "0"}, "sees 1 GPU of the 4.*--gpus-per-node=4.*no --gpus-per-task"),
        ({"SLURM_GPUS_ON_NODE": "2"}, "sees 2 GPUs of the 4"),
        ({"TORCHELASTIC_RUN_ID": "a"}, "torchrun was started 8 times on 2 nodes.*--ntasks-per-node=1 torchrun"),
        ({"TORCHELASTIC_RUN_ID": "a", "SLURM_NTASKS": "2"}, None),
        # Two of the job's three nodes: what counts is the step.
        ({"SLURM_NNODES": "3", "SLURM_STEP_NUM_NODES": "2", "SLURM_STEP_NUM_TASKS": "8"}, None),
    ],
)
def test_what_slurm_started(changes, said):
    environ = {name: value for name, value in (STEP | changes).items() if value is not None}
    found = allocation_problems(environ, WIDE)
    if said is None:
        assert found == []
    else:
        assert re.search(said, "\n".join(found), re.DOTALL), found


def test_fit_refuses_before_torch_is_imported(work, monkeypatch):
    for name, value in (STEP | {"SLURM_NNODES": "3"}).items():
        monkeypatch.setenv(name, value)
    from llmrecipes.cli import _run

    with pytest.raises(UserError, match="Slurm started 3 nodes"):
        _run("fit", ["--config", "wide.yaml"], False, None)


def test_check_tells_the_run_folder(work, capsys):
    assert cli("check", "--config", "wide.yaml", "--name", "other", "--run_root", "deep/runs", "--run_folder") == 0
    assert capsys.readouterr().out == "deep/runs/other\n"
    assert cli("check", "--config", "wide.yaml", "--trainer.max_steps", -1, "--run_folder") == 2
    assert capsys.readouterr().out == ""

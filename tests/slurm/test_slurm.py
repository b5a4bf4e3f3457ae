"""The jobs of ``slurm/`` on a real Slurm: arrays, two nodes, time limits, requeues and dead nodes change no digit.

All jobs are sent at the beginning and run side by side; the tests look at how each of them went.
"""

from __future__ import annotations

import json
import re
import shutil
import sys
import tempfile
from pathlib import Path

import pytest
from helpers import REPOSITORY, cli, trajectory, write_recipe
from machines import Cluster, steps_logged, why_not

sys.path.insert(0, str(REPOSITORY / "tests" / "inference"))
sys.path.insert(0, str(REPOSITORY / "tests" / "data_prep"))

pytestmark = [pytest.mark.slurm, pytest.mark.slow]

STEPS, HOLD, SAVED = 30, 11, 9  # checkpoints are 3 apart, and at validations, every 4


@pytest.fixture(scope="module")
def cluster():
    reason = why_not()
    if reason:
        pytest.skip(reason)
    folder = Path(tempfile.mkdtemp(prefix="lrs"))  # short: Slurm's sockets are in it
    folder.chmod(0o755)
    cluster = Cluster(folder / "c", {"steady": 2, "doomed": 3})
    try:
        cluster.start()
        yield cluster
    finally:
        cluster.stop()
        shutil.rmtree(folder)


@pytest.fixture(scope="module")
def work(tmp_path_factory) -> Path:
    """What a user has: the jobs' files beside recipes and data."""
    folder = tmp_path_factory.mktemp("work")
    (folder / "slurm").symlink_to(REPOSITORY / "slurm")
    (folder / "logs").mkdir()
    return folder


@pytest.fixture(scope="module")
def two_nodes(recipe, work):
    """Writes a recipe of one process on each of two nodes; returns its file."""

    def make(name: str, pace: float = 0.0, hold: int | None = None) -> Path:
        made = recipe(steps=STEPS) | {"name": name}
        # Patient ones: on a busy machine a rank may start long before the other.
        strategy = {"mode": "full_shard", "timeout": 900, "start_timeout": 300}
        slow = {"seconds": pace, "hold": hold, "release": str(work / f"{name}.go")}
        made["trainer"] |= {
            "num_nodes": 2,
            "devices": 1,
            "strategy": {"class_path": "llmrecipes.distributed.ShardedStrategy", "init_args": strategy},
            "callbacks": [{"class_path": "pace.Pace", "init_args": slow}],
        }
        return write_recipe(work, made, f"{name}.yaml")

    return make


def sent_by_submit(cluster, work: Path, what: object) -> str:
    sent = cluster.run("llmrecipes", "submit", what, "--submit", "true", cwd=work)
    return re.search(r"sent as job (\d+)", sent.stdout)[1]


@pytest.fixture(scope="module")
def calm(cluster, work, two_nodes) -> str:
    """The job that nobody disturbs, sent as a newcomer does."""
    return sent_by_submit(cluster, work, two_nodes("calm"))


@pytest.fixture(scope="module")
def signalled(cluster, work, two_nodes) -> str:
    two_nodes("signalled", pace=0.3, hold=HOLD)
    return cluster.sbatch("--nodes=2", "slurm/train.sbatch", "--config", "signalled.yaml", cwd=work)


@pytest.fixture(scope="module")
def doomed(cluster, work, two_nodes) -> str:
    two_nodes("doomed", hold=HOLD)
    words = ["--partition=doomed", "--nodes=2", "slurm/train.sbatch", "--config", "doomed.yaml"]
    return cluster.sbatch(*words, cwd=work)


@pytest.fixture(scope="module")
def one_node(recipe, work) -> None:
    made = recipe(steps=STEPS)
    write_recipe(work, made, "fast.yaml")
    made["trainer"] |= {"callbacks": [{"class_path": "pace.Pace", "init_args": {"hold": HOLD}}]}
    write_recipe(work, made | {"name": "limited", "seed": 1}, "limited.yaml")


@pytest.fixture(scope="module")
def experts(cluster, work, one_node) -> str:
    lines = [f"--config fast.yaml --seed {seed} --name seed{seed}" for seed in (1, 2)]
    (work / "seeds.txt").write_text("# two seeds\n" + "\n".join(lines) + "\n")
    return sent_by_submit(cluster, work, "seeds.txt")


@pytest.fixture(scope="module")
def limited(cluster, work, one_node) -> str:
    """A chain of jobs that may take two minutes each, for a training that waits for the signal before a limit.

    Slurm looks at limits twice a minute and sends the signal up to a minute early: 30 to 60 s after a job's start.
    """
    words = ["--array=1-20%1", "--time=2", "--signal=USR1@30", "slurm/chain_array.sbatch", "--config", "limited.yaml"]
    return cluster.sbatch(*words, cwd=work)


@pytest.fixture(scope="module")
def all_sent(signalled, doomed, limited, calm, experts):
    """They share the machine, and some mostly wait."""


@pytest.fixture(scope="module")
def disturbed(cluster, work, all_sent, signalled):
    """A signal for one, a dead node for another: what follows takes a minute, in which other tests are run."""
    for name in ("signalled", "doomed"):
        cluster.until(lambda name=name: steps_logged(work / "runs" / name) == HOLD, f"{HOLD} steps")
    cluster.run("scancel", "--signal=USR1", signalled)  # what Slurm does before a limit, now
    cluster.crash("n4")
    for name in ("signalled", "doomed"):
        (work / f"{name}.go").touch()


def log(work: Path, name: str) -> str:
    (file,) = (work / "logs").glob(f"{name}.txt")
    return file.read_text()


def resumed_from(text: str) -> list[int]:
    return [int(step) for step in re.findall(r"resuming from \S+/step=(\d+): ", text)]


def assert_same_run(work: Path, name: str, other: str) -> None:
    """All records and the weights at the end, to the last bit."""
    expected, found = trajectory(work / "runs" / other), trajectory(work / "runs" / name)
    assert len(expected) >= STEPS and found == expected
    last = f"checkpoints/step={STEPS:06d}/model/shard-00000.safetensors"
    assert (work / "runs" / name / last).read_bytes() == (work / "runs" / other / last).read_bytes()


# ---- while those run


@pytest.mark.usefixtures("all_sent")
def test_data_preparation_with_a_killed_worker(cluster, work):
    from stages import hashes, run_stage, write
    from test_frame import sentences

    for part in range(12):  # six for each worker; the last one takes seconds, within which it is killed
        write(work / "in" / f"{part:02}.jsonl", sentences(16_000 if part == 11 else 500, part))
    run_stage("clean", input=[str(work / "in")], output=work / "whole")
    words = ["--array=0-1", "--cpus-per-task=1", "--mem=1G", "slurm/data_array.sbatch"]
    words += ["clean", "--input", "in", "--output", "out"]
    first = cluster.sbatch(*words, cwd=work)
    cluster.until(lambda: list((work / "out").rglob("*.zst")), "the first file")
    cluster.run("scancel", "--signal=KILL", f"{first}_0")  # the task with the largest file
    assert set(cluster.wait(first)) > {"COMPLETED"}
    assert not (work / "out" / "manifest.json").exists()
    assert set(cluster.wait(cluster.sbatch(*words, cwd=work))) == {"COMPLETED"}
    assert hashes(work / "out") == hashes(work / "whole") and len(hashes(work / "whole")) == 13


@pytest.mark.usefixtures("disturbed")
def test_evaluation_as_an_array(cluster, work):
    from model_folders import make_hf_folder

    make_hf_folder(work / "b")
    (work / "text.jsonl").write_text('{"text": "The river runs."}\n{"text": "It is long and cold."}\n')
    tasks = [{"kind": "perplexity", "file": "text.jsonl"}]
    (work / "e.yaml").write_text(json.dumps({"model": "a", "output": "answers", "batch_size": 2, "tasks": tasks}))
    job = cluster.sbatch("--array=1", "slurm/evaluate.sbatch", "e.yaml", "a", "b", cwd=work)
    assert cluster.wait(job) == ["COMPLETED"], "the second model; the first is not there"
    assert "bits_per_byte" in log(work, f"evaluate-{job}_1")
    assert json.loads((work / "answers" / "summary.json").read_text())["model"] == "b"


def test_mismatches_are_refused_with_the_corrected_lines(cluster, work, two_nodes):
    two_nodes("wrong")
    job = cluster.sbatch("--nodes=1", "slurm/train.sbatch", "--config", "wrong.yaml", cwd=work)
    assert cluster.wait(job) == ["FAILED"]
    text = log(work, f"train-{job}")
    assert "#SBATCH --nodes=2" in text and "trainer: {num_nodes: 1, devices: 1}" in text
    assert text.count("launch 1 on") == 1 and "launch 2" not in text, "a mistake is not tried again"
    assert cli("check", work / "wrong.yaml", "--run_folder") == 0


# ---- what follows a failed launch, with a stand-in for the training

STAND_IN = """#!/bin/bash
[ "$1" = check ] && { echo "runs/$3"; exit 0; }
case $3 in
bad_node | bad_node_in_chain)
  [ -e "runs/$3/first" ] || echo "$SLURMD_NODENAME" >"runs/$3/first"
  if [ "$SLURMD_NODENAME" = "$(cat "runs/$3/first")" ]; then
    echo "error: rank 0 (pid 7 on $SLURMD_NODENAME) was killed by SIGBUS"
    exit 1
  fi ;;
bad_program)
  echo "error: rank 0 (pid 7 on n$(wc -l <"runs/$3/strikes")) was killed by SIGSEGV"
  exit 1 ;;
no_progress) exit 1 ;;
stop_file)
  echo '{"step": 3, "why": "file"}' >"runs/$3/STOPPED"
  exit 75 ;;
esac
touch "runs/$3/DONE"
"""


@pytest.fixture(scope="module")
def stand_in(cluster, work, disturbed):
    """Sends a job whose ``llmrecipes`` only plays a part; returns the logs when all is over."""
    folder = work / "stand_in"
    (folder / "bin").mkdir(parents=True)
    (folder / "bin" / "llmrecipes").write_text(STAND_IN)
    (folder / "bin" / "llmrecipes").chmod(0o755)

    def play(part: str, job: str, *words: str) -> str:
        sent = [f"--job-name={part}", "--time=5", *words, f"slurm/{job}.sbatch", "--config", part]
        cluster.sbatch(*sent, cwd=work, env={"VENV": str(folder), "RETRY_PAUSE": "0.2"})
        running = ("squeue", "--noheader", "--name", part)
        cluster.until(lambda: not cluster.run(*running).stdout.strip(), part)
        return "".join(file.read_text() for file in sorted((work / "logs").glob(f"{part}-*.txt")))

    return play


def test_a_bad_node_is_left(work, stand_in):
    text = stand_in("bad_node", "train", "--partition=steady", "--cpus-per-task=3")
    bad, good = (work / "runs/bad_node/bad_nodes").read_text().strip(), re.findall(r"launch \d on (\S+) from", text)[-1]
    assert {bad, good} == {"n1", "n2"} and (work / "runs/bad_node/DONE").exists()
    assert re.findall(r"launch (\d) on (\S+) from", text) == [("1", bad), ("2", bad), ("1", good)]
    assert f"{bad} failed 2 times" in text and f"sent again without {bad}" in text


def test_pending_tasks_of_a_chain_avoid_a_bad_node(work, stand_in):
    text = stand_in("bad_node_in_chain", "chain_array", "--array=1-3%1", "--partition=steady")
    bad, good = (
        (work / "runs/bad_node_in_chain/bad_nodes").read_text().strip(),
        re.findall(r"launch 1 on (\S+)", text)[-1],
    )
    assert {bad, good} == {"n1", "n2"} and (work / "runs/bad_node_in_chain/DONE").exists()
    assert f"_2 will avoid {bad}" in text and f"_2, restart 0] launch 1 on {good}" in text
    assert "the rest of the chain is cancelled" in text


@pytest.mark.parametrize(
    ("part", "launches", "said"),
    [
        ("bad_program", 2, "different nodes failed after the same checkpoint"),
        ("no_progress", 3, "gave up after 3 launches"),
        ("stop_file", 1, "asked at the beginning: the rest of the chain is cancelled"),
    ],
)
def test_a_chain_ends_where_no_node_is_to_blame(work, stand_in, part, launches, said):
    text = stand_in(part, "chain_array", "--array=1-3%1", "--partition=steady")
    assert said in text and text.count("] launch ") == 2 * launches, "begun and ended"
    assert not (work / "runs" / part / "DONE").exists() and (work / "runs" / part / "bad_nodes").read_text() == ""


# ---- how they went


@pytest.mark.usefixtures("disturbed")
def test_a_signal_saves_and_requeues(cluster, work, calm, signalled):
    assert cluster.wait(signalled) == ["COMPLETED"]
    (job,) = cluster.jobs(signalled)
    text = log(work, f"train-{signalled}")
    assert job["Restarts"] == "1" and "back into the queue" in text
    (step,) = resumed_from(text)
    assert step > HOLD and f"stopped after step {step}, saved" in text, "nothing is done twice"
    cluster.wait(calm)
    assert_same_run(work, "signalled", "calm")


@pytest.mark.usefixtures("disturbed")
def test_a_dead_node_costs_at_most_one_interval(cluster, work, calm, doomed):
    run = work / "runs" / "doomed"
    cluster.until(lambda: (run / "DONE").exists(), "the end without the dead node")
    # Sent again by itself, or put back into the queue by Slurm, whoever notices first.
    texts = [file.read_text() for file in sorted((work / "logs").glob("train-*.txt"))]
    text = "".join(text for text in texts if "runs/doomed" in text)
    launches = re.findall(r"launch \d on (\S+) from", text)
    assert launches[0] == "n3,n4" and launches[-1] == "n3,n5"
    assert set(resumed_from(text)) == {SAVED}, f"{HOLD - SAVED} steps are done again"
    cluster.wait(calm)
    assert_same_run(work, "doomed", "calm")


@pytest.mark.usefixtures("disturbed")
def test_two_nodes_from_submit(cluster, work, calm):
    assert cluster.wait(calm) == ["COMPLETED"]
    text = log(work, f"calm-{calm}")
    assert "MASTER_ADDR=n1" in text and "2 ranks agree" in text
    assert steps_logged(work / "runs" / "calm") == STEPS and (work / "runs" / "calm" / "DONE").exists()


@pytest.mark.usefixtures("disturbed")
def test_an_array_of_seeds(cluster, work, experts):
    assert cluster.wait(experts) == ["COMPLETED", "COMPLETED"]
    runs = [trajectory(work / "runs" / f"seed{seed}") for seed in (1, 2)]
    assert [run[-1]["step"] for run in runs] == [STEPS] * 2
    assert runs[0] != runs[1]
    with pytest.raises(AssertionError):  # the mutant: another run is not taken for the same
        assert_same_run(work, "seed2", "seed1")


@pytest.mark.usefixtures("disturbed")
def test_a_chain_through_real_time_limits(cluster, work, experts, limited):
    states = cluster.wait(limited, timeout=600)
    text = log(work, f"chain-{limited}")
    assert "the next task of the chain goes on" in text and "the rest of the chain is cancelled" in text
    # On a busy machine a task may have no time to start at all: the chain goes on all the same.
    assert "CANCELLED" in states and states.count("COMPLETED") >= 2
    steps = resumed_from(text)
    assert HOLD + 1 in steps and steps == sorted(steps)
    cluster.wait(experts)
    assert_same_run(work, "limited", "seed1")

"""Files cut short or with one wrong bit: a checkpoint before is used, training data is refused."""

from __future__ import annotations

import json
import shutil
from pathlib import Path

import pytest
from broken_runs import Job, assert_same, fit, launched, steps_to_repeat
from helpers import write_recipe
from report import Case

from llmrecipes.checkpoint import verify

KINDS = (
    "manifest.json",
    "state.json",
    "metrics.jsonl",
    "rng-00000.safetensors",
    "model/shard-00000.safetensors",
    "optimizer/shard-00000.safetensors",
)


def cut(path: Path, size: int) -> None:
    with path.open("r+b") as file:
        file.truncate(size)


def flip(path: Path, position: int, bit: int = 0) -> None:
    with path.open("r+b") as file:
        file.seek(position)
        (byte,) = file.read(1)
        file.seek(position)
        file.write(bytes([byte ^ 1 << bit]))


def places(size: int) -> list[int]:
    """First, header, middle, last."""
    return sorted({0, min(8, size - 1), size // 3, size // 2, size - 1})


def damages(path: Path):
    """Ways to damage a file: a name, and what does it."""
    size = path.stat().st_size
    for place in places(size):
        yield f"cut to {place}", lambda p, place=place: cut(p, place)
        yield f"bit in byte {place}", lambda p, place=place: flip(p, place, place % 8)
    yield "gone", lambda p: p.unlink()


@pytest.fixture(scope="module")
def stopped(tmp_path_factory, little) -> Path:
    """A run killed after step 10, with checkpoints of steps 6 and 9. Read only."""
    folder = tmp_path_factory.mktemp("stopped")
    write_recipe(folder, little())
    with launched(folder, inject=slow_after(10)) as job:
        job.until_step(folder / "run", 10)
    assert sorted(path.name for path in (folder / "run" / "checkpoints").glob("step=*")) == [
        "step=000006",
        "step=000009",
    ]
    return folder


def slow_after(step: int):
    """The run waits after a step, to be killed there."""
    import time

    from llmrecipes.distributed import StepMarks

    def inject(rank: int) -> None:
        def start(self, trainer, *arguments):
            while trainer.global_step >= step:
                time.sleep(1)

        StepMarks.on_train_batch_start = start

    return inject


def test_a_damaged_checkpoint(tmp_path, stopped, whole, stride):
    case = Case(3, "a checkpoint's file cut short, with a wrong bit, or gone", 1)
    newest = Path("run", "checkpoints", "step=000009")
    for kind in KINDS:
        for what, damage in [*damages(stopped / newest / kind)][:: -stride(4)]:
            folder = tmp_path / str(case.injected)
            shutil.copytree(stopped, folder, symlinks=True)
            damage(folder / newest / kind)
            reason = verify(folder / newest)
            assert reason is not None, f"{kind} {what}"
            case.add(lost=steps_to_repeat(folder / "run"))
            text = fit(folder)
            (said,) = [line for line in text.splitlines() if "broken" in line]
            assert said == f"warning: run/checkpoints/step=000009 is broken and passed over: {reason}", text
            assert "resuming from run/checkpoints/step=000006" in text
            assert_same(folder / "run", whole())
    assert case.injected == 6 * (11 if stride(4) == 1 else 3)
    assert case.lost == 4 * case.injected  # steps 7 to 10
    case.write()


def test_any_bit_of_the_manifest(stopped, tmp_path):
    """The manifest has no checksum of its own: a wrong bit shows, or says nothing of a file."""
    folder = tmp_path / "step=000009"
    shutil.copytree(stopped / "run" / "checkpoints" / "step=000009", folder)
    path = folder / "manifest.json"
    good = path.read_bytes()
    files = json.loads(good)["files"]
    unseen = 0
    for place in range(0, len(good)):
        path.write_bytes(good[:place] + bytes([good[place] ^ 1 << place % 8]) + good[place + 1 :])
        if verify(folder) is None:
            assert json.loads(path.read_bytes())["files"] == files
            unseen += 1
    assert unseen < len(good) / 20


def test_a_damaged_checkpoint_of_two_processes(tmp_path, little, whole):
    case = Case(3, "a checkpoint's file cut short, with a wrong bit, or gone", 2)
    write_recipe(tmp_path, little(ranks=2))
    with launched(tmp_path, ranks=2, inject=slow_after(10)) as job:
        job.until_step(tmp_path / "run", 10)
    newest = tmp_path / "run" / "checkpoints" / "step=000009"
    flip(newest / "optimizer" / "shard-00001.safetensors", 1000)
    case.add(lost=steps_to_repeat(tmp_path / "run"))
    text = fit(tmp_path, ranks=2)
    assert (
        text.count("step=000009 is broken and passed over: optimizer/shard-00001.safetensors has a wrong checksum") == 1
    )
    assert_same(tmp_path / "run", whole(2), ranks=2)
    case.write()


def test_nothing_whole_is_said_and_nothing_is_deleted(tmp_path, stopped):
    shutil.copytree(stopped, tmp_path / "all", symlinks=True)
    for path in (tmp_path / "all").glob("run/checkpoints/step=*/state.json"):
        path.unlink()
    text = fit(tmp_path / "all", expect=2)
    assert "no checkpoint is whole; start again with --resume never" in text
    assert len(list((tmp_path / "all").glob("run/checkpoints/step=*"))) == 2


@pytest.mark.parametrize("ranks", [1, 2])
def test_damaged_training_data(tmp_path, little, shards, whole, ranks):
    """Nothing is trained on tokens that are not those of the recipe."""
    case = Case(3, "training data cut short or with a wrong bit: refused before step 1", ranks)
    recipe = little(ranks)
    own = {}
    for prefix in shards.values():
        for file in prefix.parent.glob(f"{prefix.name}.*"):
            shutil.copy(file, tmp_path)
        own[str(tmp_path / prefix.name)] = recipe["data"]["init_args"]["train"][str(prefix)]
    recipe["data"]["init_args"]["train"] = own
    write_recipe(tmp_path, recipe)
    with launched(tmp_path, ranks=ranks, inject=slow_after(10)) as job:
        job.until_step(tmp_path / "run", 10)
    metrics = (tmp_path / "run" / "metrics.jsonl").read_bytes()
    for kind in ("bin", "idx", "json"):
        path = tmp_path / f"b.{kind}"
        good = path.read_bytes()
        for what, damage in damages(path):
            if ranks > 1 and what != "bit in byte 0":
                continue
            if kind == "json" and what == f"cut to {len(good) - 1}":
                continue  # the end of the last line: nothing is missing
            damage(path)
            text = Job(tmp_path, ranks=ranks).expect(2)
            assert "Traceback" not in text, text
            # Without a manifest it is another's shard, which is not the one the checkpoint was trained on.
            name = '"name": "b"' if (kind, what) == ("json", "gone") else str(tmp_path / "b")
            assert name in text, f"{kind} {what}: {text}"
            assert (tmp_path / "run" / "metrics.jsonl").read_bytes() == metrics
            path.write_bytes(good)
            case.add()
    assert case.injected == (32 if ranks == 1 else 3)
    fit(tmp_path, ranks=ranks)
    assert_same(tmp_path / "run", whole(ranks), ranks)
    case.write()

"""Pairing, medians, voided rows and the table, with programs that cost nothing."""

from __future__ import annotations

import json
import sys
from pathlib import Path

import pytest

from benchmarks.cases import TITLES, groups
from benchmarks.meter import Meter, peak_memory, write_record
from benchmarks.paired import Group, Peer, Plan, Program, Ratio, figures, ratio, run_group, void_reason
from benchmarks.table import group_rows, markers, put_between_markers, tables

WORKER = str(Path(__file__).with_name("fake_worker.py"))


def record(cpu: float, checks=(10.4, 10.3, 10.2), memory: float = 100.0, matmul: float | None = None) -> dict:
    units = [{"cpu": 50.0, "wall": 90.0}, {"cpu": 9.0, "wall": 9.0}]
    units += [{"cpu": cpu * part, "wall": cpu * part / 2} for part in (0.5, 1.0, 7.0)]
    found = {"units": units, "checks": list(checks), "memory_mib": memory, "warmup": 2}
    return found if matmul is None else found | {"matmul_gflop_per_cpu_s": matmul}


def program(name: str, order: Path, what: dict | str) -> Program:
    text = what if isinstance(what, str) else json.dumps(what)
    return Program(name, ("{ours}", WORKER, name, str(order), text.replace("{", "{{").replace("}", "}}")))


def a_group(ours: Program, *peers: Peer, **more) -> Group:
    return Group("A", "bf16", ours, peers, 4096, "tokens", flops=250e6, **more)


def test_programs_take_turns_and_share_the_groups_environment(tmp_path):
    order = tmp_path / "order.txt"
    ours, peer = program("ours", order, record(2.0)), program("it", order, record(4.0))
    group = a_group(ours, Peer(peer, speed=1.5, memory=0.9), environment={"SETTING": "malloc"})
    found = run_group(group, Plan(rounds=2, warmup=2, steps=3), {"ours": sys.executable}, tmp_path)
    assert order.read_text().splitlines() == ["ours malloc", "it malloc", "ours malloc", "it malloc"]
    assert [len(found[name]) for name in ("ours", "it")] == [2, 2]
    mine, theirs = group_rows(group, found)
    assert "| 2.00 | 1.00 | speed >= 1.5: yes; memory <= 0.9: NO |" in theirs
    assert mine.endswith("|  |  |  |")


def test_warm_up_does_not_count_and_the_median_step_does():
    found = figures(record(2.0), 4096, "steps")
    assert found.cpu == 2.0
    assert found.per_cpu == 2048.0
    assert found.per_second == 4096.0
    assert figures(record(2.0), 1, "first").cpu == 50.0
    with pytest.raises(ValueError, match="none is left"):
        figures(record(2.0) | {"warmup": 5}, 4096, "steps")


def test_ratio_is_of_each_round():
    # Both programs are slowed alike in the second round: the ratio must not notice, and one of medians would.
    assert ratio([10.0, 4.0, 10.0], [5.0, 2.0, 4.0]) == Ratio(2.0, 2.0, 2.5)


@pytest.mark.parametrize(
    ("checks", "void"),
    [
        ((10.4005, 10.3, 10.2), False),
        ((10.4, 10.3, 10.2, 99.0), False),  # only the first three are compared
        ((10.4, 10.3, 10.2015), True),
        ((10.4, float("nan"), 10.2), True),
        ((10.4, 10.3), True),
        ((), True),
    ],
)
def test_a_row_with_other_losses_is_void(checks, void):
    group = a_group(Program("ours", ()))
    reason = void_reason(group, [record(1.0)], [record(1.0, checks)])
    assert (reason is not None) == void
    shown = group_rows(
        a_group(Program("ours", ()), Peer(Program("it", ()), 1.0)), {"ours": [record(1.0)], "it": [record(1.0, checks)]}
    )
    assert ("void" in shown[1]) == void
    assert ("speed >= 1: yes" in shown[1]) != void


def test_relative_tolerance():
    group = a_group(Program("ours", ()), relative=True)
    assert void_reason(group, [record(1.0, [5e-3])], [record(1.0, [5.004e-3])]) is None
    assert void_reason(group, [record(1.0, [5e-3])], [record(1.0, [5.01e-3])]) is not None


def test_a_program_that_fails_is_a_row_that_says_so(tmp_path):
    order = tmp_path / "order.txt"
    group = a_group(program("ours", order, record(2.0)), Peer(program("it", order, "fail"), 1.0))
    found = run_group(group, Plan(1, 2, 3), {"ours": sys.executable}, tmp_path)
    row = group_rows(group, found)[1]
    assert "it failed: exit 1: no such option" in row
    assert "yes" not in row


def test_what_a_program_leaves_goes_with_its_record_and_stays_where_it_failed(tmp_path):
    order = tmp_path / "order.txt"
    group = a_group(program("ours", order, record(2.0)), Peer(program("it", order, "fail"), 1.0))
    folders = [tmp_path / f"A_bf16_{name}_0" for name in ("ours", "it")]
    for folder in folders:
        folder.mkdir()
        (folder / "checkpoint").write_text("large")
    run_group(group, Plan(1, 2, 3), {"ours": sys.executable}, tmp_path)
    assert [folder.exists() for folder in folders] == [False, True]


def test_share_of_the_machines_matmul_rate():
    rows = group_rows(a_group(Program("ours", ())), {"ours": [record(2.0, matmul=1024.0)]})
    assert "| 512 | 50% |" in rows[0]  # 2,048 tokens per CPU second x 250 MFLOP, of 1,024 GFLOP


def test_the_table_replaces_what_stands_between_the_markers(tmp_path):
    document = tmp_path / "performance.md"
    begin, end = markers()
    document.write_text(f"before\n{begin}\nold\n{end}\nafter\n")
    group = a_group(Program("ours", ()))
    put_between_markers(document, tables([group], {group.key: {"ours": [record(2.0)]}}, {"A": "dense", "B": "experts"}))
    text = document.read_text()
    assert text.startswith("before\n") and text.endswith("after\n")
    assert "### A: dense" in text and "### B" not in text and "old" not in text
    (tmp_path / "other.md").write_text("nothing")
    with pytest.raises(ValueError, match="no line"):
        put_between_markers(tmp_path / "other.md", "")


def test_every_row_can_be_told_apart_and_its_worker_exists():
    found = groups()
    assert len(found) >= 13
    assert len({group.key for group in found}) == len(found)
    modules = set()
    for group in found:
        names = [program.name for program in group.programs]
        assert len(set(names)) == len(names), group.key
        assert group.case in TITLES
        for one in group.programs:
            modules |= {part for part in one.command if part.startswith("benchmarks.workers.")}
    assert len(modules) >= 4
    for module in modules:
        assert (Path(__file__).parents[2] / f"{module.replace('.', '/')}.py").exists(), module


def test_meter_counts_from_the_start_of_the_process(tmp_path, monkeypatch):
    meter = Meter()
    meter.mark(1.0)
    meter.mark(2.0)
    monkeypatch.setenv("BENCH_OUTPUT", str(tmp_path / "record.json"))
    write_record(meter.record())
    found = json.loads((tmp_path / "record.json").read_text())
    assert found["checks"] == [1.0, 2.0]
    first, second = found["units"]
    assert first["cpu"] > second["cpu"] >= 0 and first["wall"] > second["wall"]
    assert found["memory_mib"] == pytest.approx(peak_memory(), rel=0.5)


def test_a_limit_of_ours_is_an_aim_too():
    group = a_group(Program("ours", ()), limit=1.5)
    assert group_rows(group, {"ours": [record(2.0)]})[0].endswith("| CPU-s <= 1.5: NO |")
    assert group_rows(group, {"ours": [record(1.0)]})[0].endswith("| CPU-s <= 1.5: yes |")


def test_a_command_is_timed_with_its_children_and_its_exit_code(tmp_path):
    timed = ("{ours}", "-m", "benchmarks.workers.command_time", "--", "{ours}", "-c", "sum(range(200_000))")
    group = a_group(Program("ours", timed), measure="first", warmup=0)
    found = run_group(group, Plan(1, 0, 1), {"ours": sys.executable}, tmp_path)["ours"][0]
    assert found["checks"] == [0.0]
    assert 0 < found["units"][0]["cpu"] < 60

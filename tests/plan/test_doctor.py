from __future__ import annotations

import json
import stat
import time

import pytest
from helpers import cli

from llmrecipes.plan import doctor, probes
from llmrecipes.plan.doctor import Probe, examine, worst
from llmrecipes.plan.probes import Finding, Needs


@pytest.fixture
def needs(tmp_path) -> Needs:
    return Needs(run_root=tmp_path / "runs", timeout=60)


def test_one_probe_may_fail_and_another_hang(needs):
    def breaks(needs):
        raise RuntimeError("no such thing")

    asked = (
        Probe("breaks", breaks),
        Probe("hangs", lambda needs: time.sleep(3600)),
        Probe("well", lambda needs: [Finding("ok", "fine")]),
    )
    found = examine(needs, 0.5, asked)
    assert list(found) == ["breaks", "hangs", "well"]
    assert "no such thing" in found["breaks"][0].what and "no answer within" in found["hangs"][0].what
    assert found["well"] == [Finding("ok", "fine")]
    assert worst(found) == "warn"


def test_a_machine_with_and_without_a_compiler(needs, tmp_path, monkeypatch):
    """What stopped the author of the source documents: a missing g++."""
    folder = tmp_path / "bin"
    folder.mkdir()
    monkeypatch.setenv("PATH", str(folder))
    monkeypatch.delenv("CXX", raising=False)
    (found,) = probes.compiler(needs)
    assert found.state == "warn" and "g++" in found.what and "apt install g++" in found.do
    (found,) = probes.compiler(Needs(needs.run_root, compiles=True))
    assert found.state == "block"
    fake = folder / "g++"
    fake.write_text("#!/bin/sh\nexit 0\n")
    fake.chmod(fake.stat().st_mode | stat.S_IXUSR)
    assert probes.compiler(needs)[0].state == "ok"
    fake.write_text("#!/bin/sh\necho 'no header vector' >&2\nexit 1\n")
    (found,) = probes.compiler(needs)
    assert found.state == "warn" and "no header vector" in found.what
    monkeypatch.setenv("CXX", "/nowhere/c++")
    assert "cannot be run" in probes.compiler(needs)[0].what


def test_the_disk(needs, tmp_path, monkeypatch):
    states = [finding.state for finding in probes.disk(needs)]
    assert len(states) == 2 and "block" not in states
    assert probes.disk(Needs(needs.run_root, checkpoint=1e18))[0].state == "block"
    (tmp_path / "file").write_text("")
    assert "not a folder" in probes.disk(Needs(tmp_path / "file"))[0].what

    def refuse(**options):
        raise PermissionError(13, "Permission denied")

    monkeypatch.setattr(probes.tempfile, "TemporaryFile", refuse)
    (found,) = probes.disk(needs)
    assert found.state == "block" and "Permission denied" in found.what


def test_interfaces_that_are_not_there(needs, monkeypatch):
    monkeypatch.setattr(probes, "_ask", lambda name, timeout: {})
    for variable, value, wrong in (
        ("GLOO_SOCKET_IFNAME", "nosuch0", True),
        ("GLOO_SOCKET_IFNAME", "lo", False),
        ("NCCL_SOCKET_IFNAME", "^lo", False),
        ("NCCL_SOCKET_IFNAME", "l", False),  # NCCL takes prefixes
        ("NCCL_SOCKET_IFNAME", "=l", True),
    ):
        monkeypatch.setenv(variable, value)
        blocked = any(f.state == "block" and variable in f.what for f in probes.network(needs))
        assert blocked == wrong, (variable, value)
        monkeypatch.delenv(variable)


def test_slurm(needs, monkeypatch):
    for name in ("SLURM_JOB_ID", "SLURM_PROCID", "SLURM_JOB_NAME"):
        monkeypatch.delenv(name, raising=False)
    assert probes.slurm(needs)[0].state == "ok"
    for name, value in {"JOB_ID": "7", "NNODES": "3", "NTASKS": "5", "JOB_NAME": "bash"}.items():
        monkeypatch.setenv(f"SLURM_{name}", value)
    found = probes.slurm(Needs(needs.run_root, ranks=24))
    assert [f.state for f in found] == ["ok", "block", "warn", "warn"] and "--ntasks=24" in found[1].do
    monkeypatch.setenv("SLURM_NTASKS", "24")
    monkeypatch.setenv("SLURM_PROCID", "0")
    monkeypatch.setenv("SLURM_JOB_NAME", "train")
    assert [f.state for f in probes.slurm(Needs(needs.run_root, ranks=24))] == ["ok"]


@pytest.mark.parametrize(
    ("said", "needs_gpu", "state", "word"),
    [
        ("ImportError: libcuda", False, "block", "libcuda"),
        (f"{probes._LATE} (5 s)", True, "warn", "no answer"),
        ({"cuda": "12.8", "gpus": []}, True, "block", "too old"),
        ({"cuda": "12.8", "gpus": []}, False, "warn", "too old"),
        ({"cuda": None, "gpus": []}, True, "block", "CPU build"),
        ({"cuda": None, "gpus": []}, False, "ok", ""),
        ({"cuda": "12.8", "gpus": [{"name": "V100", "memory": 2**34, "capability": "7.0"}]}, True, "warn", "no bf16"),
        ({"cuda": "12.8", "gpus": [], "flash_attn": "broken: undefined symbol"}, False, "warn", "undefined symbol"),
    ],
)
def test_torch_and_its_driver(said, needs_gpu, state, word, tmp_path, monkeypatch):
    whole = {"torch": "2.13", "threads": 2, "flash_attn": None, "nccl": None}
    monkeypatch.setattr(probes, "_ask", lambda name, timeout: said if isinstance(said, str) else whole | said)
    monkeypatch.setattr(probes, "_driver_version", lambda: (470, 82))
    found = probes.torch(Needs(tmp_path, gpu=needs_gpu))
    assert worst({"torch": found}) == state
    assert word in " ".join(f.what for f in found)


def test_a_process_that_is_asked_may_crash(monkeypatch):
    monkeypatch.setattr(probes.sys, "executable", "/bin/false")
    assert probes._ask("torch", 20) == "exit code 1"


def test_tokenizer(needs, tmp_path):
    assert probes.tokenizer(needs)[0].state == "ok"
    (found,) = probes.tokenizer(Needs(needs.run_root, tmp_path / "none"))
    assert found.state == "block" and "no such folder" in found.what


def test_the_command(tmp_path, monkeypatch, capsys):
    fine, bad = (
        Probe("a", lambda n: [Finding("ok", "fine")]),
        Probe("b", lambda n: [Finding("block", "bad", "mend it")]),
    )
    monkeypatch.setattr(doctor.examine, "__defaults__", ((fine,),))
    assert cli("doctor") == 0
    monkeypatch.setattr(doctor.examine, "__defaults__", ((fine, bad),))
    assert cli("doctor", "--run_root", tmp_path) == 1
    shown = capsys.readouterr().out
    assert "BLOCK b          bad" in shown and "-> mend it" in shown
    assert cli("doctor", "--json") == 1
    said = json.loads(capsys.readouterr().out)
    assert said["state"] == "block" and said["probes"]["b"] == [{"state": "block", "what": "bad", "do": "mend it"}]

"""Alarms of a run, told once each; on folders that a run could have left."""

from __future__ import annotations

import json
import os
import subprocess
import sys
import threading
import time
from http.server import BaseHTTPRequestHandler, HTTPServer

import pytest
import yaml
from helpers import cli

from llmrecipes.distributed.judge import Beat
from llmrecipes.distributed.rank_status import RankStatus
from llmrecipes.errors import UserError
from llmrecipes.watch.alarms import alarms
from llmrecipes.watch.commands import Watch, watch
from llmrecipes.watch.reading import Reader
from llmrecipes.watch.view import duration, sparkline, view
from llmrecipes.watch.webhook import Webhook

NOW = 2_000_000_000.0


def record(step, loss=2.0, **more):
    """A step of 1 s with 100 tokens, logged every 10."""
    return {
        "step": step,
        "tokens": 100 * step,
        "loss": loss,
        "grad_norm": 1.0,
        "lr": 1e-3,
        "tokens_per_second": 100.0,
    } | more


@pytest.fixture
def run(tmp_path):
    folder = tmp_path / "small"
    folder.mkdir()
    (folder / "recipe.yaml").write_text(yaml.safe_dump({"name": "small", "trainer": {"max_steps": 1000}}))
    write(folder, [record(10 * i, 4 / i) for i in range(1, 21)])
    return folder


def write(folder, records, at=NOW):
    path = folder / "metrics.jsonl"
    path.write_text("".join(json.dumps(r) + "\n" for r in records))
    os.utime(path, (at, at))


def kinds(folder, now=NOW, **limits):
    return [alarm.kind for alarm in alarms(Reader(folder).read(), now, **limits)]


def test_a_healthy_run_has_no_alarm(run):
    state = Reader(run).read()
    assert (state.step, state.max_steps, state.seconds_per_step, state.seconds_per_record) == (200, 1000, 1.0, 10.0)
    assert kinds(run, NOW + 60, min_free=0) == []
    shown = "\n".join(view(state, [], NOW))
    assert (
        "step 200 of 1,000 (20.0%)" in shown
        and "about 13 min left" in shown
        and "loss 0.2000" in shown
        and "tok/s 100" in shown
    )


def test_stall_is_ten_times_the_usual(run):
    assert kinds(run, NOW + 119, min_free=0) == [] and kinds(run, NOW + 121, min_free=0) == ["stall"]
    write(run, [record(1000 * i, tokens=100_000 * i) for i in range(1, 21)])  # a record every 1000 s
    assert kinds(run, NOW + 9_990, min_free=0) == [] and kinds(run, NOW + 10_010, min_free=0) == ["stall"]
    assert kinds(run, NOW + 31, stall=30, min_free=0) == ["stall"]
    (run / "DONE").write_text("{}")
    assert kinds(run, NOW + 99_999, min_free=0) == []  # done is not stalled
    (run / "DONE").unlink()
    (run / ".lock").write_text("4194304999")
    (alarm,) = alarms(Reader(run).read(), NOW + 99_999, min_free=0)
    assert "4194304999 is not on this machine" in alarm.message


def test_numbers_that_are_none_and_spikes(run):
    records = [record(10 * i) for i in range(1, 21)]
    write(run, [*records, record(210, None)])
    assert kinds(run, min_free=0) == ["not_finite"]
    write(run, [*records, *(record(10 * i) for i in range(22, 80))])  # long ago
    assert kinds(run, min_free=0) == []
    events = [{"step": 300, "event": "spike", "reason": "loss 9"}, {"step": 700, "event": "spike", "reason": "loss 8"}]
    (run / "events.jsonl").write_text("".join(json.dumps(e) + "\n" for e in events) + '{"torn')
    (alarm,) = alarms(Reader(run).read(), NOW, min_free=0)
    assert alarm.kind == "spike" and alarm.message.startswith("step 700: loss 8") and "2 of them" in alarm.message


@pytest.mark.parametrize(
    ("waits", "slow"),
    [
        ([0.9, 0.1, 0.92, 0.9], "rank 1"),
        ([0.9, 0.85, 0.9, 0.8], None),
        ([0.1, 0.1, 0.1, 0.2], None),
        ([0.05, 0.9], "rank 0"),
    ],
)
def test_the_rank_that_never_waits_is_the_slow_one(run, waits, slow):
    status = RankStatus(run / "ranks.json", every=0.0)
    names = [f"rank {i} (pid 1 on host)" for i in range(len(waits))]
    for second in range(40):
        status(names, [Beat(step=7, phase=2, waits=second % 20 < 20 * share) for share in waits])
    found = alarms(Reader(run).read(), time.time(), stall=1e18, min_free=0)
    assert [alarm.kind for alarm in found] == ["slow_rank"] * (slow is not None)
    assert slow is None or slow in found[0].message
    assert kinds(run, time.time() + 100, stall=1e18, min_free=0) == []  # an old file says nothing


def test_disk(run):
    place = run / "checkpoints" / "step=000200"
    place.mkdir(parents=True)
    (place / "manifest.json").write_text("{}")
    with (place / "model.safetensors").open("wb") as file:
        file.truncate(1000)
    state = Reader(run).read()
    assert state.checkpoint == "step=000200" and state.checkpoint_bytes == 1002
    state.free = 2003
    assert alarms(state, NOW) != [] and alarms(state, NOW)[0].kind == "disk"
    state.free = 2004
    assert alarms(state, NOW) == []


def test_only_what_is_new_is_read_and_a_rewound_file_from_its_beginning(run):
    reader = Reader(run)
    assert reader.read().step == 200
    with (run / "metrics.jsonl").open("a") as file:
        file.write(json.dumps(record(210)) + "\n" + json.dumps(record(220))[:20])
    assert reader.read().step == 210
    with (run / "metrics.jsonl").open("a") as file:
        file.write(json.dumps(record(220))[20:] + "\n")
    state = reader.read()
    assert state.step == 220 and len(state.steps) == 22
    write(run, [record(10)])
    assert [r["step"] for r in reader.read().steps] == [10]


class Hook(BaseHTTPRequestHandler):
    def do_POST(self):
        self.server.got.append(json.loads(self.rfile.read(int(self.headers["Content-Length"]))))
        self.send_response(self.server.status)
        self.end_headers()

    def log_message(self, *_):
        pass


@pytest.fixture
def hook():
    server = HTTPServer(("127.0.0.1", 0), Hook)
    server.got, server.status = [], 200
    threading.Thread(target=server.serve_forever, daemon=True).start()
    server.url = f"http://127.0.0.1:{server.server_address[1]}/T0/secret-token"
    yield server
    server.shutdown()
    server.server_close()


def test_an_alarm_is_told_once_and_so_is_its_end(run, hook, capsys):
    watched = Watch([Reader(run)], min_free=0, webhook=Webhook(hook.url))
    for now in (NOW, NOW + 500, NOW + 600):
        watched.look(now)
    write(run, [record(10 * i) for i in range(1, 30)], NOW + 700)
    watched.look(NOW + 700)
    assert [(m["alarm"], m["status"], m["step"]) for m in hook.got] == [("stall", "alarm", 200), ("stall", "over", 290)]
    assert hook.got[0]["text"] == hook.got[0]["content"] and hook.got[0]["run"] == "small"
    hook.status = 500
    watched.look(NOW + 5000)
    assert "webhook on 127.0.0.1: HTTP 500" in capsys.readouterr().err
    with pytest.raises(UserError) as caught:
        Webhook("ftp://host/secret-token")
    assert "secret-token" not in str(caught.value)


def test_the_command_ends_when_the_run_is_done(run, hook, capsys, monkeypatch):
    monkeypatch.setenv("LLMRECIPES_WEBHOOK", hook.url)
    slept = []

    def sleep(seconds):
        slept.append(seconds)
        if len(slept) == 3:
            write(run, [record(1000)])
            (run / "DONE").write_text("{}")

    words = [str(run), "--every", "2", "--min_free_gb", "0"]
    assert watch(words, sleep, lambda: NOW + 500) == 0
    out = capsys.readouterr().out
    assert slept == [2.0] * 3 and out.count("ALARM stall") == 1 and "done" in out
    assert [m["status"] for m in hook.got] == ["alarm", "over"]


def test_exit_codes(run, tmp_path, capsys):
    write(run, [record(10 * i) for i in range(1, 21)], time.time())
    assert cli("watch", run, "--once", "--min_free_gb", "0") == 0
    write(run, [record(10, None)], time.time())
    assert cli("watch", run, "--once", "--min_free_gb", "0", "--json") == 1
    assert json.loads(capsys.readouterr().out.splitlines()[-1])["alarms"][0]["kind"] == "not_finite"
    assert cli("watch", run, "--once", "--min_free_gb", "0", "--ignore", "not_finite") == 0
    assert cli("watch", run, "--until_alarm") == 1
    assert cli("watch", tmp_path / "none", tmp_path) == 2
    assert capsys.readouterr().err.count("no run folder") == 2


def test_it_imports_neither_torch_nor_lightning(run):
    code = "import sys; from llmrecipes.cli import main; main(['watch', sys.argv[1], '--once']); "
    code += "print([m for m in ('torch', 'lightning', 'matplotlib') if m in sys.modules])"
    done = subprocess.run([sys.executable, "-c", code, str(run)], capture_output=True, text=True, timeout=300)
    assert done.stdout.splitlines()[-1] == "[]", done.stdout + done.stderr


def test_little_things():
    assert sparkline([0, 1, 2, 3, 4, 5, 6, 7], 60) == "▁▂▃▄▅▆▇█" and len(sparkline(list(range(1000)), 60)) == 60
    assert [duration(s) for s in (5, 300, 20_000, 400_000)] == ["5 s", "5 min", "5.6 h", "4.6 d"]

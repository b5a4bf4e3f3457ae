"""Tokenizing: the same bytes however it is run, killed and restarted; nothing half-written; mistakes named."""

import itertools
import json
import os
import signal
import subprocess
import sys
import time
from pathlib import Path

import numpy as np
import pytest

from data_prep.jsonl import documents
from data_prep.parts import Part, Parts
from data_prep.tokenize import tokenize
from llmrecipes.data.manifest import Manifest
from llmrecipes.data.shards import IndexedShard, shard_files
from llmrecipes.data.tokenizer import Tokenizer
from llmrecipes.data.verify import verify
from llmrecipes.errors import UserError

RUN = """
import json, sys
from data_prep.tokenize import tokenize
if __name__ == "__main__":
    tokenize(**json.loads(sys.argv[1]))
"""


def contents(prefix):
    return [path.read_bytes() for path in shard_files(prefix)]


@pytest.fixture
def source(corpus):
    return [str(corpus / "ja_towns.jsonl"), str(corpus / "en_people.jsonl")]


def test_every_document_comes_back(source, tokenizer, tmp_path):
    tokenize(source, str(tokenizer), str(tmp_path / "deep" / "all"), workers=1, chunk_bytes=20_000)
    prefix = tmp_path / "deep" / "all"
    shard, pieces, texts = IndexedShard(prefix), Tokenizer(tokenizer), [t for s in source for t in documents(Path(s))]
    assert shard.num_documents == len(texts) == 172
    for number, text in enumerate(texts):
        start, end = shard.document_range(number, number + 1)
        *ids, last = shard.read(start, end).tolist()
        assert last == pieces.eos_id == 2
        assert ids == pieces.encode(text) and pieces.decode(ids) == text
    assert not verify(prefix, full=True)
    manifest = Manifest.read(prefix)
    assert manifest.num_characters == sum(map(len, texts))
    assert manifest.tokenizer_sha256 == pieces.sha256 and manifest.vocab_size == 1200 and manifest.dtype == "uint16"
    assert [entry["name"] for entry in manifest.sources] == ["ja_towns.jsonl", "en_people.jsonl"]
    assert sorted(path.name for path in prefix.parent.iterdir()) == ["all.bin", "all.idx", "all.json"]


def test_bytes_depend_neither_on_workers_nor_on_a_restart(source, tokenizer, tmp_path):
    options = {"input": source, "tokenizer": str(tokenizer), "chunk_bytes": 20_000}
    tokenize(**options, output=str(tmp_path / "one"), workers=1)
    subprocess.run(
        [sys.executable, "-c", RUN, json.dumps({**options, "output": str(tmp_path / "two"), "workers": 2})], check=True
    )
    assert contents(tmp_path / "one") == contents(tmp_path / "two")


@pytest.mark.parametrize(("workers", "after"), [(1, 2), (2, 5)])
def test_kill_leaves_nothing_and_the_next_run_goes_on(tokenizer, tmp_path, write_jsonl, workers, after, capsys):
    source = write_jsonl("long.jsonl", [f"文書{n}。\n" + "とても長い文章である。" * 400 for n in range(300)])
    options = {"input": [source], "tokenizer": str(tokenizer), "chunk_bytes": 50_000, "workers": workers}
    tokenize(**{**options, "workers": 1}, output=str(tmp_path / "whole"))
    prefix = tmp_path / "killed"
    process = subprocess.Popen([sys.executable, "-c", RUN, json.dumps({**options, "output": str(prefix)})])
    parts = Path(f"{prefix}.parts")
    deadline = time.monotonic() + 60
    while len(list(parts.glob("*.npz"))) < after:
        assert process.poll() is None and time.monotonic() < deadline, "ended before it could be killed"
        time.sleep(0.0005)
    os.kill(process.pid, signal.SIGKILL)
    process.wait()
    assert not any(path.exists() for path in shard_files(prefix))
    done = {path.name: path.stat().st_mtime_ns for path in parts.glob("*.npz")}
    (parts / ".000099.npz.1.tmp").write_bytes(b"half a part")
    capsys.readouterr()
    tokenize(**{**options, "workers": 1}, output=str(prefix))
    assert "parts of an earlier run used" in capsys.readouterr().out
    assert len(done) >= after
    assert contents(prefix) == contents(tmp_path / "whole")
    assert not parts.exists()


def test_finished_parts_are_not_made_again(source, tokenizer, tmp_path, monkeypatch):
    import data_prep.tokenize as module

    made = []
    original = module.encode_part

    def stop_at_third(chunk, file, *rest):
        if len(made) == 3:
            raise KeyboardInterrupt
        made.append(file.name)
        original(chunk, file, *rest)

    monkeypatch.setattr(module, "encode_part", stop_at_third)
    options = {"input": source, "tokenizer": str(tokenizer), "chunk_bytes": 15_000, "workers": 1}
    with pytest.raises(KeyboardInterrupt):
        tokenize(**options, output=str(tmp_path / "a"))
    monkeypatch.setattr(
        module, "encode_part", lambda chunk, file, *rest: (made.append(file.name), original(chunk, file, *rest))
    )
    damaged = tmp_path / "a.parts" / "000001.npz"
    damaged.write_bytes(damaged.read_bytes()[:-30])  # a full disk, say
    tokenize(**options, output=str(tmp_path / "a"))
    again = [name for name, same in itertools.groupby(sorted(made)) if len(list(same)) > 1]
    assert again == ["000001.npz"]
    assert not verify(tmp_path / "a", full=True)


def test_a_damaged_part_is_found_when_it_is_read(tmp_path):
    part = Part(np.arange(500, dtype="<u2"), np.array([500]), np.array([900]), 1000, 0)
    with Parts(tmp_path / "x", "key", overwrite=False) as parts:
        part.save(parts.file(0))
        content = bytearray(parts.file(0).read_bytes())
        content[content.index(np.arange(500, dtype="<u2").tobytes()) + 100] ^= 1
        parts.file(0).write_bytes(content)
        assert parts.has(0)
        with pytest.raises(UserError, match="damaged and removed; run the same command again"):
            list(parts.read(1))
        assert not parts.has(0)


def test_same_again_is_already_there_and_other_options_are_refused(source, tokenizer, tmp_path, capsys):
    prefix = str(tmp_path / "a")
    tokenize(source, str(tokenizer), prefix, workers=1)
    before = contents(prefix)
    capsys.readouterr()
    tokenize(source, str(tokenizer), prefix, workers=1)
    assert "already there: 172 documents" in capsys.readouterr().out
    with pytest.raises(UserError, match=r"a.bin: exists and was made of other inputs or with other options"):
        tokenize(source[:1], str(tokenizer), prefix, workers=1)
    assert contents(prefix) == before
    tokenize(source[:1], str(tokenizer), prefix, workers=1, overwrite=True)
    assert IndexedShard(prefix).num_documents == 108
    Path(f"{prefix}.json").unlink()
    with pytest.raises(UserError, match=r"a.bin: exists and was not made by this command"):
        tokenize(source[:1], str(tokenizer), prefix, workers=1)


def test_parts_of_another_job_are_refused(tmp_path):
    with Parts(tmp_path / "x", "one", overwrite=False):
        second = Parts(tmp_path / "x", "one", overwrite=False)
        with pytest.raises(UserError, match="another process is making"):
            second.__enter__()
    with (
        pytest.raises(UserError, match="begun with other inputs or options"),
        Parts(tmp_path / "x", "two", overwrite=False),
    ):
        pass
    part = Part(np.arange(3, dtype="<u2"), np.array([3]), np.array([2]), 5, 0)
    with Parts(tmp_path / "x", "one", overwrite=False) as parts:
        part.save(parts.file(0))
    with Parts(tmp_path / "x", "two", overwrite=True) as parts:
        assert parts.num_done() == 0


def test_a_broken_line_stops_everything(tokenizer, tmp_path, write_jsonl):
    source = write_jsonl("a.jsonl", ["よい文書"] * 1000)
    with Path(source).open("a") as file:
        file.write('{"body": "x"}\n')
    for workers in (1, 2):
        with pytest.raises(UserError, match=r"a.jsonl:1001: no field 'text' \(fields here: body\)"):
            tokenize([source], str(tokenizer), str(tmp_path / "a"), workers=workers, chunk_bytes=5000)
        assert not any(path.exists() for path in shard_files(tmp_path / "a"))


def test_output_dir_makes_one_shard_for_each_input(source, tokenizer, tmp_path, write_jsonl, capsys):
    extra = write_jsonl("ja_novel.jsonl", ["吾輩は猫である。", "", " \n", "名前はまだ無い。"])
    tokenize([*source, extra], str(tokenizer), output_dir=str(tmp_path / "shards"), workers=1)
    assert {path.stem for path in (tmp_path / "shards").iterdir()} == {"ja_towns", "en_people", "ja_novel"}
    assert "2 empty documents left out" in capsys.readouterr().out
    clash = tmp_path / "other"
    clash.mkdir()
    (clash / "ja_novel.jsonl").write_text('{"text": "x"}\n')
    with pytest.raises(UserError, match="would both become 'ja_novel'"):
        tokenize([extra, str(clash / "ja_novel.jsonl")], str(tokenizer), output_dir=str(tmp_path / "shards"))


def test_mistakes(source, tokenizer, tmp_path):
    with pytest.raises(UserError, match="say either --output PREFIX"):
        tokenize(source, str(tokenizer))
    with pytest.raises(UserError, match="is a folder; name a prefix such as"):
        tokenize(source, str(tokenizer), str(tmp_path))
    with pytest.raises(UserError, match="--workers 0"):
        tokenize(source, str(tokenizer), str(tmp_path / "a"), workers=0)
    with pytest.raises(UserError, match="no document to write"):
        (tmp_path / "empty.jsonl").write_text('{"text": ""}\n')
        tokenize([str(tmp_path / "empty.jsonl")], str(tokenizer), str(tmp_path / "a"), workers=1)

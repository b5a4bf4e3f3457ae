"""Helpers of the tests of stages: recipes from keywords, JSONL written and read."""

import gzip
import hashlib
import json
from pathlib import Path

import zstandard

from data_prep.commands import STAGES
from data_prep.frame.config import read_config


def run_stage(name, **values):
    """Runs a stage as the command line would, with lists and mappings as JSON."""
    stage = STAGES[name]
    kind = getattr(__import__(stage.module, fromlist=["_"]), stage.recipe)
    words = []
    for key, value in values.items():
        text = value if isinstance(value, str) else json.dumps(value, ensure_ascii=False, default=str)
        words += [f"--{key.replace('__', '.')}={text}"]
    stage.load()(read_config(kind, words))


def write(path: Path, texts, **fields):
    """A JSONL file of texts (or of whole records, or of raw bytes)."""
    path.parent.mkdir(parents=True, exist_ok=True)
    lines = []
    for text in texts:
        if isinstance(text, bytes):
            lines.append(text)
        else:
            record = text if isinstance(text, dict) else {"text": text, **fields}
            lines.append(json.dumps(record, ensure_ascii=False).encode())
    path.write_bytes(b"".join(line + b"\n" for line in lines))
    return path


def read(path: Path):
    """The records of a JSONL file, or of all JSONL files of a folder in order of their names."""
    if path.is_dir():
        files = sorted(p for p in path.rglob("*.jsonl*") if ".done" not in p.parts)
        return [record for file in files for record in read(file)]
    data = path.read_bytes()
    if path.suffix == ".zst":
        data = zstandard.ZstdDecompressor().stream_reader(data).read()
    if path.suffix == ".gz":
        data = gzip.decompress(data)
    return [json.loads(line) for line in data.splitlines()]


def texts(path: Path):
    """Their texts."""
    return [record["text"] for record in read(path)]


def manifest(folder: Path):
    """A stage's manifest; that it adds up is checked here once more, by other means."""
    found = json.loads((folder / "manifest.json").read_text())
    documents = found["kept"]["documents"] + sum(flow["documents"] for flow in found["rejected"].values())
    assert documents == found["read"]["documents"]
    characters = found["kept"]["characters"] + sum(flow["characters"] for flow in found["rejected"].values())
    assert characters + sum(cut for _, cut in found["trimmed"].values()) == found["read"]["characters"]
    return found


def hashes(folder: Path):
    """SHA-256 of every file but the marks of finished shards, which hold times."""
    return {
        str(path.relative_to(folder)): hashlib.sha256(path.read_bytes()).hexdigest()
        for path in sorted(folder.rglob("*"))
        if path.is_file() and ".done" not in path.parts
    }

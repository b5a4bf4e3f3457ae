"""Round trip, Megatron's own layout, and every way a shard can be broken: each names the file."""

from __future__ import annotations

import json
import struct
import subprocess
import sys
from pathlib import Path

import numpy as np
import pytest

from llmrecipes.data.manifest import BlockChecksum, Manifest
from llmrecipes.data.shards import HEADER, IndexedShard, ShardWriter
from llmrecipes.data.verify import verify
from llmrecipes.errors import UserError


def write_megatron(prefix: Path, sequences: list[list[int]], marks: list[int], dtype: str, code: int) -> None:
    """The layout by hand, as Megatron's preprocess_data writes it: several sequences per document."""
    np.concatenate([np.array(s, dtype) for s in sequences]).tofile(f"{prefix}.bin")
    size = np.dtype(dtype).itemsize
    ends = np.cumsum([len(s) for s in sequences]) * size
    index = b"MMIDIDX\x00\x00" + struct.pack("<QBQQ", 1, code, len(sequences), len(marks))
    index += struct.pack(f"<{len(sequences)}i", *[len(s) for s in sequences])
    index += struct.pack(f"<{len(sequences)}q", *[0, *ends[:-1].tolist()]) + struct.pack(f"<{len(marks)}q", *marks)
    Path(f"{prefix}.idx").write_bytes(index)


@pytest.mark.parametrize(("vocab", "dtype"), [(1000, "uint16"), (65536, "uint16"), (65537, "int32")])
def test_round_trip(make_shard, vocab, dtype):
    prefix, texts = make_shard(vocab=vocab)
    shard, flat = IndexedShard(prefix), np.concatenate(texts)
    assert shard.dtype.name == dtype and shard.num_documents == len(texts) and shard.num_tokens == len(flat)
    assert (shard.read(0, len(flat)) == flat).all()
    bounds = np.cumsum([0, *map(len, texts)])
    for d, text in enumerate(texts):
        start, stop = shard.document_range(d, d + 1)
        assert (start, stop) == (bounds[d], bounds[d + 1]) and (shard.read(start, stop) == text).all()
    assert verify(prefix) == []
    manifest = Manifest.read(prefix)
    assert manifest is not None and manifest.num_tokens == len(flat) and manifest.max_id == flat.max()


@pytest.mark.parametrize("documents", [1, 2, 1023, 1025, 5000])  # around the 1,024 fences of the search
def test_document_starts(make_shard, documents):
    prefix, texts = make_shard(documents=documents, longest=6)
    shard, starts = IndexedShard(prefix), np.cumsum([0, *map(len, texts)])[:-1]
    rng = np.random.default_rng(1)
    for a, b in np.sort(rng.integers(0, shard.num_tokens + 1, (200, 2))):
        if a < b:
            assert (shard.document_starts_in(a, b) == starts[(starts > a) & (starts < b)]).all()
    every = np.arange(shard.num_tokens)
    assert (shard.documents_at(every) == np.searchsorted(starts, every, side="right") - 1).all()


@pytest.mark.parametrize(("dtype", "code"), [("<i4", 4), ("<u2", 8), ("<i8", 5)])
def test_reads_megatron(tmp_path, dtype, code):
    sequences = [[5, 6], [7], [8, 9, 2], [4, 2], [1], [3, 2]]
    write_megatron(tmp_path / "m", sequences, [0, 3, 4, 6], dtype, code)  # documents of 3, 1 and 2 sequences
    shard = IndexedShard(tmp_path / "m")
    assert shard.num_documents == 3 and shard.num_tokens == 11
    assert [shard.document_range(d, d + 1) for d in range(3)] == [(0, 6), (6, 8), (8, 11)]
    assert shard.document_starts_in(0, 11).tolist() == [6, 8]
    assert shard.read(0, 11).tolist() == [5, 6, 7, 8, 9, 2, 4, 2, 1, 3, 2]
    assert verify(tmp_path / "m", vocab_size=10) == [f"{tmp_path}/m: no manifest: tokenizer and checksums not verified"]
    with pytest.raises(UserError, match=r"m\.bin: id 9 .* vocabulary size 9"):
        verify(tmp_path / "m", vocab_size=9)


def test_empty_documents_are_passed_over(tmp_path):
    write_megatron(tmp_path / "m", [[5, 2], [6, 2]], [0, 1, 2, 2], "<i4", 4)
    with pytest.raises(UserError, match="do not make a shard"):  # more documents than sequences
        IndexedShard(tmp_path / "m")
    write_megatron(tmp_path / "z", [[5, 2], [], [6, 2]], [0, 1, 2, 3], "<i4", 4)
    shard = IndexedShard(tmp_path / "z")
    assert shard.document_range(1, 2) == (2, 2) and shard.document_starts_in(0, 4).tolist() == [2, 2]


def test_truncated_anywhere_names_the_file(make_shard):
    prefix, _ = make_shard(documents=20)
    idx, tokens = Path(f"{prefix}.idx"), Path(f"{prefix}.bin")
    whole_idx, whole_bin = idx.read_bytes(), tokens.read_bytes()
    seen = 0
    for path, whole in ((idx, whole_idx), (tokens, whole_bin)):
        sections = [0, 4, 9, 20, HEADER.size, HEADER.size + 4 * 20, HEADER.size + 12 * 20, len(whole) - 1]
        for length in sections:
            path.write_bytes(whole[:length])
            with pytest.raises(UserError) as error:
                IndexedShard(prefix)
            assert str(path) in str(error.value)
            seen += 1
        path.write_bytes(whole + b"\x00")
        with pytest.raises(UserError, match=f"{path}: too long"):
            IndexedShard(prefix)
        path.write_bytes(whole)
    assert seen == 16
    verify(prefix)


@pytest.mark.parametrize("suffix", [".bin", ".idx"])
def test_any_flipped_byte_is_found(make_shard, suffix):
    prefix, _ = make_shard(documents=20, longest=8)
    path = Path(prefix + suffix)
    whole = path.read_bytes()
    for place in range(len(whole)):
        path.write_bytes(whole[:place] + bytes([whole[place] ^ 1]) + whole[place + 1 :])
        with pytest.raises(UserError, match=r"\.(bin|idx|json): "):
            verify(prefix)
    assert place + 1 == len(whole) > 100


@pytest.mark.parametrize(
    ("head", "message"),
    [
        (b"TNTIDX\x00\x00", "old TNTIDX format"),
        (b"PK\x03\x04zipped", "not a Megatron index"),
        (b"MMIDIDX\x00\x00" + struct.pack("<Q", 2), "index version 2"),
        (b"MMIDIDX\x00\x00" + struct.pack("<QB", 1, 6), "dtype code 6"),
    ],
)
def test_foreign_files(make_shard, head, message):
    prefix, _ = make_shard()
    path = Path(f"{prefix}.idx")
    path.write_bytes(head + path.read_bytes()[len(head) :])
    with pytest.raises(UserError, match=f"{path}: .*{message}"):
        IndexedShard(prefix)


def test_missing_and_multimodal(make_shard):
    with pytest.raises(UserError, match=r"nowhere\.bin: no such file"):
        IndexedShard("nowhere")
    prefix, texts = make_shard()
    path = Path(f"{prefix}.idx")
    path.write_bytes(path.read_bytes() + bytes(len(texts)))
    with pytest.raises(UserError, match="multimodal"):
        IndexedShard(prefix)


def test_broken_manifests(make_shard):
    prefix, _ = make_shard()
    path = Path(f"{prefix}.json")
    good = json.loads(path.read_text())
    for change, message in [
        ({"num_tokens": 5}, "num_tokens is 5"),
        ({"dtype": "int32"}, "dtype is int32"),
        ({"vocab_size": 900}, "max_id 9.. is not below the vocabulary size 900"),
        ({"eos_id": -1}, "eos_id -1"),
        ({"eos_id": 3}, "does not end with EOS"),
        ({"format": 9}, "manifest format 9"),
        ({"bin_crc32": []}, "0 checksums"),
    ]:
        path.write_text(json.dumps(good | change))
        with pytest.raises(UserError, match=message):
            verify(prefix)
    for text in ("{", "[]", '{"format": 1}'):
        path.write_text(text)
        with pytest.raises(UserError, match=f"{path}: "):
            verify(prefix)


def test_large_shards_are_checked_by_blocks(make_shard, monkeypatch):
    monkeypatch.setattr("llmrecipes.data.verify.WHOLE_BYTES", 0)
    prefix, _ = make_shard()
    (note,) = verify(prefix)
    assert note.endswith("of 1 blocks checked")
    assert verify(prefix, full=True) == []


def test_checksum_blocks_do_not_depend_on_the_pieces():
    data = np.random.default_rng(0).bytes(1000)
    wanted = BlockChecksum(64)
    wanted.update(data)
    assert len(wanted.blocks) == 16
    for piece in (1, 7, 64, 65, 999):
        got = BlockChecksum(64)
        for i in range(0, 1000, piece):
            got.update(data[i : i + piece])
        assert got.blocks == wanted.blocks


def test_failure_leaves_nothing(tmp_path):
    with (
        pytest.raises(UserError, match="document 1 has id 10, the vocabulary has 10 ids"),
        ShardWriter(tmp_path / "x", 10, eos_id=2, tokenizer_sha256="t") as writer,
    ):
        writer.add([1, 2])
        writer.add([10, 2])
    with pytest.raises(UserError, match="no document"), ShardWriter(tmp_path / "x", 10, eos_id=2, tokenizer_sha256="t"):
        pass
    assert list(tmp_path.iterdir()) == []


def test_many_documents_at_once_are_the_same_shard(tmp_path):
    draw = np.random.default_rng(1)
    documents = [draw.integers(0, 50, length) for length in draw.integers(1, 40, 200)]
    lengths = np.array([len(ids) for ids in documents])
    with ShardWriter(tmp_path / "one", 50, eos_id=2, tokenizer_sha256="t") as writer:
        for ids in documents:
            writer.add(ids, 3)
    with ShardWriter(tmp_path / "many", 50, eos_id=2, tokenizer_sha256="t") as writer:
        for part in (slice(0, 90), slice(90, 90), slice(90, 200)):
            tokens = np.concatenate([np.zeros(0, int), *documents[part]])
            writer.extend(tokens, lengths[part], 3 * len(lengths[part]))
    for ending in ("bin", "idx", "json"):
        assert (tmp_path / f"one.{ending}").read_bytes() == (tmp_path / f"many.{ending}").read_bytes()
    with (
        pytest.raises(UserError, match="document 3 has id -1, the vocabulary has 50 ids"),
        ShardWriter(tmp_path / "bad", 50, eos_id=2, tokenizer_sha256="t") as writer,
    ):
        writer.add([1])
        writer.extend(np.array([1, 2, 3, 4, -1, 5]), np.array([2, 2, 1, 1]))


def test_needs_no_torch():
    code = "import sys, llmrecipes.data as d; d.ShardWriter, d.Tokenizer; sys.exit('torch' in sys.modules)"
    assert subprocess.run([sys.executable, "-c", code], check=False).returncode == 0

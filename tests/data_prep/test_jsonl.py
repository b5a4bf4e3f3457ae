"""Reading documents: every form of input, every broken one."""

import gzip
import json

import pytest
import zstandard

from data_prep.jsonl import check_inputs, chunks, documents, fingerprint, input_size, parse, stem
from llmrecipes.errors import UserError

TEXTS = ["いろはにほへと\nちりぬるを", "plain text", "  indented\n\ttab", "絵文字 🍣", "last"]


def lines(texts=TEXTS):
    return "".join(json.dumps({"text": text, "lang": "ja"}, ensure_ascii=False) + "\n" for text in texts).encode()


@pytest.fixture
def files(tmp_path):
    content = lines()
    (tmp_path / "a.jsonl").write_bytes(content)
    (tmp_path / "b.jsonl.gz").write_bytes(gzip.compress(content))
    half = len(content) // 2
    frames = zstandard.compress(content[:half]) + zstandard.compress(content[half:])
    (tmp_path / "c.jsonl.zst").write_bytes(frames)
    (tmp_path / "d.jsonl").write_bytes(content.rstrip(b"\n"))
    (tmp_path / "e.jsonl").write_bytes(content.replace(b"\n", b"\r\n"))
    return sorted(tmp_path.iterdir())


def test_every_form_of_file_gives_the_same_documents(files):
    seen = 0
    for path in files:
        assert list(documents(path)) == TEXTS, path.name
        seen += 1
    assert seen == 5


def test_chunks_cover_all_lines_in_order_and_end_at_the_size_of_the_file(files):
    for path in files:
        found = list(chunks(path, chunk_bytes=60))
        assert len(found) > 1
        assert [chunk.first for chunk in found] == [1 + sum(len(c.lines) for c in found[:i]) for i in range(len(found))]
        assert found[-1].position == input_size(path)
        assert [text for chunk in found for text in parse(chunk).texts] == TEXTS


def test_lines_longer_than_a_block(tmp_path):
    texts = ["あ" * 1_500_000, "short", "b" * 2_500_000]
    path = tmp_path / "long.jsonl"
    path.write_bytes(lines(texts))
    assert list(documents(path)) == texts


def test_dataset_folder(tmp_path):
    import datasets

    folder = tmp_path / "set"
    datasets.Dataset.from_dict({"body": [*TEXTS, "", "  \n"], "n": list(range(7))}).save_to_disk(str(folder))
    [chunk] = chunks(folder, "body")
    found = parse(chunk, "body")
    assert (found.texts, found.num_empty) == (TEXTS, 2)
    assert chunk.position == input_size(folder) > 0
    with pytest.raises(UserError, match=r"no column 'text' \(columns: body, n\); use --field"):
        list(documents(folder))


def test_empty_documents_are_counted(tmp_path):
    path = tmp_path / "a.jsonl"
    path.write_bytes(b'{"text": ""}\n\n{"text": " \\n\\u3000"}\n{"text": "x"}\n')
    [chunk] = chunks(path)
    found = parse(chunk)
    assert (found.texts, found.num_empty) == (["x"], 3)


BROKEN = {
    b'{"text": "a"': r"a.jsonl:2: not JSON \(.*column",
    b'{"txt": "a", "id": 1}': r"a.jsonl:2: no field 'text' \(fields here: txt, id\); name the right one with --field",
    b'["a"]': r"a.jsonl:2: a JSON list, but one object a line is expected",
    b'{"text": null}': r"a.jsonl:2: field 'text' is a NoneType, not a string",
    b'{"text": "\xff"}': r"a.jsonl:2: not valid UTF-8",
    b'{"text": "\\ud83d"}': r"a.jsonl:2: not valid UTF-8 \(surrogates not allowed\)",
}


@pytest.mark.parametrize("line", BROKEN)
def test_broken_line_is_named_never_skipped(tmp_path, line):
    path = tmp_path / "a.jsonl"
    path.write_bytes(b'{"text": "good"}\n' + line + b'\n{"text": "good"}\n')
    with pytest.raises(UserError, match=BROKEN[line]):
        list(documents(path))


def test_all_broken_lines_of_a_chunk_at_once(tmp_path):
    path = tmp_path / "a.jsonl"
    path.write_bytes(b'{"text": "good"}\n' + b"{\n" * 30)
    with pytest.raises(UserError) as caught:
        list(documents(path))
    assert len(caught.value.problems) == 21
    assert caught.value.problems[-1].endswith("and 10 more broken lines near here")


@pytest.mark.parametrize("kind", ["gz", "zst"])
@pytest.mark.parametrize("damage", ["truncated", "garbage"])
def test_broken_archive(tmp_path, kind, damage):
    path = tmp_path / f"a.jsonl.{kind}"
    content = lines(TEXTS * 500)
    packed = gzip.compress(content) if kind == "gz" else zstandard.compress(content)
    path.write_bytes(packed[:-20] if damage == "truncated" else b"no archive at all" * 9)
    with pytest.raises(UserError, match=r"broken archive \(.*\); copy or download the file again"):
        list(documents(path))


def test_all_input_problems_at_once(tmp_path):
    (tmp_path / "ja_wiki.jsonl").write_bytes(lines())
    (tmp_path / "folder").mkdir()
    with pytest.raises(UserError) as caught:
        check_inputs([str(tmp_path / name) for name in ("ja_wikki.jsonl", "folder", "ja_wiki.jsonl", "ja_wiki.jsonl")])
    first, second, third = caught.value.problems
    assert "no such file or folder - did you mean" in first and "ja_wiki.jsonl'?" in first
    assert "no dataset written by save_to_disk" in second
    assert "given twice" in third


def test_fingerprint_is_of_the_content(tmp_path):
    one, two, three = (tmp_path / name for name in ("a.jsonl", "b.jsonl", "c.jsonl"))
    one.write_bytes(lines())
    two.write_bytes(lines())
    three.write_bytes(lines()[:-2] + b" \n")
    assert fingerprint(one) == fingerprint(two) != fingerprint(three)


def test_stem(tmp_path):
    names = ["ja_wiki.jsonl.gz", "ja_wiki.jsonl.zst", "ja_wiki.jsonl", "ja_wiki.json", "ja_wiki"]
    assert {stem(tmp_path / name) for name in names} == {"ja_wiki"}

"""Every kind of input becomes the same JSONL."""

import csv

import pytest
from stages import manifest, read, run_stage, texts, write

from data_prep.stages.importing import find_inputs, without_wiki40b_marks
from llmrecipes.errors import UserError

TEXTS = ["一つ目の文書。\n二行目。", "The second document, with a comma.", "三つ目 🍣"]


def test_wiki40b():
    text = (
        "\n_START_ARTICLE_\n東京\n_START_SECTION_\n概要\n_START_PARAGRAPH_\n首都である。_NEWLINE_人口は多い。"
        "\n_START_SECTION_\n歴史\n_START_PARAGRAPH_\n江戸。"
    )
    assert without_wiki40b_marks(text) == "東京\n概要\n首都である。\n人口は多い。\n歴史\n江戸。"


def test_every_kind_gives_the_same_documents(tmp_path):
    import datasets
    import pyarrow
    import pyarrow.parquet

    source = tmp_path / "in"
    source.mkdir()
    table = pyarrow.table({"text": TEXTS, "id": [1, 2, 3], "drop": ["x"] * 3})
    pyarrow.parquet.write_table(table, source / "p.parquet")
    for name, delimiter in (("c.csv", ","), ("t.tsv", "\t")):
        with (source / name).open("w", newline="", encoding="utf-8-sig") as stream:
            rows = csv.writer(stream, delimiter=delimiter)
            rows.writerows([("id", "text", "drop"), *((n, text, "x") for n, text in enumerate(TEXTS, 1))])
    write(source / "j.jsonl", [{"text": text, "id": n} for n, text in enumerate(TEXTS, 1)])
    (source / "x.txt").write_text("\n\n".join(TEXTS) + "\n\n\n")
    datasets.Dataset.from_dict({"text": TEXTS, "id": [1, 2, 3]}).save_to_disk(tmp_path / "folder")
    splits = {"train": TEXTS[:2], "test": TEXTS[2:]}
    both = datasets.DatasetDict({name: datasets.Dataset.from_dict({"text": part}) for name, part in splits.items()})
    both.save_to_disk(tmp_path / "splits")
    run_stage(
        "import",
        input=[str(source), str(tmp_path / "folder"), str(tmp_path / "splits")],
        output=tmp_path / "out",
        columns=["id"],
        add={"license": "CC0"},
    )
    for name in ("p", "c", "t", "j", "x", "folder"):
        records = read(tmp_path / "out" / f"{name}-00000.jsonl.zst")
        assert [record["text"] for record in records] == TEXTS, name
        assert all(record["license"] == "CC0" and "drop" not in record for record in records)
        assert name == "x" or [int(record["id"]) for record in records] == [1, 2, 3]
    assert texts(tmp_path / "out" / "splits-train-00000.jsonl.zst") == TEXTS[:2]
    assert manifest(tmp_path / "out")["kept"]["documents"] == 21


def test_parts_of_one_size(tmp_path):
    write(tmp_path / "a.jsonl", ["x" * 1000] * 25)
    run_stage("import", input=[str(tmp_path / "a.jsonl")], output=tmp_path / "out", shard_mb=0.01)
    sizes = [len(read(file)) for file in sorted((tmp_path / "out").glob("*.zst"))]
    assert sizes == [10, 10, 5]


def test_broken_rows_are_counted(tmp_path):
    (tmp_path / "a.txt").write_bytes(b"good\n\nbad \xff byte\n\n" + b"long " * 300_000 + b"\n\nlast")
    (tmp_path / "b.csv").write_bytes(b'text\ngood\nbad \xff\n""\n')
    (tmp_path / "empty.txt").write_bytes(b"")
    (tmp_path / "empty2.csv").write_bytes(b"")
    run_stage("import", input=[str(tmp_path)], output=tmp_path / ".." / "out-of-broken", max_document_mb=1)
    found = manifest(tmp_path / ".." / "out-of-broken")
    assert {reason: flow["documents"] for reason, flow in found["rejected"].items()} == {
        "invalid_utf8": 2,
        "too_large": 1,
        "empty": 1,
    }
    assert texts(tmp_path / ".." / "out-of-broken") == ["good", "last", "good"]


def test_texts_by_line_and_by_file(tmp_path):
    (tmp_path / "a.txt").write_text("one\ntwo\n\nthree\n")
    for split, expected in (("line", ["one", "two", "three"]), ("file", ["one\ntwo\n\nthree\n"])):
        run_stage("import", input=[str(tmp_path / "a.txt")], output=tmp_path / split, split=split)
        assert texts(tmp_path / split) == expected


def test_mistakes(tmp_path):
    (tmp_path / "a.pdf").write_bytes(b"x")
    (tmp_path / "a.parquet").write_bytes(b"not parquet")
    (tmp_path / "b.csv").write_text("body\nx\n")
    with pytest.raises(UserError) as found:
        find_inputs([str(tmp_path / "a.pdf"), str(tmp_path / "no"), str(tmp_path / "b.csv"), str(tmp_path / "b.csv")])
    assert len(found.value.problems) == 3
    for name, message in (
        ("a.parquet", "not a readable parquet file"),
        ("b.csv", r"no column 'text' \(columns: body\)"),
    ):
        with pytest.raises(UserError, match=message):
            run_stage("import", input=[str(tmp_path / name)], output=tmp_path / f"out-{name}")

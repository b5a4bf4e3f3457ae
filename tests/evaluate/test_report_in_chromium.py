"""The report in a browser: no error, nothing executed that a model wrote, the list of answers filters."""

from __future__ import annotations

import json
import struct
import zlib
from pathlib import Path

import pytest
from chromium import Chromium, find_chromium
from helpers import cli
from test_report import HOSTILE, make_evaluation, make_run

ROWS = 30_000  # 600 pages of the list


@pytest.fixture(scope="module")
def page(tmp_path_factory):
    browser = find_chromium()
    if browser is None:
        pytest.skip("no Chromium here: install it (Debian: chromium), or name it in $CHROMIUM")
    folder = tmp_path_factory.mktemp("browser")
    run = make_run(folder, "tuned")
    make_evaluation(run, ROWS)
    answers = run / "evaluation" / "demo" / "asked" / "answers.jsonl"
    rows = [json.loads(line) for line in answers.read_text().splitlines()]
    for row in rows:
        wrong = row["id"] % 4 == 0
        lang = "ja" if row["id"] % 2 else "en"
        row |= {
            "scores": {"contains": 0.0 if wrong else 1.0},
            "about": {"lang": lang},
            "question": f"Q{row['id']} {HOSTILE}",
        }
    answers.write_text("".join(json.dumps(row, ensure_ascii=False) + "\n" for row in rows))
    assert cli("report", run, "--output", folder / "out", "--title", HOSTILE) == 0
    with Chromium(browser, folder / "profile") as chromium:
        chromium.open((folder / "out" / "report.html").as_uri())
        yield chromium


def shown(page) -> list[list[str]]:
    rows = "[...document.querySelectorAll('#list tr')].map(r => [...r.children].map(c => c.textContent))"
    return page.run(rows)


def test_it_loads_without_an_error_and_asks_nobody(page):
    assert page.console == []
    assert [address for address in page.requests if not address.startswith(("file:", "data:"))] == []
    assert page.run("[...document.images].every(i => i.complete && i.naturalWidth > 100)") is True
    assert page.run("document.images.length") >= 5
    assert page.run("document.querySelector('h1').textContent") == HOSTILE


def test_the_list_shows_one_page_and_turns_it(page):
    assert page.run("document.getElementById('where').textContent") == f"page 1 of {ROWS // 50}"
    first = shown(page)
    assert len(first) == 50 and HOSTILE in first[0][1] and first[0][3] == HOSTILE
    page.run("document.getElementById('after').click()")
    assert len(shown(page)) == 50 and shown(page)[0] != first[0]
    page.run("document.getElementById('before').click()")
    assert shown(page) == first


def test_filters_work_by_hand(page):
    page.type("#words", "Q1234")
    count = page.run("document.getElementById('count').textContent")
    assert count.startswith("11 of 30000 answers")  # Q1234 and Q12340 to Q12349
    assert all("Q1234" in row[1] for row in shown(page))
    page.run("document.getElementById('score').value = 'wrong'")
    page.run("document.getElementById('score').dispatchEvent(new Event('input'))")
    assert sorted(row[0].rpartition("#")[2] for row in shown(page)) == ["12340", "12344", "12348"]
    page.run("document.getElementById('about').value = 'lang: ja'")
    page.run("document.getElementById('about').dispatchEvent(new Event('input'))")
    assert shown(page) == []
    seconds = page.run(
        "(() => { const w = document.getElementById('words'); const t = performance.now();"
        " for (const v of ['a', 'Q2', '']) { w.value = v; w.dispatchEvent(new Event('input')); }"
        " return performance.now() - t; })() / 1000"
    )
    print(f"three filters over {ROWS} answers: {seconds:.3f} s")
    assert page.console == []


def test_the_picture_is_one(page, tmp_path):
    data = page.screenshot(tmp_path / "report.png").read_bytes()
    assert data[:8] == b"\x89PNG\r\n\x1a\n"
    width, height = struct.unpack(">II", data[16:24])
    assert width >= 1000 and height >= 700
    pixels = zlib.decompress(b"".join(chunks(data)))
    assert len(set(pixels)) > 50  # not a blank page


def chunks(data: bytes):
    place = 8
    while place < len(data):
        (size,) = struct.unpack(">I", data[place : place + 4])
        if data[place + 4 : place + 8] == b"IDAT":
            yield data[place + 8 : place + 8 + size]
        place += size + 12


@pytest.fixture
def without_the_policy(page, tmp_path):
    """The mutant: a page that puts answers in as HTML, without the content policy."""
    text = Path(page.run("location.pathname")).read_text(encoding="utf-8")
    cut = text.index('<meta http-equiv="Content-Security-Policy"')
    text = text[:cut] + text[text.index(">", cut) + 1 :]
    text = text.replace("td.textContent = text;", "td.innerHTML = text;")
    (tmp_path / "mutant.html").write_text(text, encoding="utf-8")
    return (tmp_path / "mutant.html").as_uri()


def test_the_mutant_is_noticed(page, without_the_policy):
    page.open(without_the_policy)
    assert ("dialog", "2") in page.console  # what a model wrote was executed
    assert page.run("document.querySelectorAll('#list img').length") > 0

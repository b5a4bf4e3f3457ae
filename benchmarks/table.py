"""The results as a Markdown table, and its place in a document."""

from __future__ import annotations

import statistics
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

from benchmarks.paired import Figures, Group, Peer, Ratio, figures, middle, ratio, void_reason

NAME = "benchmarks"
HEAD = (
    "| settings | program | per CPU-s | per s | CPU-s | peak MiB | GFLOP/CPU-s | of matmul "
    "| ours / it: speed | ours / it: memory | aim |\n"
    "|---|---|---|---|---|---|---|---|---|---|---|"
)


def tables(groups: Sequence[Group], results: Mapping[str, Any], titles: Mapping[str, str]) -> str:
    """One table per case, from the groups that have results."""
    parts = []
    for case, title in titles.items():
        shown = [group for group in groups if group.case == case and group.key in results]
        if shown:
            rows = [row for group in shown for row in group_rows(group, results[group.key])]
            parts.append("\n".join([f"### {case}: {title}", "", HEAD, *rows, ""]))
    return "\n".join(parts)


def group_rows(group: Group, records: Mapping[str, list[dict[str, Any]]]) -> list[str]:
    """Ours, then the peers."""
    ours = records.get(group.ours.name, [])
    rows = [_row(group, group.ours.name, ours, "", "", _limit_text(group, ours))]
    for peer in group.peers:
        theirs = records.get(peer.program.name)
        if theirs is not None:
            rows.append(_peer_row(group, peer, ours, theirs))
    return rows


def _limit_text(group: Group, records: list[dict[str, Any]]) -> str:
    good = [figures(record, group.work, group.measure).cpu for record in records if "error" not in record]
    if group.limit is None or not good:
        return ""
    return f"CPU-s <= {group.limit:g}: {'yes' if statistics.median(good) <= group.limit else 'NO'}"


def _peer_row(group: Group, peer: Peer, ours: list[dict[str, Any]], theirs: list[dict[str, Any]]) -> str:
    rounds = min(len(ours), len(theirs))
    reason = void_reason(group, ours[:rounds], theirs[:rounds]) if rounds else "not run"
    if reason is not None:
        return _row(group, peer.program.name, theirs, f"void: {reason}", "", "")
    a, b = ([figures(r, group.work, group.measure) for r in records[:rounds]] for records in (ours, theirs))
    speed = ratio([one.per_cpu for one in a], [one.per_cpu for one in b])
    memory = ratio([one.memory for one in a], [one.memory for one in b])
    return _row(group, peer.program.name, theirs, _spread(speed), _spread(memory), aim_text(peer, speed, memory))


def aim_text(peer: Peer, speed: Ratio, memory: Ratio) -> str:
    """What was aimed at, and whether the medians reach it."""
    parts = []
    if peer.speed is not None:
        parts.append(f"speed >= {peer.speed:.3g}: {'yes' if speed.median >= peer.speed else 'NO'}")
    if peer.memory is not None:
        parts.append(f"memory <= {peer.memory:.3g}: {'yes' if memory.median <= peer.memory else 'NO'}")
    return "; ".join(parts)


def _spread(found: Ratio) -> str:
    if found.low == found.high:
        return f"{found.median:.2f}"
    return f"{found.median:.2f} ({found.low:.2f}-{found.high:.2f})"


def _row(group: Group, name: str, records: list[dict[str, Any]], speed: str, memory: str, aim: str) -> str:
    good = [figures(record, group.work, group.measure) for record in records if "error" not in record]
    cells = _cells(group, middle(good)) if good else [""] * 6
    if not good and not speed:
        speed = records[0]["error"] if records else "not run"
    return "| " + " | ".join([group.name, name, *cells, speed, memory, aim]) + " |"


def _cells(group: Group, found: Figures) -> list[str]:
    gflops = None if group.flops is None else found.per_cpu * group.flops / 1e9
    share = None if gflops is None or not found.matmul else gflops / found.matmul
    return [
        number(found.per_cpu),
        number(found.per_second),
        f"{found.cpu:.3g}",
        number(found.memory),
        "" if gflops is None else f"{gflops:,.0f}",
        "" if share is None else f"{share:.0%}",
    ]


def number(value: float) -> str:
    """Three digits or more, with separators."""
    return f"{value:,.0f}" if value >= 100 else f"{value:.3g}"


def markers(name: str = NAME) -> tuple[str, str]:
    """The lines of a document between which a program writes."""
    return f"<!-- {name}: begin -->", f"<!-- {name}: end -->"


def put_between_markers(document: Path, text: str, name: str = NAME) -> None:
    """Replace what stands between the markers of a document.

    Raises:
        ValueError: the document has no such markers.
    """
    first, last = markers(name)
    before, begin, rest = document.read_text(encoding="utf-8").partition(first)
    _, end, after = rest.partition(last)
    if not begin or not end:
        raise ValueError(f"{document}: no line {first} followed by {last}")
    document.write_text(f"{before}{first}\n{text}\n{last}{after}", encoding="utf-8")

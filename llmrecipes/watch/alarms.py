"""What is wrong with a run. Pure functions of what was read."""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import dataclass
from statistics import median

from llmrecipes.watch.reading import State

STALL_FLOOR = 120.0  # seconds; validation and checkpoints take their time
STALL_RECORDS = 10.0  # times the usual time between two records
LASTING = 50  # records for which a spike or a loss that is not finite stays an alarm
FRESH = 60.0  # seconds for which ranks.json counts
HEARD = 20  # seconds that a rank must have been heard of
OTHERS_WAIT = 0.5  # share of the time that the others wait, when one is slow,
LESS = 0.4  # and by how much less the slow one does
ROOM = 2  # checkpoints that must fit
SMALLEST_ROOM = 2**30  # bytes, where none was written yet
KINDS = ("stall", "not_finite", "spike", "slow_rank", "disk")


@dataclass(frozen=True)
class Alarm:
    """Something that a person should know.

    Attributes:
        kind: one of :data:`KINDS`.
        message: what, where, and what it may mean.
    """

    kind: str
    message: str


def alarms(state: State, now: float, stall: float | None = None, min_free: int | None = None) -> list[Alarm]:
    """All that is wrong now; nothing with a run that is complete, but for a full disk.

    Args:
        state: of the run.
        now: seconds since 1970.
        stall: seconds without a sign of progress; None = ten times what is usual, two minutes at least.
        min_free: bytes that must be free; None = room for two checkpoints.
    """
    found = [] if state.done else [*_stall(state, now, stall), *_events(state), *_slow_ranks(state, now)]
    return [*found, *_disk(state, min_free)]


def _stall(state: State, now: float, limit: float | None) -> Iterator[Alarm]:
    usual = state.seconds_per_record
    allowed = limit if limit is not None else max(STALL_FLOOR, STALL_RECORDS * (usual or 0.0))
    silent = now - state.touched
    if silent > allowed:
        compared = "" if usual is None else f"; usual is a record every {usual:.0f} s"
        here = f"; its process {state.pid} is not on this machine" if state.pid and not state.alive else ""
        yield Alarm("stall", f"no sign of progress for {silent:.0f} s at step {state.step}{compared}{here}")


def _events(state: State) -> Iterator[Alarm]:
    recent = state.steps[-LASTING:]
    since = recent[0]["step"] if recent else 0
    bad = [r["step"] for r in recent if r["loss"] is None or ("grad_norm" in r and r["grad_norm"] is None)]
    told = [event for event in state.events if event.get("step", 0) >= since]
    said = [event for event in told if event.get("event") in ("not finite", "give up")]
    if bad or said:
        where = said[-1]["step"] if said else bad[-1]
        yield Alarm("not_finite", f"step {where}: {said[-1]['reason'] if said else 'loss or gradient norm not finite'}")
    spikes = [event for event in told if event.get("event") == "spike"]
    if spikes:
        more = f" ({len(spikes)} of them since step {since})" if len(spikes) > 1 else ""
        yield Alarm("spike", f"step {spikes[-1]['step']}: {spikes[-1].get('reason', 'spike')}{more}")


def _slow_ranks(state: State, now: float) -> Iterator[Alarm]:
    if now - state.ranks.get("time", 0.0) > FRESH:
        return
    ranks = [r for r in state.ranks.get("ranks", []) if r.get("heard", 0) >= HEARD and r.get("state") == "running"]
    for number, rank in enumerate(ranks):
        others = [other["waits"] for i, other in enumerate(ranks) if i != number]
        if not others:
            continue
        usual = median(others)
        if usual >= OTHERS_WAIT and rank["waits"] <= usual - LESS:
            yield Alarm(
                "slow_rank",
                f"{rank['rank']} waits {rank['waits']:.0%} of the time, the others {usual:.0%}: they wait for it "
                f"({rank['place']})",
            )


def _disk(state: State, min_free: int | None) -> Iterator[Alarm]:
    needed = min_free if min_free is not None else ROOM * state.checkpoint_bytes or SMALLEST_ROOM
    if state.free < needed:
        size = f"; a checkpoint is {state.checkpoint_bytes / 1e9:.2f} GB" if state.checkpoint_bytes else ""
        yield Alarm("disk", f"{state.free / 1e9:.2f} GB free, {needed / 1e9:.2f} GB are wanted{size}")

"""``llmrecipes watch``: looks at run folders until they are done."""

from __future__ import annotations

import argparse
import json
import os
import sys
import time
from collections.abc import Callable, Sequence
from dataclasses import dataclass, field
from pathlib import Path

from llmrecipes.errors import UserError
from llmrecipes.watch.alarms import KINDS, Alarm, alarms
from llmrecipes.watch.reading import Reader, State
from llmrecipes.watch.view import view
from llmrecipes.watch.webhook import VARIABLE, Webhook

CLEAR = "\x1b[H\x1b[2J"


@dataclass
class Watch:
    """Looks at runs, and tells what is new.

    Args:
        readers: of the runs.
        stall, min_free: see :func:`~llmrecipes.watch.alarms.alarms`.
        ignored: kinds of alarms that are none.
        webhook: where alarms are told, too.
    """

    readers: Sequence[Reader]
    stall: float | None = None
    min_free: int | None = None
    ignored: Sequence[str] = ()
    webhook: Webhook | None = None
    _told: dict[tuple[str, str], Alarm] = field(default_factory=dict)

    def look(self, now: float) -> list[tuple[State, list[Alarm]]]:
        """All runs and what is wrong with them; new alarms, and those that are over, are told to the webhook."""
        found = []
        for reader in self.readers:
            state = reader.read()
            wrong = [a for a in alarms(state, now, self.stall, self.min_free) if a.kind not in self.ignored]
            found.append((state, wrong))
            self._tell(state, wrong)
        return found

    def _tell(self, state: State, wrong: list[Alarm]) -> None:
        present = {alarm.kind: alarm for alarm in wrong}
        for kind in KINDS:
            key = (state.name, kind)
            if kind in present and key not in self._told:
                self._told[key] = present[kind]
                self._post(state, kind, "alarm", present[kind].message)
            elif kind not in present and key in self._told:
                self._post(state, kind, "over", self._told.pop(key).message)

    def _post(self, state: State, kind: str, status: str, message: str) -> None:
        if self.webhook is None:
            return
        text = f"{state.name}: {kind}{' is over' if status == 'over' else ''}: {message}"
        about = {"text": text, "run": state.name, "alarm": kind, "status": status, "step": state.step}
        if reason := self.webhook.post(about):
            print(f"warning: {reason}", file=sys.stderr)


def watch(
    words: list[str], sleep: Callable[[float], object] = time.sleep, clock: Callable[[], float] = time.time
) -> int:
    """``llmrecipes watch RUN...``.

    Args:
        words: as typed.
        sleep, clock: replaced in tests.

    Returns:
        0: the runs are done (with ``--once``: nothing is wrong); 1: an alarm, with ``--once`` or ``--until_alarm``.

    Raises:
        UserError: folders that are no runs.
    """
    args = _parser().parse_args(words)
    address = args.webhook or os.environ.get(VARIABLE)
    limits = _limits(args)
    readers = _readers([Path(name) for name in args.runs])
    watched = Watch(readers, *limits, args.ignore, Webhook(address) if address else None)
    live = sys.stdout.isatty() and not args.once and not args.json
    shown = ""
    try:
        while True:
            now = clock()
            found = watched.look(now)
            text = _as_json(found) if args.json else "\n".join(line for s, a in found for line in view(s, a, now))
            if live:
                print(f"{CLEAR}{text}\n", flush=True)
            elif _without_clock(found) != shown:
                shown = _without_clock(found)
                print(text, flush=True)
            wrong = any(a for _, a in found)
            if args.once or (wrong and args.until_alarm):
                return int(wrong)
            if all(state.done for state, _ in found):
                return 0
            sleep(args.every)
    except KeyboardInterrupt:
        print(file=sys.stderr)
        return 130


def _limits(args: argparse.Namespace) -> tuple[float | None, int | None]:
    if args.every <= 0 or (args.stall is not None and args.stall <= 0):
        raise UserError("--every and --stall are seconds, more than 0")
    return args.stall, None if args.min_free_gb is None else round(args.min_free_gb * 1e9)


def _readers(folders: Sequence[Path]) -> list[Reader]:
    problems, found = list[str](), list[Reader]()
    for folder in folders:
        try:
            found.append(Reader(folder))
        except UserError as error:
            problems += error.problems
    if problems:
        raise UserError(*problems)
    return found


def _as_json(found: Sequence[tuple[State, list[Alarm]]]) -> str:
    runs = [
        {
            "run": state.name,
            "step": state.step,
            "max_steps": state.max_steps,
            "done": state.done,
            "loss": state.steps[-1]["loss"] if state.steps else None,
            "alarms": [{"kind": alarm.kind, "message": alarm.message} for alarm in wrong],
        }
        for state, wrong in found
    ]
    return "\n".join(json.dumps(run, ensure_ascii=False) for run in runs)


def _without_clock(found: Sequence[tuple[State, list[Alarm]]]) -> str:
    """What must change before a log file gets another line: not how long ago something was."""
    return repr([(s.step, s.done, s.checkpoint, s.validation.get("step"), [a.kind for a in w]) for s, w in found])


def _parser() -> argparse.ArgumentParser:
    parser = argparse.ArgumentParser(
        prog="llmrecipes watch",
        description="Shows runs while they train, and alarms: stall (no sign of progress), not_finite, spike,\n"
        "slow_rank (the others wait for it) and disk. Reads the run folders only, on any machine that sees them.",
        epilog="llmrecipes watch runs/moe_pretrain --webhook https://hooks.example/...\n"
        "llmrecipes watch runs/* --once || mail -s 'training' me@lab < /dev/null\n\n"
        "Exit code: 0 the runs are done (--once: nothing is wrong), 1 an alarm (--once, --until_alarm), 2 a mistake.",
        allow_abbrev=False,
        formatter_class=argparse.RawDescriptionHelpFormatter,
    )
    add = parser.add_argument
    add("runs", nargs="+", metavar="RUN", help="run folder")
    add("--every", type=float, default=5.0, metavar="SECONDS", help="between two looks (default: 5)")
    add("--once", action="store_true", help="look once; the exit code says whether something is wrong")
    add("--until_alarm", action="store_true", help="end with 1 at the first alarm")
    add("--stall", type=float, metavar="SECONDS", help="without progress (default: 10 x usual, 120 at least)")
    add("--min_free_gb", type=float, metavar="GB", help="of disk (default: room for two checkpoints)")
    add("--ignore", action="append", default=[], choices=KINDS, help="a kind of alarm; repeat it for more")
    add("--webhook", metavar="URL", help=f"gets each alarm as JSON, and its end (default: ${VARIABLE})")
    add("--json", action="store_true", help="one JSON object a run")
    return parser

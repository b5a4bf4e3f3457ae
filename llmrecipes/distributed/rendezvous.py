"""Before the process group: every rank reports itself, and whoever is missing or misplaced is named.

Torch waits for a missing rank in silence, and connects processes that were never meant to be one job. Here rank 0 reads
everybody's report from the store at ``MASTER_ADDR:MASTER_PORT``, which the process group uses afterwards, and gives one
verdict that all ranks act on.
"""

from __future__ import annotations

import contextlib
import json
import os
import socket
import time
from collections import Counter
from collections.abc import Iterator
from dataclasses import asdict, dataclass
from datetime import timedelta
from typing import Any

from torch.distributed import DistError, TCPStore

from llmrecipes.errors import RankFailure, UserError

POLL = 0.1
# For a rank that started as early as possible to hear what rank 0, which started as late as possible, decided.
GRACE = 10.0


@dataclass(frozen=True)
class Report:
    """What a rank says of itself.

    Attributes:
        rank: its number. world_size: of how many. nodes, processes: trainer.num_nodes and trainer.devices.
        host, pid: where it runs.
    """

    rank: int
    world_size: int
    nodes: int
    processes: int
    host: str
    pid: int

    @classmethod
    def of_this_process(cls, rank: int, world_size: int, nodes: int, processes: int) -> Report:
        """A report that this process makes."""
        return cls(rank, world_size, nodes, processes, socket.gethostname(), os.getpid())

    def __str__(self) -> str:
        return f"rank {self.rank} (pid {self.pid} on {self.host})"

    @property
    def belief(self) -> str:
        """The size of the job as this rank sees it."""
        return f"{self.world_size} ranks, {self.nodes} nodes x {self.processes} processes"


class Rendezvous:
    """The ranks of one job, each of them known.

    Args:
        me: this rank's report.
        address, port: of the store, which rank 0 serves (or torchrun's agent for it).
        timeout: seconds to wait for others.
    """

    def __init__(self, me: Report, address: str, port: int, timeout: float) -> None:
        self.me, self.address, self.port, self.timeout = me, address, port, timeout
        self._store: TCPStore | None = None
        # torchrun restarts all ranks with the same store; what the earlier ones left there must not count.
        attempt = os.environ.get("TORCHELASTIC_RESTART_COUNT", "0")
        self.prefix = f"llmrecipes/{os.environ.get('TORCHELASTIC_RUN_ID', '')}/{attempt}"

    @property
    def where(self) -> str:
        """The place of the store, and who says so."""
        return f"{self.address}:{self.port} (MASTER_ADDR, MASTER_PORT)"

    def meet(self) -> list[Report]:
        """Wait until all ranks are there; returns their reports in the order of ranks.

        Raises:
            UserError: the settings of some rank are wrong.
            RankFailure: ranks are missing.
            SystemExit: one of both, and rank 0 says it.
        """
        sizes = self.me
        if sizes.world_size != sizes.nodes * sizes.processes:
            raise UserError(
                f"{sizes} is one of {sizes.world_size}, but trainer.num_nodes x trainer.devices = {sizes.nodes} x "
                f"{sizes.processes} = {sizes.nodes * sizes.processes}: make them equal to what was started"
            )
        end = time.monotonic() + self.timeout
        self._store = store = self._serve() if self._serves else self._connect(end)
        ticket = store.add(f"{self.prefix}/arrived", 1)
        store.set(f"{self.prefix}/report/{ticket}", json.dumps(asdict(self.me)))
        if self.me.rank == 0 and ticket == self._first_ticket_of_rank_0():
            verdict = self._judge(end)
            store.set(f"{self.prefix}/verdict", json.dumps(verdict))
            self._let_others_read(len(verdict["heard"]))
        else:
            verdict = self._hear(end + self.timeout + GRACE)
        store.add(f"{self.prefix}/read", 1)
        return self._act_on(verdict, ticket)

    # ---- the store

    @property
    def _serves(self) -> bool:
        return self.me.rank == 0 and os.environ.get("TORCHELASTIC_USE_AGENT_STORE") != "True"

    def _serve(self) -> TCPStore:
        _resolve(self.address)
        try:
            return self._open(is_master=True)
        except DistError as error:
            if "EADDRINUSE" not in str(error):
                raise RankFailure(f"{self.me} cannot serve {self.where}: {_first_line(error)}") from error
            raise UserError(
                f"{self.me}: another process of this machine has port {self.port}, maybe another job, or a second rank "
                "0 of this one: set MASTER_PORT to a free port, the same on all nodes, and NODE_RANK on each"
            ) from error

    def _connect(self, end: float) -> TCPStore:
        """Knock until somebody answers: torch's own client prints pages while it retries."""
        _resolve(self.address)
        refusal = "no answer"
        while time.monotonic() < end:
            try:
                socket.create_connection((self.address, self.port), timeout=max(0.1, end - time.monotonic())).close()
                return self._open(is_master=False)
            except DistError as error:
                refusal = f"what answers there is no rank 0: {_first_line(error)}"
                break
            except OSError as error:
                refusal = error.strerror or str(error)
                time.sleep(POLL)
        raise RankFailure(
            f"{self.me} waited {self.timeout:g} s for rank 0 at {self.where}: {refusal}. Either rank 0 did not start, "
            "or this is not its address: both are set where the job is started, the same on all nodes"
        )

    def _open(self, is_master: bool) -> TCPStore:
        return TCPStore(
            self.address,
            self.port,
            is_master=is_master,
            wait_for_workers=False,
            multi_tenant=is_master,  # the process group finds this server and uses it too
            timeout=timedelta(seconds=self.timeout + GRACE),
        )

    def client(self) -> TCPStore:
        """A connection of its own to the same store, for another thread."""
        return self._open(is_master=False)

    # ---- rank 0

    def _first_ticket_of_rank_0(self) -> int:
        """Two processes may both believe to be rank 0; the first one judges."""
        reports = self._reports()
        return min(ticket for ticket, report in reports.items() if report.rank == 0)

    def _reports(self) -> dict[int, Report]:
        """Ticket -> report, as far as they have arrived."""
        assert self._store is not None
        tickets = range(1, self._store.add(f"{self.prefix}/arrived", 0) + 1)
        keys = {ticket: f"{self.prefix}/report/{ticket}" for ticket in tickets}
        present = [ticket for ticket, key in keys.items() if self._store.check([key])]
        return {ticket: Report(**json.loads(self._store.get(keys[ticket]))) for ticket in present}

    def _judge(self, end: float) -> dict[str, Any]:
        """Wait for all; the verdict says what is wrong, or who the ranks are."""
        reports: dict[int, Report] = {}
        while True:
            reports = self._reports()
            heard = list(reports)
            mistakes = list(_mistakes(self.me, list(reports.values()), self.where))
            if mistakes:
                return {"heard": heard, "mistakes": mistakes, "failure": "", "reports": {}}
            if len(reports) == self.me.world_size:
                found = {ticket: asdict(report) for ticket, report in reports.items()}
                return {"heard": heard, "mistakes": [], "failure": "", "reports": found}
            if time.monotonic() >= end:
                failure = self._missing(list(reports.values()))
                return {"heard": heard, "mistakes": [], "failure": failure, "reports": {}}
            time.sleep(POLL)

    def _missing(self, present: list[Report]) -> str:
        ranks = {report.rank for report in present}
        missing = [rank for rank in range(self.me.world_size) if rank not in ranks]
        return (
            f"{_ranks(missing)} of {self.me.world_size} did not come to {self.where} within {self.timeout:g} s "
            f"(trainer.strategy start_timeout); {_nodes(missing, self.me.processes)}; present: "
            f"{', '.join(map(str, sorted(present, key=lambda r: r.rank)))}. "
            "See the missing processes' own output, and that they get the same MASTER_ADDR and MASTER_PORT"
        )

    def _let_others_read(self, heard: int) -> None:
        """The store ends with this process, which may end soon: give the others a moment."""
        assert self._store is not None
        end = time.monotonic() + 3
        while self._store.add(f"{self.prefix}/read", 0) < heard - 1 and time.monotonic() < end:
            time.sleep(POLL)

    # ---- the others

    def _hear(self, end: float) -> dict[str, Any]:
        assert self._store is not None
        key = f"{self.prefix}/verdict"
        with contextlib.suppress(DistError):
            while time.monotonic() < end:
                if self._store.check([key]):
                    return json.loads(self._store.get(key))
                time.sleep(POLL)
            raise RankFailure(f"{self.me}: the store at {self.where} answers, but rank 0 did not come")
        raise RankFailure(f"{self.me}: rank 0 at {self.where} ended before all ranks were there")

    def _act_on(self, verdict: dict, ticket: int) -> list[Report]:
        speaks = self.me.rank == 0 or any(str(self.me) in mistake for mistake in verdict["mistakes"])
        if not speaks and not verdict["reports"]:
            raise SystemExit(2 if verdict["mistakes"] else 1)  # rank 0 says why
        if verdict["mistakes"]:
            raise UserError(*verdict["mistakes"])
        if verdict["failure"]:
            raise RankFailure(verdict["failure"])
        reports = {int(key): Report(**value) for key, value in verdict["reports"].items()}
        if ticket not in reports:
            holder = next((report for report in reports.values() if report.rank == self.me.rank), None)
            raise UserError(
                f"{self.me}: the job at {self.where} is complete without it"
                + (f", {holder} is there already" if holder else "")
                + ": another job uses this port, or this rank was started twice; set MASTER_PORT"
            )
        return sorted(reports.values(), key=lambda report: report.rank)


def _mistakes(judge: Report, reports: list[Report], where: str) -> Iterator[str]:
    """Contradictions between reports."""
    for report in reports:
        if report.belief != judge.belief:
            yield (
                f"{report} believes in {report.belief}, but {judge} in {judge.belief}: trainer.devices and "
                "trainer.num_nodes must be the same everywhere, and equal to what was started"
            )
    counts = Counter(report.rank for report in reports)
    for rank in sorted(rank for rank, count in counts.items() if count > 1):
        several = [str(report) for report in reports if report.rank == rank]
        yield (
            f"rank {rank} came {counts[rank]} times to {where}: {' and '.join(several)}. Each node needs its own "
            "NODE_RANK, each process its own LOCAL_RANK, and another job another MASTER_PORT"
        )


def _resolve(address: str) -> None:
    try:
        socket.getaddrinfo(address, None)
    except OSError as error:
        raise UserError(
            f"MASTER_ADDR is {address!r}, a name that this machine ({socket.gethostname()}) does not know "
            f"({error.strerror}): set it to the first node's address"
        ) from error


def _ranks(ranks: list[int]) -> str:
    shown = ", ".join(map(str, ranks[:16])) + (", ..." if len(ranks) > 16 else "")
    return f"rank {shown}" if len(ranks) == 1 else f"ranks {shown}"


def _nodes(ranks: list[int], processes: int) -> str:
    nodes = sorted({rank // processes for rank in ranks})
    return f"node{'s' if len(nodes) > 1 else ''} {', '.join(map(str, nodes[:16]))} of the job (from 0)"


def _first_line(error: Exception) -> str:
    return str(error).splitlines()[0]

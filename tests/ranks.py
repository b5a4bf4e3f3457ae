"""Many ranks without many imports: fork them from a process that has imported everything."""

from __future__ import annotations

import multiprocessing
import os
import pickle
import queue
import socket
import time
import traceback
from collections.abc import Callable
from typing import Any

import torch


def free_port() -> int:
    with socket.socket() as s:
        s.bind(("127.0.0.1", 0))
        return s.getsockname()[1]


def rank_environment(rank: int, ranks: int, port: int, nodes: int = 1) -> dict[str, str]:
    """What torchrun would set for ``rank`` of ``ranks`` on ``nodes`` nodes."""
    local = ranks // nodes
    return {
        "RANK": str(rank),
        "LOCAL_RANK": str(rank % local),
        "GROUP_RANK": str(rank // local),
        "NODE_RANK": str(rank // local),
        "WORLD_SIZE": str(ranks),
        "LOCAL_WORLD_SIZE": str(local),
        "MASTER_ADDR": "127.0.0.1",
        "MASTER_PORT": str(port),
        "TORCHELASTIC_RUN_ID": "test",
        "TORCHELASTIC_USE_AGENT_STORE": "False",
        "OMP_NUM_THREADS": "1",
    }


def run_ranks(ranks: int, function: Callable[..., Any], *args: Any, timeout: float = 120, nodes: int = 1) -> list[Any]:
    """Run ``function(*args)`` in each of ``ranks`` forked processes; returns their results in the order of ranks.

    The first failure is raised with its traceback, and everybody else is killed.
    """
    torch.set_num_threads(1)
    context = multiprocessing.get_context("fork")
    results = context.Queue()
    end_of_all, held_open = context.Pipe(duplex=False)
    port = free_port()

    def child(rank: int) -> None:
        held_open.close()
        os.environ.update(rank_environment(rank, ranks, port, nodes))
        try:
            # As bytes: tensors would travel as file descriptors, which end with this process.
            results.put((rank, pickle.dumps(function(*args)), None))
            code = 0
        except BaseException:
            results.put((rank, None, traceback.format_exc()))
            code = 1
        results.close()
        results.join_thread()
        if code == 0:
            end_of_all.poll(timeout)  # rank 0 has the store, which the others may still need
        os._exit(code)

    processes = [context.Process(target=child, args=(rank,), daemon=True) for rank in range(ranks)]
    for process in processes:
        process.start()
    done: dict[int, Any] = {}
    end = time.monotonic() + timeout
    try:
        while len(done) < ranks:
            try:
                rank, value, error = results.get(timeout=0.2)
            except queue.Empty:
                dead = [i for i, p in enumerate(processes) if i not in done and p.exitcode not in (None, 0)]
                assert not dead, f"ranks {dead} died with {[processes[i].exitcode for i in dead]}"
                assert time.monotonic() < end, f"only ranks {sorted(done)} of {ranks} finished in {timeout} s"
                continue
            assert error is None, f"rank {rank}\n{error}"
            done[rank] = pickle.loads(value)
        held_open.close()
        for process in processes:
            process.join(10)
    finally:
        for process in processes:
            if process.is_alive():
                process.kill()
    return [done[rank] for rank in range(ranks)]

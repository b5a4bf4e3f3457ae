"""Bytes between two hosts per optimizer step, mode by mode, and the time of a step when the link is slow.

TORCH_CPP_LOG_LEVEL=ERROR python benchmarks/link_traffic.py [--rate 200mbit] [--micro-batches 1 4]

The hosts are network namespaces of this machine, joined by one virtual cable whose counters are read; processes of one
host talk over its loopback device, which is not counted. Each mode trains a dense model through the real strategy and
Trainer, on gloo. Needs Linux, root and `ip` (iproute2), and `tc` for the rate. Everything made is removed at the end.
"""

from __future__ import annotations

import argparse
import ctypes
import json
import multiprocessing
import os
import shutil
import signal
import subprocess
import sys
import tempfile
import time
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import lightning.pytorch as L
import numpy as np
import torch
import torch.distributed as dist

from llmrecipes.data import PackedShards, ShardWriter
from llmrecipes.distributed import ShardedStrategy
from llmrecipes.models import ModelConfig
from llmrecipes.modules import PretrainModule
from llmrecipes.optim import AdamW, WarmupCosine
from llmrecipes.recipe import Duration
from llmrecipes.run.fit import quiet_lightning

HOSTS, PER_HOST = 2, 2
RANKS = HOSTS * PER_HOST
MODES = ("no_shard", "shard_grad_op", "full_shard", "hybrid_shard_zero2", "hybrid_shard")
CABLE = "cable0"  # the name of both its ends
ADDRESS = "10.213.7.{}"
VOCAB, SEQ_LEN, WARM_UP = 2048, 32, 1
CLONE_NEWNET = 0x40000000


def config() -> ModelConfig:
    """20 M parameters, few tokens: the step is traffic."""
    return ModelConfig(vocab_size=VOCAB, dim=448, num_layers=8, num_heads=7, ffn_dim=1216)


# ---- two hosts


def command(*words: str) -> None:
    """Run a command that must succeed."""
    subprocess.run(words, check=True, capture_output=True, text=True)


def why_impossible() -> str | None:
    """What this machine lacks."""
    if sys.platform != "linux" or os.geteuid() != 0 or shutil.which("ip") is None:
        return "two hosts on one machine need Linux network namespaces: run as root, with `ip` (iproute2) installed"
    try:
        command("unshare", "--net", "true")
    except (OSError, subprocess.CalledProcessError):
        return "this machine does not allow network namespaces (a container needs the capability SYS_ADMIN)"
    return None


@contextmanager
def two_hosts(rate: str | None) -> Iterator[list[str]]:
    """Namespaces joined by a cable, with at most ``rate`` each way (None = as fast as it goes); removed at the end."""
    names = [f"llmrecipes-{os.getpid()}-{host}" for host in range(HOSTS)]
    try:
        for name in names:
            command("ip", "netns", "add", name)
        command(*f"ip -n {names[0]} link add {CABLE} type veth peer name {CABLE} netns {names[1]}".split())
        for host, name in enumerate(names):
            command(*f"ip -n {name} link set lo up".split())
            command(*f"ip -n {name} address add {ADDRESS.format(host + 1)}/24 dev {CABLE}".split())
            command(*f"ip -n {name} link set {CABLE} up".split())
            if rate is not None:
                command(*f"tc -n {name} qdisc add dev {CABLE} root tbf rate {rate} burst 256kb latency 200ms".split())
        yield names
    finally:
        for name in names:
            subprocess.run(["ip", "netns", "delete", name], capture_output=True)


def enter(namespace: str) -> None:
    """Move this process to another network."""
    library = ctypes.CDLL(None, use_errno=True)
    with Path("/run/netns", namespace).open() as file:
        if library.setns(file.fileno(), CLONE_NEWNET):
            raise OSError(ctypes.get_errno(), f"entering {namespace}")


def cable_bytes() -> tuple[int, int]:
    """Received and sent so far, headers included."""
    for line in Path("/proc/self/net/dev").read_text().splitlines():
        name, _, numbers = line.partition(":")
        if name.strip() == CABLE:
            fields = numbers.split()
            return int(fields[0]), int(fields[8])
    raise AssertionError(f"no {CABLE}")


# ---- training


class Meter(L.Callback):
    """Counts what the first host receives and sends from the end of the warm-up to the last step."""

    def __init__(self, steps: int) -> None:
        self.steps = steps
        self.result: dict[str, float] = {}

    def on_train_batch_end(self, trainer: L.Trainer, *_: Any) -> None:  # noqa: D102
        if trainer.global_step == WARM_UP:
            dist.barrier()
            self._began, self._started = cable_bytes(), time.perf_counter()
        if trainer.global_step == WARM_UP + self.steps:
            dist.barrier()
            seconds = time.perf_counter() - self._started
            received, sent = (now - then for now, then in zip(cable_bytes(), self._began, strict=True))
            self.result = {
                "received": received / self.steps,
                "sent": sent / self.steps,
                "seconds": seconds / self.steps,
            }


def train(mode: str, micro_batches: int, steps: int, shard: Path) -> dict[str, Any]:
    """A few steps on this rank."""
    quiet_lightning()
    meter = Meter(steps)
    module = PretrainModule(config(), AdamW(lr=1e-3), WarmupCosine(Duration(1, "steps")))
    data = PackedShards(
        train={str(shard): 1.0},
        seq_len=SEQ_LEN,
        micro_batch=1,
        global_batch=RANKS * micro_batches,
        split="100,0,0",
    )
    trainer = L.Trainer(
        max_steps=WARM_UP + steps,
        max_epochs=-1,
        accelerator="cpu",
        devices=PER_HOST,
        num_nodes=HOSTS,
        strategy=ShardedStrategy(mode=mode),  # type: ignore[arg-type]
        logger=False,
        enable_checkpointing=False,
        enable_progress_bar=False,
        enable_model_summary=False,
        use_distributed_sampler=False,
        num_sanity_val_steps=0,
        limit_val_batches=0,
        callbacks=[meter],
    )
    trainer.fit(module, datamodule=data)
    loss = float(module.last_step.losses["loss"])  # type: ignore[union-attr]
    size = sum(p.numel() for p in module.model.parameters()) * 4
    blocks = sum(p.numel() for p in module.model.layers.parameters()) * 4
    return meter.result | {"loss": loss, "parameter_bytes": size, "block_share": blocks / size}


def measure(hosts: list[str], port: int, *arguments: Any) -> dict[str, Any]:
    """What rank 0 of a job of forked processes measured: four times the imports would take longer than the steps."""
    context = multiprocessing.get_context("fork")
    results = context.SimpleQueue()

    def child(rank: int) -> None:
        enter(hosts[rank // PER_HOST])
        os.environ |= {
            "RANK": str(rank),
            "LOCAL_RANK": str(rank % PER_HOST),
            "GROUP_RANK": str(rank // PER_HOST),
            "WORLD_SIZE": str(RANKS),
            "LOCAL_WORLD_SIZE": str(PER_HOST),
            "MASTER_ADDR": ADDRESS.format(1),
            "MASTER_PORT": str(port),
            "TORCHELASTIC_RUN_ID": "link_traffic",
            "GLOO_SOCKET_IFNAME": CABLE,
        }
        result = train(*arguments)
        if rank == 0:
            results.put(json.dumps(result))

    ranks = [context.Process(target=child, args=(rank,), daemon=True) for rank in range(RANKS)]
    for process in ranks:
        process.start()
    try:
        while any(process.is_alive() for process in ranks):
            if any(process.exitcode for process in ranks):
                sys.exit(f"a process of {arguments[0]} failed: see above")
            time.sleep(0.1)
    finally:
        for process in ranks:
            process.kill()
    return json.loads(results.get())


# ---- the formula


def expected(mode: str, micro_batches: int, block_share: float, gloo: bool) -> float:
    """Bytes each way over the cable, in units of all parameters.

    A ring of N ranks of which each host has a neighbouring half crosses the cable once each way; every crossing carries
    (N-1)/N of a tensor that is gathered or scattered, twice that for an all-reduce. Blocks are gathered for the forward
    and again for the backward pass with full_shard, the rest (embedding, head) once. gloo does a reduce-scatter at the
    price of an all-reduce; NCCL does not.
    """
    ring = (RANKS - 1) / RANKS
    scatter = (2 if gloo else 1) * ring
    if mode == "no_shard":
        return 2 * ring
    if mode == "shard_grad_op":
        return ring + micro_batches * scatter
    if mode == "full_shard":
        return micro_batches * (ring * (1 + block_share) + scatter)
    return 2 * (HOSTS - 1) / HOSTS  # one all-reduce of shares between the hosts, once per step


def synthetic_shard(folder: Path) -> Path:
    """Random tokens: what is learned does not matter here."""
    generator = np.random.default_rng(0)
    with ShardWriter(folder / "random", VOCAB, eos_id=2, tokenizer_sha256="0" * 64) as writer:
        for _ in range(64):
            writer.add(np.append(generator.integers(4, VOCAB, 500), 2))
    return folder / "random"


def main() -> int:
    """Measure and print a table in Markdown."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--rate", default="200mbit", help="of the slow link, in tc's words; 'none' leaves it out")
    parser.add_argument("--micro-batches", type=int, nargs="+", default=[1, 4], help="per process and step")
    parser.add_argument("--steps", type=int, default=3, help="measured, after one to warm up")
    parser.add_argument("--modes", nargs="+", default=list(MODES), choices=MODES)
    arguments = parser.parse_args()
    if reason := why_impossible():
        print(f"error: {reason}", file=sys.stderr)
        return 2
    slow = arguments.rate != "none"
    if slow and shutil.which("tc") is None:
        print("error: a rate needs `tc` (iproute2); --rate none leaves it out", file=sys.stderr)
        return 2
    signal.signal(signal.SIGTERM, lambda *_: sys.exit(143))  # what was made is removed then, too
    torch.set_num_threads(1)
    rows, port = [], 29500
    with tempfile.TemporaryDirectory() as folder:
        shard = synthetic_shard(Path(folder))
        for micro_batches in arguments.micro_batches:
            for mode in arguments.modes:
                found = []
                for rate in (None, arguments.rate) if slow else (None,):
                    port += 1
                    with two_hosts(rate) as hosts:
                        found.append(measure(hosts, port, mode, micro_batches, arguments.steps, shard))
                rows.append((mode, micro_batches, found))
                print(f"{mode} x {micro_batches}: {found}", file=sys.stderr, flush=True)  # this takes minutes
    parameters = rows[0][2][0]["parameter_bytes"]
    print(
        f"{HOSTS} hosts x {PER_HOST} processes, P = {parameters / 1e6:.1f} MB of fp32 parameters; per optimizer step:\n"
    )
    head = [
        "mode",
        "micro-batches",
        "MB both ways",
        "P each way",
        "formula",
        "with NCCL",
        "s",
        "s at " + arguments.rate,
    ]
    head = head if slow else head[:-1]
    print(f"| {' | '.join(head)} |\n|{'---|' * len(head)}")
    for mode, micro_batches, found in rows:
        both = found[0]["received"] + found[0]["sent"]
        formulas = (expected(mode, micro_batches, found[0]["block_share"], gloo) for gloo in (True, False))
        cells = [mode, str(micro_batches), f"{both / 1e6:.1f}", f"{both / 2 / parameters:.2f}"]
        cells += [f"{f:.2f}" for f in formulas] + [f"{one['seconds']:.2f}" for one in found]
        print(f"| {' | '.join(cells)} |")
    losses = {micro: [f[0]["loss"] for _, m, f in rows if m == micro] for micro in arguments.micro_batches}
    spread = max(max(values) - min(values) for values in losses.values())
    print(f"\nThe last losses of all modes differ by at most {spread:.1e}.")
    return 0


if __name__ == "__main__":
    sys.exit(main())

"""How long training waits for a save: written at once against copied and written in the background.

    python benchmarks/checkpoint_stall.py --ranks 2 --saves 5

Every rank trains a little between saves. `stall` is what training waited for, `save` from the call until the
checkpoint is committed, `steps` how many steps were done meanwhile.
"""

from __future__ import annotations

import argparse
import os
import shutil
import statistics
import sys
import tempfile
import time
from pathlib import Path

import torch
import torch.distributed as dist
from torch import nn
from torch.distributed.device_mesh import init_device_mesh
from torch.distributed.fsdp import fully_shard

sys.path.insert(0, str(Path(__file__).parents[1] / "tests"))
from ranks import run_ranks

from llmrecipes.checkpoint import TrainingState, write_checkpoint
from llmrecipes.checkpoint.background import BackgroundSave
from llmrecipes.checkpoint.state import optimizer_state, rng_state


def model_of(millions: float, sharded: bool) -> nn.Module:
    """As many parameters in 8 layers."""
    width = round((millions * 1e6 / 8) ** 0.5)
    model = nn.Sequential(*(nn.Linear(width, width, bias=False) for _ in range(8)))
    if sharded:
        mesh = init_device_mesh("cpu", (dist.get_world_size(),))
        for layer in model:
            fully_shard(layer, mesh=mesh)
        fully_shard(model, mesh=mesh)
    return model


def measure(root: Path, millions: float, saves: int, in_background: bool) -> dict[str, list[float]]:
    """Stall, total and steps done meanwhile, of every save."""
    sharded = "RANK" in os.environ
    if sharded:
        dist.init_process_group("gloo")
    torch.manual_seed(0)
    model = model_of(millions, sharded)
    optimizer = torch.optim.AdamW(model.parameters(), 1e-4)
    data = torch.randn(8, next(model.parameters()).shape[1])
    background, found = BackgroundSave(), {"stall": [], "save": [], "steps": []}
    ended = [0.0]

    def step() -> None:
        model(data).square().mean().backward()
        optimizer.step()
        optimizer.zero_grad()

    def write(state: TrainingState, group: dist.ProcessGroup | None) -> None:
        write_checkpoint(root, state, group=group)
        ended[0] = time.perf_counter()

    for number in range(saves + 1):
        step()
        if sharded:
            dist.barrier()
        started = time.perf_counter()
        tensors = dict(model.state_dict())
        state = TrainingState(number, tensors, optimizer_state(model, optimizer), rng_state())
        if in_background:
            background.start(state, write)
        else:
            write(state, None)
        stall, steps = time.perf_counter() - started, 0
        while background.in_flight:
            step()
            steps += 1
            background.poll()
        if number:  # the first one makes the buffers
            found["stall"].append(stall)
            found["save"].append(ended[0] - started)
            found["steps"].append(steps)
    return found


def main() -> None:
    """Print one line for each way."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--ranks", type=int, default=2)
    parser.add_argument("--saves", type=int, default=5)
    parser.add_argument("--millions", type=float, default=20.0, help="parameters")
    asked = parser.parse_args()
    torch.set_num_threads(1)
    for in_background in (False, True):
        root = Path(tempfile.mkdtemp())
        arguments = (root, asked.millions, asked.saves, in_background)
        found = run_ranks(asked.ranks, measure, *arguments)[0] if asked.ranks > 1 else measure(*arguments)
        size = sum(p.stat().st_size for p in (root / f"step={asked.saves:06d}").rglob("*.safetensors"))
        shutil.rmtree(root)
        middle = {name: statistics.median(values) for name, values in found.items()}
        print(
            f"{'background' if in_background else 'at once':10}  {asked.ranks} rank(s), {size / 2**20:.0f} MiB: "
            f"stall {middle['stall']:.3f} s, save {middle['save']:.3f} s, {middle['steps']:.0f} steps meanwhile"
        )


if __name__ == "__main__":
    main()

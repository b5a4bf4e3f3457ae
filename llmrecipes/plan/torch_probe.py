"""What torch says of itself, as one line of JSON: run in a process of its own, which may crash or hang."""

from __future__ import annotations

import importlib.util
import json
import os
import socket
import tempfile
from datetime import timedelta
from typing import Any


def facts() -> dict[str, Any]:
    """Versions, devices, kernels."""
    import torch

    gpus = []
    if torch.cuda.is_available():
        for index in range(torch.cuda.device_count()):
            properties = torch.cuda.get_device_properties(index)
            capability = f"{properties.major}.{properties.minor}"
            gpus.append({"name": properties.name, "memory": properties.total_memory, "capability": capability})
        (torch.ones(8, 8, device="cuda") @ torch.ones(8, 8, device="cuda")).sum().item()  # a kernel really runs
    return {
        "torch": torch.__version__,
        "cuda": torch.version.cuda,
        "gpus": gpus,
        "nccl": ".".join(map(str, torch.cuda.nccl.version())) if gpus else None,
        "flash_attn": _flash_attention(),
        "threads": torch.get_num_threads(),
    }


def _flash_attention() -> str | None:
    """Version of flash-attn if it can be imported, ``broken: ...`` if it cannot, None if it is not there."""
    if importlib.util.find_spec("flash_attn") is None:
        return None
    try:
        import flash_attn
    except Exception as error:
        return f"broken: {error}"
    return str(getattr(flash_attn, "__version__", "?"))


def gloo() -> dict[str, Any]:
    """Join a process group of one over gloo: whether the interface it chooses works."""
    import torch
    import torch.distributed as dist

    host = socket.gethostname()
    with tempfile.TemporaryDirectory() as folder:
        dist.init_process_group(
            "gloo", init_method=f"file://{folder}/meet", rank=0, world_size=1, timeout=timedelta(seconds=20)
        )
        value = torch.ones(1)
        dist.all_reduce(value)
        dist.destroy_process_group()
    return {"host": host, "interface": os.environ.get("GLOO_SOCKET_IFNAME")}


def main(name: str) -> None:
    """Print one of them."""
    print("FACTS " + json.dumps({"torch": facts, "gloo": gloo}[name]()))

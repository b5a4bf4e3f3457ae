"""What a run was made with: written once per launch, never with secrets."""

from __future__ import annotations

import importlib.metadata
import json
import os
import platform
import subprocess
import sys
import time
from pathlib import Path
from typing import Any

PACKAGES = ("torch", "lightning", "jsonargparse", "transformers", "sentencepiece", "numpy", "safetensors")


def environment() -> dict[str, Any]:
    """Versions, machine, git state and command. Environment variables are left out: they hold keys."""
    import torch

    from llmrecipes import __version__
    from llmrecipes.kernels.library import kernel_types

    versions = {name: _version(name) for name in PACKAGES}
    return {
        "time": time.strftime("%Y-%m-%dT%H:%M:%S%z"),
        "command": [Path(sys.argv[0]).name, *sys.argv[1:]],
        "llmrecipes": __version__,
        "python": platform.python_version(),
        "packages": versions,
        "platform": platform.platform(),
        "cpus": os.cpu_count(),
        "threads": torch.get_num_threads(),
        # Of two machines that differ in it, runs differ in the last digits.
        "cpu_kernels": [] if torch.cuda.is_available() else kernel_types(),
        "gpus": [torch.cuda.get_device_name(i) for i in range(torch.cuda.device_count())],
        "git": git_state(),
    }


def _version(package: str) -> str | None:
    try:
        return importlib.metadata.version(package)
    except importlib.metadata.PackageNotFoundError:
        return None


def common_facts(cli: Any) -> dict[str, Any]:
    """What every process of a job must have in common: the recipe key by key, the data, and the versions."""
    import torch
    import yaml

    from llmrecipes import __version__

    facts = {"the version of llmrecipes": __version__, "the version of torch": torch.__version__}
    facts |= flat("recipe", yaml.safe_load(cli.resolved_recipe))
    return facts | flat("data", cli.datamodule.fingerprint())


def flat(name: str, value: Any) -> dict[str, Any]:
    """Nested values by dotted names."""
    if not isinstance(value, dict | list):
        return {name: value}
    items = value.items() if isinstance(value, dict) else enumerate(value)
    return {key: item for part, inner in items for key, item in flat(f"{name}.{part}", inner).items()}


def git_state() -> dict[str, Any] | None:
    """Commit of the working folder and the files that differ from it; None outside a repository."""

    def git(*arguments: str) -> str:
        return subprocess.run(
            ["git", *arguments], capture_output=True, text=True, check=True, timeout=10
        ).stdout.strip()

    try:
        return {"commit": git("rev-parse", "HEAD"), "changed": git("status", "--porcelain").splitlines()[:50]}
    except (OSError, subprocess.SubprocessError):
        return None


def record_launch(folder: Path, recipe: str) -> None:
    """Write the resolved recipe and add this launch to ``environment.json`` (one object per launch, newest last)."""
    (folder / "recipe.yaml").write_text(recipe, encoding="utf-8")
    path = folder / "environment.json"
    try:
        launches = json.loads(path.read_text(encoding="utf-8"))
    except (FileNotFoundError, ValueError):  # the first launch, or a file cut short
        launches = []
    temporary = folder / ".environment.json"
    temporary.write_text(json.dumps([*launches, environment()], indent=1, ensure_ascii=False), encoding="utf-8")
    temporary.replace(path)

"""What determines the trajectory of a run, as one hash; and the difference of two recipes, key by key."""

from __future__ import annotations

import hashlib
import json
from collections.abc import Iterator
from dataclasses import MISSING, fields
from typing import Any

from llmrecipes.recipe.model_config import ModelConfig
from llmrecipes.recipe.moe_config import MoEConfig
from llmrecipes.recipe.rope_config import RopeScaling

# Of the Trainer, only these change what is computed; devices and strategies change who computes it.
_TRAINER_KEYS = ("max_steps", "precision")
# Of the model, these change results by rounding only, or not at all.
ROUNDING = ("expected_params", "loss_chunk", "compile")
_MICRO_BATCH = ("data", "init_args", "micro_batch")
_CAPACITY = ("model", "init_args", "config", "moe", "capacity_factor")
_IGNORED = {
    *(("model", "init_args", name) for name in ROUNDING),
    _MICRO_BATCH,
    ("data", "init_args", "valid"),
    ("data", "init_args", "valid_batches"),
}


def fingerprint(data: dict[str, Any]) -> str:
    """SHA-256 (hex) of the canonical JSON of what determines the trajectory.

    In it: seed, model, training data, run length, precision. Not in it: where the run is written, what is logged, and
    how the work is divided (micro-batch, devices), which changes results by rounding only; but where experts have a
    capacity, the micro-batch decides which tokens are dropped. Key order and ``1`` or ``1.0`` make no difference.
    """
    trainer = data.get("trainer")
    kept: dict[str, Any] = {key: data.get(key) for key in ("seed", "model", "data")}
    kept["trainer"] = {key: trainer.get(key) for key in _TRAINER_KEYS} if isinstance(trainer, dict) else trainer
    leaves = dict(_flatten(kept, ()))
    ignored = _IGNORED - {_MICRO_BATCH} if leaves.get(_CAPACITY) is not None else _IGNORED
    flat = {
        ".".join(path): value
        for path, value in leaves.items()
        if not any(path[: len(prefix)] == prefix for prefix in ignored)
    }
    text = json.dumps(flat, sort_keys=True, ensure_ascii=False, separators=(",", ":"), default=str)
    return hashlib.sha256(text.encode("utf-8", "surrogatepass")).hexdigest()


def diff(a: dict[str, Any], b: dict[str, Any]) -> list[str]:
    """``key: old -> new`` for every dotted key that differs, sorted; ``(absent)`` where one side has none."""
    old, new = ({".".join(path): value for path, value in _flatten(side, ())} for side in (a, b))
    lines = []
    for key in sorted(old.keys() | new.keys()):
        before, after = (_show(side[key]) if key in side else "(absent)" for side in (old, new))
        if before != after:
            lines.append(f"{key}: {before} -> {after}")
    return lines


def with_later_defaults(trajectory: dict[str, Any]) -> dict[str, Any]:
    """A recorded trajectory, with the defaults of options of the model that came after it was recorded.

    An option that a version did not have yet was at its default: a checkpoint of that version is no other recipe's.
    """
    model = trajectory.get("model")
    if not isinstance(model, dict) or not isinstance(model.get("config"), dict):
        return trajectory
    config = _defaults(ModelConfig) | model["config"]
    for key, kind in (("moe", MoEConfig), ("rope_scaling", RopeScaling)):
        if isinstance(config.get(key), dict):
            config[key] = _defaults(kind) | config[key]
    return trajectory | {"model": model | {"config": config}}


def _defaults(kind: type) -> dict[str, Any]:
    return {field.name: field.default for field in fields(kind) if field.default is not MISSING}


def _flatten(value: Any, path: tuple[str, ...]) -> Iterator[tuple[tuple[str, ...], Any]]:
    """Leaves with their paths; lists and empty mappings are leaves."""
    if isinstance(value, dict) and value:
        for key, inner in value.items():
            yield from _flatten(inner, (*path, str(key)))
    else:
        yield path, _canonical(value)


def _canonical(value: Any) -> Any:
    if isinstance(value, float) and value.is_integer():
        return int(value)
    if isinstance(value, list):
        return [_canonical(item) for item in value]
    if isinstance(value, dict):
        return {str(key): _canonical(item) for key, item in value.items()}
    return value


def _show(value: Any) -> str:
    return json.dumps(value, ensure_ascii=False, default=str) if not isinstance(value, str) else value

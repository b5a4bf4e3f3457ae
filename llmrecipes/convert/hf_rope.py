"""Rotary positions as a ``config.json`` writes them: of transformers 5, or of the versions before."""

from __future__ import annotations

import math
from typing import Any, NamedTuple

from llmrecipes.convert.hf_reader import Reader
from llmrecipes.recipe.model_config import ModelConfig
from llmrecipes.recipe.rope_config import RopeScaling, RopeScalingKind

_LLAMA3 = ("factor", "low_freq_factor", "high_freq_factor", "original_max_position_embeddings")
# What each kind needs, and what it may have. Microsoft's files call longrope "su" or "yarn".
_NEEDED: dict[str, tuple[str, ...]] = {
    "default": (),
    "linear": ("factor",),
    "dynamic": ("factor",),
    "llama3": _LLAMA3,
    "yarn": ("factor",),
    "longrope": ("short_factor", "long_factor"),
}
_ALLOWED: dict[str, tuple[str, ...]] = {
    # Configurations in memory carry what belongs to other kinds, at no effect.
    "default": ("original_max_position_embeddings",),
    "yarn": ("original_max_position_embeddings", "attention_factor", "beta_fast", "beta_slow", "truncate",
             "mscale", "mscale_all_dim", "finetuned"),
    "longrope": ("factor", "original_max_position_embeddings", "attention_factor"),
}  # fmt: skip


class Rope(NamedTuple):
    """Base, stretching, and the part of a head that is rotated."""

    theta: float
    scaling: RopeScaling | None
    fraction: float

    def values(self) -> dict[str, Any]:
        """As fields of a ``ModelConfig``."""
        return {"rope_theta": self.theta, "rope_scaling": self.scaling, "rotary_fraction": self.fraction}


def read_rope(
    r: Reader,
    theta: float = 1e4,
    fraction: float | None = None,
    theta_key: str = "rope_theta",
    fraction_key: str = "partial_rotary_factor",
    old_kinds: dict[str, str] | None = None,
) -> Rope:
    """Base and stretching, from ``rope_scaling`` or ``rope_parameters`` and the keys beside them.

    Args:
        theta: base where the file is silent.
        fraction: rotated part of a head where the file is silent; None = the family rotates all of it.
        theta_key, fraction_key: names of the keys beside.
        old_kinds: what else a kind was called.
    """
    r.asked |= {"rope_scaling", "rope_parameters"}
    rope = r.hf.get("rope_scaling") or r.hf.get("rope_parameters") or {}
    if not isinstance(rope, dict):
        r.problems.append(f"rope_scaling {rope!r}: a mapping is needed")
        rope = {}
    rope = {key: value for key, value in rope.items() if value is not None}
    part = Reader(rope)
    part.problems = r.problems
    outside = r.number(theta_key, theta)
    theta = part.number("rope_theta", outside)
    share = part.number("partial_rotary_factor", r.number(fraction_key, fraction or 1.0))
    if fraction is None and share != 1.0:
        r.problems.append(f"partial_rotary_factor {share}: this family rotates whole heads (1.0) only")
    if share > 1:
        r.problems.append(f"{fraction_key} {share}: a part of a head, at most 1, is needed")
    return Rope(theta, read_scaling(r, part, old_kinds or {}), share if fraction is not None and share <= 1 else 1.0)


def read_scaling(r: Reader, part: Reader, old_kinds: dict[str, str]) -> RopeScaling | None:
    """The stretching that ``part``, a mapping inside the file that ``r`` reads, describes."""
    kind = part.get("rope_type", part.get("type", "default"))
    kind = old_kinds.get(kind, kind) if isinstance(kind, str) else kind
    if not isinstance(kind, str) or kind not in _NEEDED:
        r.problems.append(f"rope_type {kind!r}: one of {', '.join(_NEEDED)} is supported")
        return None
    needed, allowed = _NEEDED[kind], _ALLOWED.get(kind, ())
    r.problems += [f"rope_scaling lacks {name}" for name in needed if name not in part.hf]
    known = {*needed, *allowed, "rope_theta", "partial_rotary_factor", "type", "rope_type"}
    r.problems += [f"rope_scaling.{name} {part.hf[name]!r}: not understood" for name in part.hf if name not in known]
    if kind == "default" or r.problems:
        return None
    return _scaling(r, part, kind)  # type: ignore[arg-type]


def _scaling(r: Reader, part: Reader, kind: RopeScalingKind) -> RopeScaling:
    longest = r.optional_size("max_position_embeddings") or 2048
    if kind == "linear":
        return RopeScaling(kind=kind, factor=part.number("factor", 1.0))
    if kind == "dynamic":
        return RopeScaling(kind=kind, factor=part.number("factor", 1.0), original_max_seq_len=longest)
    original = part.size("original_max_position_embeddings", longest, 1 << 31)
    if r.hf.get("original_max_position_embeddings") is not None:
        original = r.size("original_max_position_embeddings", original, 1 << 31)
    factor = part.number("factor", longest / original)
    if kind == "llama3":
        low, high = part.number("low_freq_factor", 1.0), part.number("high_freq_factor", 4.0)
        return RopeScaling(
            kind=kind, factor=factor, low_freq_factor=low, high_freq_factor=high, original_max_seq_len=original
        )
    amplitude = None if part.get("attention_factor") is None else part.number("attention_factor", 1.0)
    if kind == "longrope":
        short, long = (_factors(r, part, name) for name in ("short_factor", "long_factor"))
        return RopeScaling(
            kind=kind, factor=factor, original_max_seq_len=original, attention_factor=amplitude, short_factor=short,
            long_factor=long,
        )  # fmt: skip
    scale, scale_all = part.number("mscale", 0.0, 0.0), part.number("mscale_all_dim", 0.0, 0.0)
    if amplitude is None and scale and scale_all and factor > 1:
        amplitude = (0.1 * scale * math.log(factor) + 1) / (0.1 * scale_all * math.log(factor) + 1)
    return RopeScaling(
        kind=kind, factor=factor, original_max_seq_len=original, attention_factor=amplitude,
        beta_fast=part.number("beta_fast", 32.0), beta_slow=part.number("beta_slow", 1.0),
        truncate=part.flag("truncate", True),
    )  # fmt: skip


def _factors(r: Reader, part: Reader, name: str) -> list[float]:
    found = part.hf[name]
    if isinstance(found, list) and all(isinstance(f, int | float) and not isinstance(f, bool) for f in found):
        return [float(f) for f in found]
    r.problems.append(f"rope_scaling.{name}: a list of numbers is needed")
    return []


def rope_to_hf(config: ModelConfig, partial: bool = False) -> dict[str, Any]:
    """The keys of ``config.json`` for transformers 4 and 5.

    Args:
        partial: whether the family may rotate a part of each head.
    """
    scaling = config.rope_scaling
    rope = {"rope_type": "default"} if scaling is None else _scaling_to_hf(scaling)
    share = {"partial_rotary_factor": config.rotary_fraction} if partial else {}
    return share | {
        "rope_theta": config.rope_theta,
        "rope_scaling": None if scaling is None else rope,
        "rope_parameters": {**rope, **share, "rope_theta": config.rope_theta},
    }


def _scaling_to_hf(scaling: RopeScaling) -> dict[str, Any]:
    rope: dict[str, Any] = {"rope_type": scaling.kind, "factor": scaling.factor}
    if scaling.kind in ("llama3", "yarn", "longrope"):
        rope["original_max_position_embeddings"] = scaling.original_max_seq_len
    if scaling.kind == "llama3":
        rope |= {"low_freq_factor": scaling.low_freq_factor, "high_freq_factor": scaling.high_freq_factor}
    if scaling.kind == "yarn":
        rope |= {"beta_fast": scaling.beta_fast, "beta_slow": scaling.beta_slow}
        rope |= {} if scaling.truncate else {"truncate": False}
    if scaling.kind == "longrope":
        rope |= {"short_factor": scaling.short_factor, "long_factor": scaling.long_factor}
    if scaling.attention_factor is not None:
        rope["attention_factor"] = scaling.attention_factor
    return rope

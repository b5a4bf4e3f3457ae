"""Rotary positions (2104.09864), in the rotate-half layout of Hugging Face, with scaling of the frequencies."""

from __future__ import annotations

import math
from typing import Any

import torch
from torch import Tensor

from llmrecipes.recipe.rope_config import RopeScaling


def inverse_frequencies(
    width: int, theta: float, scaling: RopeScaling | None, dtype: torch.dtype, device: torch.device
) -> Tensor:
    """Angle per position of each pair of features: ``theta ** (-2 i / width)``, [width / 2].

    Computed where it is used and never held by a module, so that ``.bfloat16()`` cannot round it.
    With ``scaling`` of kind ``llama3``, wavelengths longer than ``original_max_seq_len / low_freq_factor`` are
    stretched by ``factor``, those shorter than ``original_max_seq_len / high_freq_factor`` stay, and those between are
    blended (Llama 3.1); ``linear`` stretches all of them; ``yarn`` blends by how often a pair turns within
    ``original_max_seq_len`` (2309.00071); ``longrope`` has a factor for each pair. ``dynamic`` stretches nothing in
    texts of up to ``original_max_seq_len``, and longer ones are not computed.
    """
    exponent = torch.arange(0, width, 2, dtype=torch.int64, device=device).to(dtype) / width
    inverse = 1.0 / (theta**exponent)
    if scaling is None or scaling.kind == "dynamic":
        return inverse
    if scaling.kind == "linear":
        return inverse / scaling.factor
    if scaling.kind == "yarn":
        kept = _yarn_kept(width, theta, scaling, dtype, device)
        return inverse / scaling.factor * (1 - kept) + inverse * kept
    if scaling.kind == "longrope":
        return inverse / torch.tensor(scaling.short_factor, dtype=dtype, device=device)
    return _llama3(inverse, scaling)


def _yarn_kept(width: int, theta: float, scaling: RopeScaling, dtype: torch.dtype, device: torch.device) -> Tensor:
    """How much of each frequency is kept, [width / 2]: all that turns ``beta_fast`` times, none below ``beta_slow``."""

    def pair(turns: float) -> float:
        return width * math.log(scaling.original_max_seq_len / (turns * 2 * math.pi)) / (2 * math.log(theta))

    low, high = pair(scaling.beta_fast), pair(scaling.beta_slow)
    if scaling.truncate:
        low, high = math.floor(low), math.ceil(high)
    low, high = max(low, 0), min(high, width - 1)
    span = high - low if high != low else 0.001
    return 1 - ((torch.arange(width // 2, dtype=dtype, device=device) - low) / span).clamp(0, 1)


def _llama3(inverse: Tensor, scaling: RopeScaling) -> Tensor:
    wavelength = 2 * math.pi / inverse
    span = scaling.high_freq_factor - scaling.low_freq_factor
    smooth = (scaling.original_max_seq_len / wavelength - scaling.low_freq_factor) / span
    blended = (1 - smooth) * inverse / scaling.factor + smooth * inverse
    stretched = torch.where(
        wavelength > scaling.original_max_seq_len / scaling.low_freq_factor, inverse / scaling.factor, inverse
    )
    between = (smooth >= 0) & (smooth <= 1)
    return torch.where(between, blended, stretched)


def rotary_table(inverse: Tensor, positions: Tensor, amplitude: float = 1.0) -> tuple[Tensor, Tensor]:
    """Cosine and sine of every angle, times ``amplitude``, each [*positions.shape, width / 2], as ``inverse`` typed."""
    angles = positions.to(inverse.dtype).unsqueeze(-1) * inverse
    if amplitude == 1.0:
        return angles.cos(), angles.sin()
    return angles.cos() * amplitude, angles.sin() * amplitude


def _rotate(x: Tensor, cos: Tensor, sin: Tensor, sign: float) -> Tensor:
    half = x.shape[-1] // 2
    first, second = x[..., :half], x[..., half:]
    out = torch.empty_like(x, memory_format=torch.contiguous_format)
    torch.mul(first, cos, out=out[..., :half]).addcmul_(second, sin, value=-sign)
    torch.mul(second, cos, out=out[..., half:]).addcmul_(first, sin, value=sign)
    return out


class _Rotation(torch.autograd.Function):
    """The transpose of a rotation, scaled or not, is that by the opposite angle: only the angles are saved."""

    @staticmethod
    def forward(ctx: Any, x: Tensor, cos: Tensor, sin: Tensor) -> Tensor:
        ctx.save_for_backward(cos, sin)
        return _rotate(x, cos, sin, 1.0)

    @staticmethod
    def backward(ctx: Any, grad: Tensor) -> tuple[Tensor, None, None]:  # type: ignore[override]
        cos, sin = ctx.saved_tensors
        return _rotate(grad, cos, sin, -1.0), None, None


def apply_rotary(x: Tensor, cos: Tensor, sin: Tensor) -> Tensor:
    """Rotate the pairs (i, i + width / 2) of ``x`` [B, T, heads, >= width]; ``cos``, ``sin`` are [B|1, T, width / 2].

    Features beyond ``width`` stay as they are.
    """
    width = 2 * cos.shape[-1]
    if width < x.shape[-1]:
        return torch.cat((apply_rotary(x[..., :width], cos, sin), x[..., width:]), dim=-1)
    cos, sin = cos.to(x.dtype).unsqueeze(-2), sin.to(x.dtype).unsqueeze(-2)
    if torch.compiler.is_compiling():
        first, second = x.chunk(2, dim=-1)
        return torch.cat((first * cos - second * sin, second * cos + first * sin), dim=-1)
    return _Rotation.apply(x, cos, sin)

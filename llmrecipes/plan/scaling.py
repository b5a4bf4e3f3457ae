"""A fit of own loss points, ``L(N, D) = E + A / N^alpha + B / D^beta`` (2203.15556, approach 3), and its uncertainty.

For given exponents the rest is a linear problem, so only the exponents are searched: first on a grid, then closer and
closer around the best. There is no start to choose and no minimum to be caught in.
"""

from __future__ import annotations

import csv
import json
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
from numpy.typing import NDArray

from llmrecipes.errors import UserError
from llmrecipes.plan.units import short_count

Array = NDArray[np.float64]
_SMALLEST, _LARGEST, _GRID, _ROUNDS = 0.02, 1.5, 13, 9
RESAMPLES = 100


@dataclass(frozen=True)
class Fit:
    """The law, and the points it was fitted to.

    Attributes:
        points: [n, 3]: params, tokens, loss.
        values: E, A, alpha, B, beta. A and alpha are 0 when all points have one model size.
        draws: the same five for points whose deviations were shuffled, [resamples, 5].
        error: root mean square of the relative deviation.
    """

    points: Array
    values: Array
    draws: Array
    error: float

    def loss(self, params: float, tokens: float) -> tuple[float, float, float]:
        """Predicted loss, and the 5 % and 95 % quantiles of it."""
        many = np.array([_law(values, params, tokens) for values in self.draws])
        low, high = np.quantile(many, [0.05, 0.95])
        return float(_law(self.values, params, tokens)), float(low), float(high)

    def optimal(self, flops: float) -> tuple[float, float] | None:
        """Parameters and tokens with the smallest loss for ``6 N D`` FLOPs; None when only one size was seen."""
        _, a, alpha, b, beta = self.values
        if a <= 0 or b <= 0:
            return None
        ratio = (alpha * a / (beta * b)) ** (1 / (alpha + beta))
        params = ratio * (flops / 6) ** (beta / (alpha + beta))
        return float(params), float(flops / 6 / params)

    def as_dict(self, params: float | None, tokens: float | None) -> dict[str, Any]:
        """For JSON; with the prediction for a model where both numbers are given."""
        low, high = np.quantile(self.draws, [0.05, 0.95], axis=0)
        names = ("E", "A", "alpha", "B", "beta")
        found: dict[str, Any] = {
            name: {"value": float(v), "low": float(lo), "high": float(hi)}
            for name, v, lo, hi in zip(names, self.values, low, high, strict=True)
        }
        found |= {"points": len(self.points), "relative_error": self.error}
        if params and tokens:
            value, least, most = self.loss(params, tokens)
            found["prediction"] = {"params": params, "tokens": tokens, "loss": value, "low": least, "high": most}
        return found


def read_points(path: Path) -> Array:
    """``params``, ``tokens``, ``loss`` of every line of a CSV or JSON-lines file, [n, 3].

    Raises:
        UserError: the file, or a line of it, cannot be read; too few points.
    """
    try:
        text = path.read_text(encoding="utf-8")
    except OSError as error:
        raise UserError(f"--fit {path}: cannot be read ({error.strerror})") from None
    rows: list[list[float]] = []
    try:
        jsonl = path.suffix in (".jsonl", ".json")
        records = (
            [json.loads(x) for x in text.splitlines() if x.strip()] if jsonl else csv.DictReader(text.splitlines())
        )
        for record in records:
            rows.append([float(record[name]) for name in ("params", "tokens", "loss")])
    except (KeyError, TypeError, ValueError) as error:
        raise UserError(
            f"{path}: point {len(rows) + 1}: params, tokens and loss are needed as numbers ({error})"
        ) from None
    points = np.array(rows, dtype=np.float64).reshape(-1, 3)
    if not np.isfinite(points).all() or (points <= 0).any():
        raise UserError(f"{path}: params, tokens and loss must be numbers above 0")
    sizes = len(set(points[:, 0]))
    need = 3 if sizes == 1 else 5
    if len(points) < need or len(set(points[:, 1])) < 2:
        what = f"{path}: {len(points)} points of {sizes} model size{'s' if sizes > 1 else ''}"
        raise UserError(f"{what} do not determine the law: at least {need}, with several token counts")
    return points


def fit(points: Array, resamples: int = RESAMPLES, seed: int = 0) -> Fit:
    """Fit, and fit again ``resamples`` times with the relative deviations drawn anew (residual bootstrap)."""
    values = _search(points, None)
    predicted = _law(values, points[:, 0], points[:, 1])
    deviations = points[:, 2] / predicted - 1
    free = 5 if len(set(points[:, 0])) > 1 else 3
    wide = deviations * np.sqrt(len(points) / max(1, len(points) - free))
    random = np.random.default_rng(seed)
    draws = []
    for _ in range(resamples):
        again = points.copy()
        again[:, 2] = predicted * (1 + random.choice(wide, len(points)))
        draws.append(_search(again, (values[2], values[4])))
    return Fit(points, values, np.array(draws), float(np.sqrt(np.mean(deviations**2))))


def _law(values: Array, params: Any, tokens: Any) -> Any:
    e, a, alpha, b, beta = values
    return e + a * params**-alpha + b * tokens**-beta


def _search(points: Array, start: tuple[float, float] | None) -> Array:
    """The best five values; exponents on ever finer grids around the best so far."""
    one_size = len(set(points[:, 0])) == 1
    span = np.log(_LARGEST / _SMALLEST) / 2
    centre = np.log(np.array(start if start and min(start) > 0 else (0.17, 0.17 if start is None else start[1])))
    best: tuple[float, Array] = (np.inf, np.zeros(5))
    rounds = _ROUNDS if start is None else _ROUNDS - 2
    span *= 1 if start is None else 0.3
    for _ in range(rounds):
        steps = np.linspace(-span, span, _GRID)
        for log_alpha in [0.0] if one_size else centre[0] + steps:
            for log_beta in centre[1] + steps:
                alpha, beta = (0.0 if one_size else float(np.exp(log_alpha))), float(np.exp(log_beta))
                cost, values = _linear(points, alpha, beta, one_size)
                if cost < best[0]:
                    best = (cost, values)
        centre = np.log(np.maximum(best[1][[2, 4]], 1e-6)) if not one_size else np.array([0.0, np.log(best[1][4])])
        span *= 0.4
    return best[1]


def _linear(points: Array, alpha: float, beta: float, one_size: bool) -> tuple[float, Array]:
    """E, A, B >= 0 for given exponents by least squares of the relative deviation, and its sum of squares."""
    params, tokens, loss = points.T
    # Scaled by the geometric mean: powers of 1e9 would make the columns differ by many digits.
    scale_n, scale_d = np.exp(np.log(params).mean()), np.exp(np.log(tokens).mean())
    columns = [np.ones_like(loss), (tokens / scale_d) ** -beta]
    if not one_size:
        columns.append((params / scale_n) ** -alpha)
    matrix = np.stack(columns, 1) / loss[:, None]
    keep = list(range(len(columns)))
    while True:
        found = np.linalg.lstsq(matrix[:, keep], np.ones_like(loss), rcond=None)[0]
        if (found >= 0).all() or len(keep) == 1:
            break
        keep.pop(int(found.argmin()))  # a term that would be negative is none
    whole = np.zeros(3)
    whole[keep] = np.maximum(found, 0)
    cost = float(((matrix @ whole[: len(columns)] - 1) ** 2).sum())
    return cost, np.array([whole[0], whole[2] * scale_n**alpha, alpha, whole[1] * scale_d**beta, beta])


def show_fit(found: Fit, params: float | None, tokens: float | None) -> str:
    """The fit as a table."""
    said = found.as_dict(params, tokens)
    one_size = len(set(found.points[:, 0])) == 1
    law = "E + B / D^beta (one model size)" if one_size else "E + A / N^alpha + B / D^beta"
    lines = [f"loss = {law}, {len(found.points)} points, off by {found.error:.2%} (root mean square)"]
    lines.append(f"  {'':8}{'fit':>12}{'5 %':>12}{'95 %':>12}")
    for name in ("E", "B", "beta") if one_size else ("E", "A", "alpha", "B", "beta"):
        value = said[name]
        lines.append(f"  {name:8}{value['value']:12.4g}{value['low']:12.4g}{value['high']:12.4g}")
    if "prediction" in said:
        p = said["prediction"]
        at = f"{short_count(p['params'])} parameters, {short_count(p['tokens'])} tokens"
        lines.append(f"  {at}: loss {p['loss']:.4f} ({p['low']:.4f} to {p['high']:.4f})")
        best = found.optimal(6 * p["params"] * p["tokens"])
        if best is not None:
            lines.append(f"  best for these FLOPs: {short_count(best[0])} parameters, {short_count(best[1])} tokens")
    return "\n".join(lines)


def draw(found: Fit, picture: Path) -> None:
    """Points, curves and the 5 to 95 % band over tokens, one colour for each model size."""
    from matplotlib.backends.backend_agg import FigureCanvasAgg
    from matplotlib.figure import Figure

    figure = Figure(figsize=(8, 5), layout="constrained")
    FigureCanvasAgg(figure)
    axes = figure.subplots()
    tokens = found.points[:, 1]
    grid = np.geomspace(tokens.min() / 1.5, tokens.max() * 4, 60)
    for number, size in enumerate(sorted(set(found.points[:, 0]))):
        mine = found.points[found.points[:, 0] == size]
        colour = f"C{number % 10}"
        curves = np.stack([_law(values, size, grid) for values in found.draws])
        low, high = np.quantile(curves, [0.05, 0.95], axis=0)
        axes.fill_between(grid, low, high, color=colour, alpha=0.2, linewidth=0)
        axes.plot(grid, _law(found.values, size, grid), color=colour, linewidth=1)
        axes.plot(mine[:, 1], mine[:, 2], "o", color=colour, markersize=4, label=f"{short_count(size)} parameters")
    axes.set_xscale("log")
    axes.set_xlabel("tokens")
    axes.set_ylabel("loss")
    axes.grid(alpha=0.3)
    axes.legend(fontsize=8)
    picture.parent.mkdir(parents=True, exist_ok=True)
    figure.savefig(picture, dpi=120)

"""What watches a run: progress line and metrics file, samples, loss curve, graceful stop."""

from __future__ import annotations

from typing import Any

from llmrecipes.lazy import named

_HOME = {
    "GracefulStop": "graceful_stop",
    "Logging": "logging",
    "LossCurve": "loss_curve",
    "RoutingMap": "routing_map",
    "Samples": "samples",
    "StabilityGuard": "stability_guard",
    "draw_loss_curve": "loss_curve",
}
__all__ = sorted(_HOME)


def __getattr__(name: str) -> Any:
    """Import on first use: a report reads metrics without Lightning."""
    return named(__name__, _HOME, name)


def __dir__() -> list[str]:
    return __all__

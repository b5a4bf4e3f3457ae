"""What watches a run: progress line and metrics file, samples, loss curve, graceful stop."""

from llmrecipes.callbacks.graceful_stop import GracefulStop
from llmrecipes.callbacks.logging import Logging
from llmrecipes.callbacks.loss_curve import LossCurve, draw_loss_curve
from llmrecipes.callbacks.routing_map import RoutingMap
from llmrecipes.callbacks.samples import Samples
from llmrecipes.callbacks.stability_guard import StabilityGuard

__all__ = ["GracefulStop", "Logging", "LossCurve", "RoutingMap", "Samples", "StabilityGuard", "draw_loss_curve"]

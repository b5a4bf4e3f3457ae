"""What watches a run: progress line and metrics file, samples, loss curve, graceful stop."""

from llmrecipes.callbacks.graceful_stop import GracefulStop
from llmrecipes.callbacks.logging import Logging
from llmrecipes.callbacks.loss_curve import LossCurve, draw_loss_curve
from llmrecipes.callbacks.samples import Samples

__all__ = ["GracefulStop", "Logging", "LossCurve", "Samples", "draw_loss_curve"]

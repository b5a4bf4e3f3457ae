"""The run as a picture: loss, learning rate, gradient norm and, with experts, their balance."""

from __future__ import annotations

import logging
import warnings
from pathlib import Path
from typing import Any

import lightning.pytorch as L

from llmrecipes.callbacks.media import show_image
from llmrecipes.callbacks.metrics_file import read_metrics

log = logging.getLogger("llmrecipes")


class LossCurve(L.Callback):
    """Draws ``loss.png`` from ``metrics.jsonl`` when training ends, whether finished or stopped."""

    def on_train_end(self, trainer: L.Trainer, pl_module: L.LightningModule) -> None:
        folder = Path(trainer.default_root_dir)
        if trainer.is_global_zero and draw_loss_curve(folder / "metrics.jsonl", folder / "loss.png"):
            log.info(f"curve {folder / 'loss.png'}")
            show_image(trainer.loggers, "loss_curve", folder / "loss.png", trainer.global_step)


def draw_loss_curve(metrics: Path, picture: Path) -> bool:
    """Draw a metrics file; False when it has fewer than two training records.

    Args:
        metrics: a ``metrics.jsonl``.
        picture: PNG to write.
    """
    records = list(read_metrics(metrics))
    # Figures that were not finite stand there as null.
    steps = [r for r in records if r.get("loss") is not None and r["grad_norm"] is not None]
    if len(steps) < 2:
        return False
    # Matplotlib takes most of a second to import, and only the end of a run needs it.
    from matplotlib.backends.backend_agg import FigureCanvasAgg
    from matplotlib.figure import Figure

    has_experts = "max_violation" in steps[0]
    figure = Figure(figsize=(9, 7.2 if has_experts else 5.6), layout="constrained")
    FigureCanvasAgg(figure)
    axes = figure.subplots(
        4 if has_experts else 3, 1, sharex=True, height_ratios=[3, 1, 1, 1][: 4 if has_experts else 3]
    )
    _draw_losses(axes[0], steps, [r for r in records if "val_loss" in r])
    x = [r["tokens"] / 1e6 for r in steps]
    axes[1].plot(x, [r["lr"] for r in steps], color="tab:purple")
    axes[1].set_ylabel("learning rate")
    axes[2].semilogy(x, [r["grad_norm"] for r in steps], color="tab:gray", linewidth=0.8)
    axes[2].set_ylabel("gradient norm")
    if has_experts:
        for layer in range(len(steps[0]["max_violation"])):
            axes[3].plot(x, [r["max_violation"][layer] for r in steps], linewidth=0.8, label=f"layer {layer}")
        axes[3].set_ylabel("max violation")
        axes[3].legend(fontsize=7, ncols=4)
    axes[-1].set_xlabel("million tokens")
    for axis in axes:
        axis.grid(alpha=0.25)
    figure.suptitle(metrics.parent.name)
    with warnings.catch_warnings():
        # A letter that the machine's fonts lack, a gradient norm of zero on a logarithmic axis: nothing to act on.
        warnings.simplefilter("ignore", UserWarning)
        figure.savefig(picture, dpi=120)
    return True


def _draw_losses(axis: Any, steps: list[dict[str, Any]], validations: list[dict[str, Any]]) -> None:
    axis.plot(
        [r["tokens"] / 1e6 for r in steps],
        [r["loss"] for r in steps],
        linewidth=0.9,
        color="0.55",
        label="training",
    )
    per_step = steps[-1]["tokens"] / steps[-1]["step"] / 1e6
    names = [name for name in (validations[-1] if validations else {}) if name.startswith("val_loss")]
    for name in names:
        x = [r["step"] * per_step for r in validations]
        overall = name == "val_loss"
        label = "validation" if overall else name.partition("/")[2]
        axis.plot(
            x,
            [r[name] for r in validations],
            "o-" if overall else ".--",
            markersize=4,
            linewidth=1.6 if overall else 0.8,
            label=label,
        )
    axis.set_ylabel("loss (nats per token)")
    axis.legend(fontsize=8)

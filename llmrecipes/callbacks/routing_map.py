"""Which domain goes to which expert: figures after each validation, a picture at the end."""

from __future__ import annotations

import json
import logging
from pathlib import Path
from typing import Any

import lightning.pytorch as L

from llmrecipes.callbacks.media import show_image

log = logging.getLogger("llmrecipes")


class RoutingMap(L.Callback):
    """Writes ``routing.json`` after each validation of a router stage, and draws ``routing.png`` from it at the end."""

    def on_validation_end(self, trainer: L.Trainer, pl_module: Any) -> None:
        shares = getattr(pl_module, "validation_routing", None)
        if not shares or not trainer.is_global_zero:
            return
        record = {
            "step": trainer.global_step,
            "experts": pl_module.expert_names,
            "routers": pl_module.router_names,
            "shares": {name: share.tolist() for name, share in shares.items()},
        }
        path = Path(trainer.default_root_dir) / "routing.json"
        path.write_text(json.dumps(record, ensure_ascii=False) + "\n", encoding="utf-8")

    def on_train_end(self, trainer: L.Trainer, pl_module: Any) -> None:
        folder = Path(trainer.default_root_dir)
        if not trainer.is_global_zero or not getattr(pl_module, "validation_routing", None):
            return
        draw_routing(folder / "routing.json", folder / "routing.png")
        log.info(f"routing {folder / 'routing.png'}")
        show_image(trainer.loggers, "routing", folder / "routing.png", trainer.global_step)


def draw_routing(figures: Path, picture: Path) -> None:
    """Draw a heat map: domains x experts, the mean over routers, and below it each router by itself.

    Args:
        figures: a ``routing.json``. picture: PNG to write.
    """
    # Matplotlib takes most of a second to import, and only the end of a run needs it.
    import numpy as np
    from matplotlib.backends.backend_agg import FigureCanvasAgg
    from matplotlib.figure import Figure

    record = json.loads(figures.read_text(encoding="utf-8"))
    domains, experts, routers = list(record["shares"]), record["experts"], record["routers"]
    shares = np.array([record["shares"][domain] for domain in domains])  # [domains, routers, experts]
    width = min(24.0, max(6.0, 1.2 * len(experts), 0.16 * len(routers) * len(experts)))
    figure = Figure(figsize=(width, 2.4 + 0.8 * len(domains)), layout="constrained")
    FigureCanvasAgg(figure)
    top, bottom = figure.subplots(2, 1, height_ratios=[3, 2])
    mean = shares.mean(1)
    image = top.imshow(mean, vmin=0, vmax=1, cmap="Blues", aspect="auto")
    for row, column in np.ndindex(mean.shape):
        dark = mean[row, column] > 0.6
        top.text(column, row, f"{100 * mean[row, column]:.0f} %", ha="center", va="center", color="w" if dark else "k")
    top.set_xticks(range(len(experts)), [f"expert {name}" if name.isdecimal() else name for name in experts])
    top.set_yticks(range(len(domains)), domains)
    top.set_title(f"{figures.parent.name}, step {record['step']}: share of tokens, mean over {len(routers)} routers")
    bottom.imshow(shares.reshape(len(domains), -1), vmin=0, vmax=1, cmap="Blues", aspect="auto")
    for edge in range(1, len(routers)):
        bottom.axvline(edge * len(experts) - 0.5, color="0.6", linewidth=0.5)
    shown = range(0, len(routers), max(1, len(routers) // 24))
    bottom.set_xticks([(i + 0.5) * len(experts) - 0.5 for i in shown], [routers[i] for i in shown], fontsize=7)
    bottom.set_yticks(range(len(domains)), domains, fontsize=7)
    bottom.set_xlabel("each router: its experts side by side")
    figure.colorbar(image, ax=[top, bottom], shrink=0.6)
    figure.savefig(picture, dpi=120)

"""Which domain goes to which expert: of router runs from ``routing.json``, of others from perplexity by domain."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from functools import partial
from pathlib import Path
from typing import Any

from llmrecipes.evaluate.report.gather import Run
from llmrecipes.evaluate.report.plots import label, save
from llmrecipes.evaluate.store import read_json


@dataclass(frozen=True)
class Routing:
    """Shares of tokens.

    Attributes:
        domains: one picture each.
        routers: rows of a picture: layers, or linear maps of layers.
        experts: columns.
        shares: ``[domain][router][expert]``.
        source: where from.
    """

    domains: list[str]
    routers: list[str]
    experts: list[str]
    shares: list[list[list[float]]]
    source: str


def draw_routers(runs: Sequence[Run], folder: Path) -> list[tuple[str, str, Path]]:
    """A picture for each run with experts whose routing by domain is known."""
    pictures = []
    for number, run in enumerate(runs):
        for found in routing_of(run)[:1]:
            path = folder / f"router_by_domain_{number}.png"
            height = 1.4 + min(12.0, max(1.2, 0.22 * len(found.routers)))
            save(partial(_maps, found=found), (max(6.0, 2.2 * len(found.domains)), height), path)
            text = f"share of each domain's tokens that each expert gets; {found.source}"
            pictures.append((f"Router by domain of {run.name}", text, path))
    return pictures


def routing_of(run: Run) -> list[Routing]:
    """What is known, the training's own figures first."""
    found = []
    known = read_json(run.folder / "routing.json")
    if known:
        domains = list(known["shares"])
        shares = [known["shares"][domain] for domain in domains]
        found.append(
            Routing(domains, known["routers"], known["experts"], shares, f"validation at step {known['step']}")
        )
    for summary in run.summaries:
        tasks = [task for task in summary["tasks"] if task.get("routing")]
        sizes = {(len(task["routing"]), len(task["routing"][0])) for task in tasks}
        if len(tasks) > 1 and len(sizes) == 1:
            ((routers, experts),) = sizes
            found.append(
                Routing(
                    [task["task"] for task in tasks],
                    [str(i) for i in range(routers)],
                    [str(i) for i in range(experts)],
                    [task["routing"] for task in tasks],
                    f"perplexity texts of {summary['name']}",
                )
            )
    return found


def _maps(figure: Any, found: Routing) -> None:
    axes = figure.subplots(1, len(found.domains), sharey=True, squeeze=False)[0]
    even = 1 / len(found.experts)
    top = max(2 * even, max(max(row) for domain in found.shares for row in domain))
    image = None
    shown = range(0, len(found.routers), max(1, len(found.routers) // 24))
    for axis, domain, shares in zip(axes, found.domains, found.shares, strict=True):
        image = axis.imshow(shares, aspect="auto", vmin=0, vmax=top, cmap="Blues", interpolation="nearest")
        axis.set_title(label(domain), fontsize=9)
        step = max(1, len(found.experts) // 12)
        places = range(0, len(found.experts), step)
        axis.set_xticks(places, [label(found.experts[i]) for i in places], fontsize=7)
        axis.set_xlabel("expert", fontsize=8)
    axes[0].set_yticks(shown, [label(found.routers[i]) for i in shown], fontsize=7)
    axes[0].set_ylabel("router (layer)", fontsize=8)
    figure.colorbar(image, ax=list(axes))

"""Validation and training loss of several runs in one picture.

python benchmarks/compare_curves.py runs/moe_real runs/dense_real --output curves.png
"""

from __future__ import annotations

import argparse
from pathlib import Path

from llmrecipes.callbacks.metrics_file import read_metrics


def main() -> None:
    """Draw one line of training losses (thin) and one of validation losses (dots) per run."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("runs", type=Path, nargs="+", help="run folders")
    parser.add_argument("--output", type=Path, required=True, help="PNG to write")
    arguments = parser.parse_args()
    from matplotlib.backends.backend_agg import FigureCanvasAgg
    from matplotlib.figure import Figure

    figure = Figure(figsize=(8, 4.6), layout="constrained")
    FigureCanvasAgg(figure)
    axis = figure.subplots()
    for number, run in enumerate(arguments.runs):
        records = list(read_metrics(run / "metrics.jsonl"))
        steps = [r for r in records if "loss" in r]
        validations = [r for r in records if "val_loss" in r]
        millions = steps[-1]["tokens"] / steps[-1]["step"] / 1e6
        colour = f"C{number}"
        axis.plot(
            [r["tokens"] / 1e6 for r in steps], [r["loss"] for r in steps], color=colour, linewidth=0.7, alpha=0.4
        )
        x, y = [r["step"] * millions for r in validations], [r["val_loss"] for r in validations]
        axis.plot(x, y, "o-", color=colour, label=f"{run.name}: {y[-1]:.4f}")
    axis.set_xlabel("million tokens")
    axis.set_ylabel("loss (nats per token); dots: validation")
    axis.grid(alpha=0.25)
    axis.legend()
    figure.savefig(arguments.output, dpi=110)


if __name__ == "__main__":
    main()

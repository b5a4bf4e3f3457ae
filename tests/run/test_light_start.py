"""A command imports what it uses: the start of a program is paid at every stage of a life-cycle."""

from __future__ import annotations

import subprocess
import sys
from pathlib import Path

import pytest

# Module of a command, and what it has no use for.
LIGHT = [
    ("llmrecipes.evaluate.report.page", ("torch", "lightning", "transformers", "scipy")),
    ("llmrecipes.evaluate.run", ("lightning", "torchmetrics", "transformers", "scipy", "matplotlib")),
    ("llmrecipes.inference.generate_command", ("lightning", "torchmetrics", "transformers", "scipy", "matplotlib")),
    ("llmrecipes.convert.merge_lora", ("lightning", "torchmetrics", "transformers", "scipy", "matplotlib")),
    ("llmrecipes.convert.from_hf", ("lightning", "torchmetrics", "transformers", "scipy", "matplotlib")),
]
FIT = "from llmrecipes.run.postponed import postpone_metrics; postpone_metrics(); import llmrecipes.run.fit"
OF_FIT = ("torchmetrics.text", "torchmetrics.functional", "transformers", "scipy", "matplotlib")


def run(code: str, *path: Path) -> str:
    paths = [str(folder) for folder in path]
    done = subprocess.run(
        [sys.executable, "-c", f"import sys; sys.path[:0] = {paths}\n{code}"], capture_output=True, text=True
    )
    assert done.returncode == 0, done.stderr
    return done.stdout


def loaded(code: str, names: tuple[str, ...]) -> list[str]:
    return run(f"{code}\nimport sys\nprint(*[name for name in {names} if name in sys.modules])").split()


@pytest.mark.parametrize(("module", "unused"), LIGHT)
def test_commands_leave_out_what_they_do_not_use(module: str, unused: tuple[str, ...]) -> None:
    assert loaded(f"import {module}", unused) == []


def test_training_leaves_out_metrics_and_what_they_bring() -> None:
    assert loaded(FIT, OF_FIT) == []
    # The mutant: Lightning by itself brings them.
    assert {"torchmetrics.text", "torchmetrics.functional", "matplotlib"} <= set(
        loaded("import lightning.pytorch", OF_FIT)
    )


def test_postponed_metrics_are_the_same_when_asked_for() -> None:
    code = f"""{FIT}
import torchmetrics
from lightning.pytorch.core.module import Metric, MetricCollection
assert "torchmetrics.aggregation" not in sys.modules
from torchmetrics import MeanMetric
assert issubclass(MeanMetric, Metric) and torchmetrics.Metric is Metric
assert torchmetrics.MetricCollection is MetricCollection
assert torchmetrics.functional.accuracy and torchmetrics.__version__ and len(torchmetrics.__all__) > 100
mean = MetricCollection({{"mean": MeanMetric()}})
mean.update(1.0); mean.update(2.0)
assert float(mean.compute()["mean"]) == 1.5
assert "matplotlib" in sys.modules  # the real package brought it
from torchmetrics.utilities.plot import plot_single_or_multi_val
assert plot_single_or_multi_val.__module__ == "torchmetrics.utilities.plot"
figure, axes = mean["mean"].plot()
assert axes.get_ylabel() and type(figure).__name__ == "Figure"
try:
    torchmetrics.no_such_metric
except AttributeError:
    print("done")
"""
    assert run(code) == "done\n"


def test_a_package_made_otherwise_is_imported_whole(tmp_path: Path) -> None:
    package = tmp_path / "torchmetrics"
    package.mkdir()
    (package / "__init__.py").write_text("from torchmetrics.base import Metric\nwhole = True\n")
    (package / "base.py").write_text("class Metric: ...\n")
    code = "from llmrecipes.run.postponed import postpone_metrics; postpone_metrics()\n"
    assert run(f"{code}import torchmetrics; print(torchmetrics.whole, torchmetrics.Metric.__name__)", tmp_path) == (
        "True Metric\n"
    )

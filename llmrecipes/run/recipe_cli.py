"""LightningCLI with our Trainer defaults, our sections of a recipe, and short errors."""

from __future__ import annotations

import re
import sys
from pathlib import Path
from typing import Any, Literal

import lightning.pytorch as L
from jsonargparse.typing import register_type
from lightning.pytorch.cli import LightningArgumentParser, LightningCLI
from lightning.pytorch.trainer.connectors.signal_connector import _SignalConnector
from lightning.pytorch.utilities.exceptions import MisconfigurationException

from llmrecipes.callbacks.graceful_stop import GracefulStop
from llmrecipes.callbacks.logging import Logging
from llmrecipes.callbacks.loss_curve import LossCurve
from llmrecipes.callbacks.routing_map import RoutingMap
from llmrecipes.callbacks.samples import Samples
from llmrecipes.callbacks.stability_guard import StabilityGuard
from llmrecipes.checkpoint import checkpoints
from llmrecipes.checkpoint.callback import Checkpoints
from llmrecipes.data import StepData
from llmrecipes.distributed import ShardedStrategy
from llmrecipes.distributed.rank_status import FILE as RANKS_FILE
from llmrecipes.errors import UserError
from llmrecipes.modules import StepModule
from llmrecipes.recipe import Duration, TimeSpan
from llmrecipes.run.lr_changes import ResumeLR
from llmrecipes.run.rollback import roll_back
from llmrecipes.run.wandb_run import give_run_id

register_type(Duration, str, Duration.parse)
register_type(TimeSpan, str, TimeSpan.parse)

SUBCOMMANDS = ("fit", "validate")

# Where Lightning's defaults are wrong for pretraining: epochs, its own checkpoints, samplers, a summary of every layer.
TRAINER_DEFAULTS: dict[str, Any] = {
    "max_epochs": -1,
    "check_val_every_n_epoch": None,
    "num_sanity_val_steps": 0,
    "accelerator": "auto",
    "devices": 1,
    "logger": False,
    "enable_checkpointing": False,
    "enable_progress_bar": False,
    "enable_model_summary": False,
    "use_distributed_sampler": False,
}


class RecipeParser(LightningArgumentParser):
    """No abbreviations, and one short message instead of pages of usage."""

    def __init__(self, *args: Any, **kwargs: Any) -> None:
        kwargs.setdefault("allow_abbrev", False)
        super().__init__(*args, **kwargs)

    def error(self, message: str, ex: Exception | None = None) -> Any:
        if not self.exit_on_error:
            return super().error(message, ex)
        noise = (
            r"(?m)^\s*(Does not validate against any.*|Subtypes: .*|Errors:|"
            r"- Expected a <class 'NoneType'>|Given value.*)\n?"
        )
        raise UserError(re.sub(noise, "", str(message) + "\n").strip())


class RecipeCLI(LightningCLI):
    """Parses a recipe and builds module, data and trainer; :mod:`llmrecipes.run.fit` runs them.

    Args:
        subcommand: ``fit`` or ``validate``; only its parser is built.
        args: the words after it. ``sys.argv`` is parsed itself when it holds the same: Lightning's launcher replays it.
    """

    def __init__(self, subcommand: str, args: list[str]) -> None:
        self._only = subcommand
        self._words = words = [subcommand, *args]
        super().__init__(
            model_class=StepModule,
            datamodule_class=StepData,
            subclass_mode_model=True,
            subclass_mode_data=True,
            save_config_callback=None,
            trainer_defaults=TRAINER_DEFAULTS,
            auto_configure_optimizers=False,
            load_from_checkpoint_support=False,
            parser_class=RecipeParser,
            args=None if sys.argv[1:] == words else words,
        )

    def subcommands(self: Any = None) -> dict[str, set[str]]:  # type: ignore[override]
        skip = {
            "model",
            "train_dataloaders",
            "val_dataloaders",
            "dataloaders",
            "datamodule",
            "ckpt_path",
            "weights_only",
            "verbose",
        }
        names = SUBCOMMANDS if self is None else (self._only,)
        return dict.fromkeys(names, skip)

    def add_default_arguments_to_parser(self, parser: LightningArgumentParser) -> None:
        parser.add_argument("--name", type=str | None, default=None, help="of the run folder; null = the recipe file's")
        parser.add_argument("--seed", type=int, default=0, help="of the initial weights and of dropout")
        parser.add_argument("--run_root", type=str, default="runs", help="where run folders are")
        parser.add_argument(
            "--resume", type=Literal["auto", "never", "required"], default="auto", help="go on from the run folder"
        )
        parser.add_argument(
            "--cool_down",
            type=Duration | None,
            default=None,
            help="end the run now: let the rate fall over this length",
        )
        parser.add_argument(
            "--resume_lr", type=ResumeLR, default="keep", help="whether a resumed run may change its learning rate"
        )

    def add_arguments_to_parser(self, parser: LightningArgumentParser) -> None:
        parser.link_arguments("seed", "model.init_args.seed")
        parser.link_arguments("model.init_args.config.vocab_size", "data.init_args.vocab_size")
        # First of all: who looks at a step sees what the guard made of it.
        parser.add_lightning_class_args(StabilityGuard, "stability")
        parser.add_lightning_class_args(Logging, "logging")
        parser.add_lightning_class_args(Checkpoints, "checkpoint")
        parser.add_lightning_class_args(Samples, "samples")
        # After all who look at a step: what they do belongs to it.
        parser.add_lightning_class_args(GracefulStop, "stop")

    def before_instantiate_classes(self) -> None:
        # Written down, so that the resolved recipe belongs to the same run wherever it is copied.
        self.settings["name"] = self.settings["name"] or Path(str(self.settings["config"][0])).stem
        self._resolved = self._parser(self._only).dump(self.settings, skip_unset=False, skip_link_targets=True)
        self.wandb_id = give_run_id(self.settings["trainer"], self.folder, fresh=self.settings["resume"] == "never")

    def _set_seed(self) -> None:
        L.seed_everything(self.settings["seed"], verbose=False)

    def _parse_ckpt_path(self) -> None:
        """Hyper-parameters stored in a checkpoint never override a recipe."""

    def _run_subcommand(self, subcommand: str) -> None:
        """Building and running are two things: llmrecipes.run.fit does the second."""

    @property
    def settings(self) -> Any:
        """The parsed recipe."""
        return self.config[self._only]

    @property
    def folder(self) -> Path:
        """The run folder, ``RUN_ROOT/<recipe name>``."""
        return Path(self.settings["run_root"]) / self.settings["name"]

    @property
    def resolved_recipe(self) -> str:
        """The recipe with every default and override, as YAML that ``fit --config`` takes."""
        return self._resolved

    @property
    def starts_processes(self) -> bool:
        """Whether this process starts the others itself; torchrun and srun have started them already."""
        environment = getattr(self.trainer.strategy, "cluster_environment", None)
        return environment is not None and not environment.creates_processes_externally

    def callback(self, kind: type) -> Any:
        """The one callback of this class that the recipe configured."""
        callbacks: list[Any] = self.trainer.callbacks  # type: ignore[attr-defined]
        return next(c for c in callbacks if isinstance(c, kind))

    def instantiate_trainer(self, **kwargs: Any) -> L.Trainer:
        try:
            trainer: Any = super().instantiate_trainer(default_root_dir=str(self.folder), **kwargs)
        except (MisconfigurationException, ValueError, TypeError) as error:  # what only this machine can know: no GPU
            raise UserError(f"trainer: {str(error).splitlines()[0]}") from error
        saver = next(c for c in trainer.callbacks if isinstance(c, Checkpoints))
        next(c for c in trainer.callbacks if isinstance(c, StabilityGuard)).roll_back = roll_back
        next(c for c in trainer.callbacks if isinstance(c, GracefulStop)).save = saver.save
        trainer.callbacks += [LossCurve(), RoutingMap()]
        # Lightning's own way with signals saves or broadcasts in the middle of a step, and asks all at each batch.
        trainer._signal_connector = NoSignals(trainer)
        trainer.fit_loop.epoch_loop._broadcast_sigterm_tensor = lambda: None
        if isinstance(trainer.strategy, ShardedStrategy):
            trainer.strategy.advice = self._advice
            trainer.strategy.status_file = self.folder / RANKS_FILE
            trainer.strategy.launch_command = [sys.executable, "-m", "llmrecipes", *self._words]
        return trainer

    def _advice(self) -> str:
        """What to do after the job was lost."""
        saved = checkpoints(self.folder / "checkpoints")
        return f"the same command goes on from {saved[-1]}" if saved else "no checkpoint was written yet"


class NoSignals(_SignalConnector):
    """Leaves signals to :class:`llmrecipes.process.StopSignals`."""

    def register_signal_handlers(self) -> None:
        """Nothing."""

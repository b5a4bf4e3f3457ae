"""``llmrecipes fit`` and ``validate``: check, build, resume, run."""

from __future__ import annotations

import logging
import warnings
from pathlib import Path
from typing import Any

import yaml

from llmrecipes.callbacks import GracefulStop, Logging, draw_loss_curve
from llmrecipes.callbacks.graceful_stop import EXIT_RESUMABLE
from llmrecipes.callbacks.metrics_file import MetricsFile, read_metrics
from llmrecipes.checkpoint import Checkpoints, newest_whole, read_info, read_tensors
from llmrecipes.errors import UserError
from llmrecipes.optim import RunLength
from llmrecipes.recipe import Duration
from llmrecipes.run.environment import record_launch
from llmrecipes.run.folder import Resume, decide_resume, lock, mark_done
from llmrecipes.run.log import start_log
from llmrecipes.run.recipe_cli import RecipeCLI

log = logging.getLogger("llmrecipes")

# Settings that may differ between launches of one run: they change how it is computed or watched, not what is computed.
FREE_DATA_KEYS = ("micro_batch", "tokenizer", "valid", "valid_batches", "train", "vocab_size")


def run(subcommand: str, args: list[str]) -> int:
    """Run a subcommand of LightningCLI.

    Returns:
        The exit code: 0 done, 75 stopped on request and resumable.

    Raises:
        UserError: for everything the user can mend.
        TrainingStopped: training cannot go on.
    """
    quiet_lightning()
    start_log()
    cli = RecipeCLI(subcommand, args)
    return {"fit": fit, "validate": validate}[subcommand](cli, cli.folder)


def fit(cli: RecipeCLI, folder: Path) -> int:
    """Train, from scratch or from the newest whole checkpoint of the run folder."""
    _refuse_many_processes(cli)
    cli.datamodule.prepare_data()
    owner = lock(folder, must_hold_checkpoints=cli.settings["resume"] == "required")
    start_log(folder)
    cli.model.trajectory = trajectory(cli)
    resume = decide_resume(folder, cli.settings["resume"], cli.model.trajectory)
    record_launch(folder, cli.resolved_recipe)
    if resume is not None:
        cli.callback(Checkpoints).resume_from = resume.path
        cli.datamodule.start_step = resume.step
    elif (metrics := folder / "metrics.jsonl").exists():
        metrics.unlink()
    end = _apply_cool_down(cli, resume)
    if resume is not None and resume.step >= end:
        log.info(f"nothing to do: {resume.step} of {end} steps are done")
        if not (folder / "DONE").exists():
            _finish(cli, folder, resume)
        return 0
    (folder / "DONE").unlink(missing_ok=True)
    for line in describe(cli, end):
        log.info(line)
    cli.trainer.fit(cli.model, datamodule=cli.datamodule)
    owner.close()
    if cli.callback(GracefulStop).stopped:
        return EXIT_RESUMABLE
    mark_done(folder, cli.trainer.global_step)
    log.info(f"done: {cli.trainer.global_step} steps; run folder {folder}")
    return 0


def _finish(cli: RecipeCLI, folder: Path, resume: Resume) -> None:
    """Make up for what a kill between the last checkpoint and the end of the run prevented."""
    path = folder / "metrics.jsonl"
    if not any("val_loss" in record and record["step"] == resume.step for record in read_metrics(path)):
        _validate_checkpoint(cli, resume.path)
        if cli.model.validation_metrics:
            file = MetricsFile(path)
            file.append({"step": resume.step, **cli.model.validation_metrics})
            file.close()
    draw_loss_curve(path, folder / "loss.png")
    mark_done(folder, resume.step)


def _refuse_many_processes(cli: RecipeCLI) -> None:
    if (ranks := cli.trainer.world_size) > 1:
        raise UserError(
            f"the recipe asks for {ranks} processes (trainer.devices x trainer.num_nodes); this version trains in one: "
            "set trainer.devices and trainer.num_nodes to 1"
        )


def validate(cli: RecipeCLI, folder: Path) -> int:
    """Validation loss of the run's newest whole checkpoint."""
    path, broken = newest_whole(folder / "checkpoints")
    for sentence in broken:
        log.warning(sentence)
    if path is None:
        raise UserError(f"{folder}/checkpoints: no whole checkpoint to validate; train first with llmrecipes fit")
    _validate_checkpoint(cli, path)
    return 0


def _validate_checkpoint(cli: RecipeCLI, path: Path) -> None:
    cli.model.configure_model()
    cli.model.model.load_state_dict(read_tensors(path, "model"), strict=True)
    cli.callback(Logging).validated_step = step = read_info(path)["step"]
    log.info(f"validating {path} ({step} steps)")
    cli.trainer.validate(cli.model, datamodule=cli.datamodule, verbose=False)


def trajectory(cli: RecipeCLI) -> dict[str, Any]:
    """The settings that decide what is computed: equal ones give equal losses; a resumed run must not change them."""
    recipe = yaml.safe_load(cli.resolved_recipe)
    model = recipe["model"]["init_args"]
    length = RunLength(cli.trainer.max_steps, cli.datamodule.tokens_per_step)
    data = {k: v for k, v in recipe["data"]["init_args"].items() if k not in FREE_DATA_KEYS}
    return {
        "seed": recipe["seed"],
        "model": {k: v for k, v in model.items() if k not in ("expected_params", "loss_chunk", "seed")},
        "data": data | {"shards": cli.datamodule.fingerprint()["train"]},
        "trainer": {"precision": cli.trainer.precision},
        # With decay: null the schedule ends with the run: another trainer.max_steps is then another schedule.
        "step at which the learning rate reaches its floor": cli.model.schedule.decay_steps(length),
    }


def _apply_cool_down(cli: RecipeCLI, resume: Resume | None) -> int:
    """Start the cool-down asked for now, or go on with the recorded one; returns the last step of the run."""
    asked = cli.settings["cool_down"]
    recorded = resume.progress["cool_down"] if resume else None
    if recorded:
        start, duration = recorded[0], Duration.parse(recorded[1])
        if asked is not None:
            log.info(f"the cool-down begun at step {start} over {duration} goes on; --cool_down is not applied again")
    elif asked is None:
        return cli.trainer.max_steps
    elif resume is None:
        raise UserError("--cool_down ends a run that has begun: there is no checkpoint to start it from")
    else:
        start, duration = resume.step, asked
    end = start + duration.to_steps(cli.datamodule.tokens_per_step)
    log.info(f"cooling down from step {start} to the end at step {end}")
    cli.model.start_cool_down = (start, duration)
    return end


def describe(cli: RecipeCLI, end: int) -> list[str]:
    """What is about to run up to step ``end``, for the log's first lines."""
    config, data, trainer = cli.model.config, cli.datamodule, cli.trainer
    sizes = f"model {config.num_params:,} parameters"
    if config.moe:
        sizes += f", {config.active_params:,} active ({config.moe.num_experts} experts, top {config.moe.top_k})"
    accumulation = data.global_batch // data.micro_batch
    lines = [
        f"run folder {trainer.default_root_dir}",
        f"{sizes}; {trainer.precision} on {trainer.world_size} x {cli.trainer.strategy.root_device.type}",
        f"step: {data.global_batch} sequences x {data.seq_len} = {data.tokens_per_step:,} tokens, "
        f"{accumulation} micro-batch{'es' if accumulation > 1 else ''}; "
        f"{end} steps = {end * data.tokens_per_step:,} tokens",
    ]
    return lines + data.describe(end)


def quiet_lightning() -> None:
    """Lightning's tips and its advice on data loaders say nothing about this project's loop."""
    for name in ("lightning.pytorch", "lightning.fabric", "lightning.pytorch.utilities.rank_zero"):
        logging.getLogger(name).setLevel(logging.ERROR)
    for message in (
        ".*does not have many workers.*",
        ".*`training_step` returned.*",
        ".*The `srun` command.*",
        ".*log_every_n_steps.*",
        ".*LightningCLI's args parameter.*",  # the words are the same that were typed, minus the program
        ".*treespec, LeafSpec.*",
        r"\s*``instantiate_classes`` was deprecated.*",
    ):
        warnings.filterwarnings("ignore", message)

"""``llmrecipes fit`` and ``validate``: check, build, resume, run."""

from __future__ import annotations

import logging
import warnings
from contextlib import ExitStack
from pathlib import Path
from typing import Any

import yaml

from llmrecipes.callbacks.graceful_stop import EXIT_RESUMABLE, GracefulStop
from llmrecipes.callbacks.logging import Logging
from llmrecipes.callbacks.loss_curve import draw_loss_curve
from llmrecipes.callbacks.metrics_file import MetricsFile, read_metrics
from llmrecipes.checkpoint import base_of, describe_base, newest_whole, read_info
from llmrecipes.distributed import ReadMark, SelfCheck, ShardedStrategy, StepMarks, ranks_end_together
from llmrecipes.distributed.rank_status import FILE as RANKS_FILE
from llmrecipes.errors import UserError
from llmrecipes.optim import RunLength
from llmrecipes.process import StopSignals, rank_name
from llmrecipes.recipe.fingerprint import ROUNDING
from llmrecipes.run.allocator import keep_freed_memory
from llmrecipes.run.environment import common_facts, record_launch
from llmrecipes.run.folder import Resume, decide_resume, lock, mark_done, mark_stopped
from llmrecipes.run.launch import Decision, Launch, NothingToDo
from llmrecipes.run.log import start_log
from llmrecipes.run.lr_changes import FLOOR_REACHED, RatePlan, plan_rate
from llmrecipes.run.recipe_cli import RecipeCLI
from llmrecipes.run.wandb_run import FILE as WANDB_ID

log = logging.getLogger("llmrecipes")

# Settings that may differ between launches of one run: they change how it is computed or watched, not what is computed.
FREE_DATA_KEYS = ("micro_batch", "tokenizer", "valid", "valid_from", "valid_batches", "train", "vocab_size")


def run(subcommand: str, args: list[str], signals: StopSignals | None = None) -> int:
    """Run a subcommand of LightningCLI.

    Args:
        subcommand, args: as typed.
        signals: handlers whose requests stop a training at a step boundary.

    Returns:
        The exit code: 0 done, 75 stopped on request and resumable.

    Raises:
        UserError: for everything the user can mend.
        TrainingStopped: training cannot go on.
        RankFailure: another process of the job is dead, hung or missing.
    """
    quiet_lightning()
    start_log(rank=rank_name())
    cli = RecipeCLI(subcommand, args)
    cli.callback(GracefulStop).requests = signals
    if not cli.trainer.is_global_zero:
        start_log(cli.folder, f"rank {cli.trainer.global_rank}")
    if cli.trainer.strategy.root_device.type == "cpu":
        keep_freed_memory()
    launch = Launch(lambda end: announce(cli, end))
    callbacks: list[Any] = cli.trainer.callbacks  # type: ignore[attr-defined]
    callbacks[:] = [StepMarks(), launch, SelfCheck(lambda: common_facts(cli)), *callbacks, ReadMark()]
    with ranks_end_together(cli.trainer.strategy, exit_code):
        return {"fit": fit, "validate": validate}[subcommand](cli, cli.folder)


def exit_code(error: BaseException) -> int:
    """What the command ends with after an error."""
    if isinstance(error, SystemExit):
        return error.code if isinstance(error.code, int) else 1
    return 2 if isinstance(error, UserError) else 1


def fit(cli: RecipeCLI, folder: Path) -> int:
    """Train, from scratch or from the newest whole checkpoint of the run folder."""
    with ExitStack() as owned:
        return _fit(cli, folder, owned)


def _fit(cli: RecipeCLI, folder: Path, owned: ExitStack) -> int:
    launch = cli.callback(Launch)
    alone = cli.starts_processes or cli.trainer.world_size == 1
    if cli.trainer.is_global_zero:
        decision = launch.decide(lambda: _decide(cli, folder, owned), alone)
        if alone and decision.nothing_to_do and not decision.validate:
            return 0
    try:
        cli.trainer.fit(cli.model, datamodule=cli.datamodule)
    except NothingToDo:
        if launch.decision.validate:
            _validate_last(cli, folder)
        return 0
    why = cli.callback(GracefulStop).stopped
    if why is not None:
        if cli.trainer.is_global_zero:
            mark_stopped(folder, cli.trainer.global_step, why)
        return EXIT_RESUMABLE
    if cli.trainer.is_global_zero:
        mark_done(folder, cli.trainer.global_step)
        log.info(f"done: {cli.trainer.global_step} steps; run folder {folder}")
    return 0


def _decide(cli: RecipeCLI, folder: Path, owned: ExitStack) -> Decision:
    """Own the run folder and find out where to go on from: on one process, for all."""
    cli.datamodule.prepare_data()
    owned.enter_context(lock(folder, must_hold_checkpoints=cli.settings["resume"] == "required"))
    start_log(folder)
    recorded = trajectory(cli)
    resume = decide_resume(folder, cli.settings["resume"], recorded, cli.settings["resume_lr"])
    record_launch(folder, cli.resolved_recipe)
    (folder / "STOPPED").unlink(missing_ok=True)
    if cli.wandb_id is not None:
        (folder / WANDB_ID).write_text(cli.wandb_id + "\n", encoding="utf-8")
    if resume is None:
        for name in ("metrics.jsonl", "events.jsonl", "skipped.json", RANKS_FILE):
            (folder / name).unlink(missing_ok=True)
    end, rate = _rate(cli, resume, recorded)
    step = 0 if resume is None else resume.step
    done = resume is not None and step >= end
    if done:
        log.info(f"nothing to do: {step} of {end} steps are done")
    validate = done and not (folder / "DONE").exists()
    if validate and _is_validated(folder, step):
        finish(folder, step)
        validate = False
    if not done:
        (folder / "DONE").unlink(missing_ok=True)
    return Decision(
        trajectory=recorded,
        checkpoint=None if resume is None else str(resume.path),
        start_step=step,
        end=end,
        rate=rate,
        stability=None if resume is None else resume.progress.get("stability"),
        nothing_to_do=done,
        validate=validate,
    )


def _is_validated(folder: Path, step: int) -> bool:
    return any("val_loss" in record and record["step"] == step for record in read_metrics(folder / "metrics.jsonl"))


def _validate_last(cli: RecipeCLI, folder: Path) -> None:
    """Make up for what a kill between the last checkpoint and the end of the run prevented."""
    step = cli.callback(Launch).decision.start_step
    cli.callback(Logging).validated_step = step
    log.info(f"validating step {step}, which was not done before the run ended")
    cli.trainer.validate(cli.model, datamodule=cli.datamodule, verbose=False)
    if cli.trainer.is_global_zero:
        if cli.model.validation_metrics:
            file = MetricsFile(folder / "metrics.jsonl")
            file.append({"step": step, **cli.model.validation_metrics})
            file.close()
        finish(folder, step)


def finish(folder: Path, step: int) -> None:
    """The last files of a run."""
    draw_loss_curve(folder / "metrics.jsonl", folder / "loss.png")
    mark_done(folder, step)


def validate(cli: RecipeCLI, folder: Path) -> int:
    """Validation loss of the run's newest whole checkpoint."""
    if cli.trainer.is_global_zero:
        alone = cli.starts_processes or cli.trainer.world_size == 1
        cli.callback(Launch).decide(lambda: _decide_validation(cli, folder), alone)
    cli.trainer.validate(cli.model, datamodule=cli.datamodule, verbose=False)
    return 0


def _decide_validation(cli: RecipeCLI, folder: Path) -> Decision:
    path, broken = newest_whole(folder / "checkpoints")
    for sentence in broken:
        log.warning(sentence)
    if path is None:
        raise UserError(f"{folder}/checkpoints: no whole checkpoint to validate; train first with llmrecipes fit")
    cli.callback(Logging).validated_step = step = read_info(path)["step"]
    base = base_of(path)
    if base is not None and _base(cli).get("base") != base:
        raise UserError(
            f"{path} was trained over the weights of {base['folder']}, which are not those of init_from now"
        )
    log.info(f"validating {path} ({step} steps)")
    recorded = read_info(path)["progress"]["trajectory"]
    return Decision(trajectory=recorded, checkpoint=str(path), start_step=step)


def trajectory(cli: RecipeCLI) -> dict[str, Any]:
    """The settings that decide what is computed: equal ones give equal losses; a resumed run must not change them."""
    recipe = yaml.safe_load(cli.resolved_recipe)
    model = recipe["model"]["init_args"]
    length = RunLength(cli.trainer.max_steps, cli.datamodule.tokens_per_step)
    moe = cli.model.config.moe
    # Which tokens are dropped depends on who is routed together.
    decisive = ("micro_batch",) if moe is not None and moe.capacity_factor is not None else ()
    data = {k: v for k, v in recipe["data"]["init_args"].items() if k not in FREE_DATA_KEYS or k in decisive}
    return {
        "seed": recipe["seed"],
        "model": {k: v for k, v in model.items() if k not in (*ROUNDING, "seed")},
        "data": data | {"shards": cli.datamodule.fingerprint()["train"]},
        "trainer": {"precision": cli.trainer.precision},
        **_base(cli),
        # With decay: null the schedule ends with the run: another trainer.max_steps is then another schedule.
        FLOOR_REACHED: cli.model.schedule.decay_steps(length),
    }


def _base(cli: RecipeCLI) -> dict[str, Any]:
    """The frozen weights of the run, which its checkpoints do not hold, and their checksum."""
    folder = cli.model.initial_folder
    return {"base": describe_base(folder)} if folder is not None and cli.model.keeps_base else {}


def _rate(cli: RecipeCLI, resume: Resume | None, present: dict[str, Any]) -> tuple[int, RatePlan]:
    """The last step of the run, and what becomes of its learning rate."""
    step, progress = (None, {}) if resume is None else (resume.step, resume.progress)
    plan = plan_rate(cli.settings["resume_lr"], cli.settings["cool_down"], step, progress, present)
    end = plan.end(RunLength(cli.trainer.max_steps, cli.datamodule.tokens_per_step))
    if plan.cool_down is not None:
        log.info(f"cooling down from step {plan.cool_down[0]} to the end at step {end}")
    return end, plan


def announce(cli: RecipeCLI, end: int) -> None:
    """Say what is about to run."""
    for line in describe(cli, end):
        log.info(line)


def describe(cli: RecipeCLI, end: int) -> list[str]:
    """What is about to run up to step ``end``, for the log's first lines."""
    config, data, trainer = cli.model.config, cli.datamodule, cli.trainer
    sizes = f"model {config.num_params:,} parameters"
    if config.routing:
        fewest, most = min(config.router_choices), max(config.router_choices)
        experts = f"{most}" if fewest == most else f"{fewest} to {most}"
        sizes += f", {config.active_params:,} active ({experts} experts, top {config.routing.top_k})"
    if cli.model.trained_params != config.num_params:
        sizes += f", {cli.model.trained_params:,} trained"
    accumulation = data.global_batch // (data.micro_batch * data.data_ranks)
    strategy = trainer.strategy
    where = f"{trainer.world_size} x {strategy.root_device.type}"
    if isinstance(strategy, ShardedStrategy):
        where += f", {strategy.describe()}"
    lines = [
        f"run folder {trainer.default_root_dir}",
        f"{sizes}; {trainer.precision} on {where}",
        f"step: {data.global_batch} sequences x {data.seq_len} = {data.tokens_per_step:,} tokens, "
        f"{accumulation} micro-batch{'es' if accumulation > 1 else ''} of {data.micro_batch} per process; "
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

"""Keys of the Trainer, and of the sections beside it, that do nothing here or fight with the one optimizer step."""

from __future__ import annotations

from collections.abc import Iterator

from llmrecipes.recipe.rules.facts import Facts, Finding

# key -> (values that change nothing, why it is refused, what to use instead)
_REFUSED: dict[str, tuple[tuple[object, ...], str, str]] = {
    "accumulate_grad_batches": (
        (1, None),
        "has no effect: one batch of the Trainer is one optimizer step",
        "set data.init_args.global_batch and micro_batch",
    ),
    "gradient_clip_val": ((None,), "has no effect: the module clips", "set model.init_args.clip_norm"),
    "gradient_clip_algorithm": ((None,), "has no effect: the module clips by norm", "set model.init_args.clip_norm"),
    "max_epochs": ((None, -1), "has no effect: a run is counted in optimizer steps", "set trainer.max_steps"),
    "min_epochs": ((None,), "has no effect: a run is counted in optimizer steps", "set trainer.max_steps"),
    "min_steps": ((None,), "fights with stopping on request", "set trainer.max_steps"),
    "reload_dataloaders_every_n_epochs": ((0,), "has no effect: the data order follows from the step", "remove it"),
    "enable_checkpointing": (
        (None, False),
        "would add Lightning's checkpoints, which overwrite in place",
        "use the section checkpoint",
    ),
    "default_root_dir": ((None,), "has no effect: the run folder is run_root/name", "set run_root"),
    "log_every_n_steps": ((None,), "has no effect: metrics.jsonl follows the section logging", "set logging.every"),
}
_HALF_PRECISION = {"16-mixed", "16-true", "16", 16}


def trainer_problems(facts: Facts) -> Iterator[Finding]:
    """Refused keys, run length, precision and intervals."""
    for key, (harmless, why, instead) in _REFUSED.items():
        value = facts.get("trainer", key)
        if facts.has("trainer", key) and not any(
            value is h or (value == h and type(value) is type(h)) for h in harmless
        ):
            yield Finding(("trainer", key), f"trainer.{key} {why}", instead)
    yield from _run_length(facts)
    precision = facts.get("trainer", "precision")
    if isinstance(precision, str | int) and not isinstance(precision, bool) and precision in _HALF_PRECISION:
        what = f"trainer.precision {precision} needs a loss scaler, which the optimizer step here has not"
        yield Finding(("trainer", "precision"), what, "use bf16-mixed")
    yield from _intervals(facts)


def _run_length(facts: Facts) -> Iterator[Finding]:
    if not isinstance(facts.get("trainer"), dict) and facts.has("trainer") and facts.get("trainer") is not None:
        return
    if facts.has("trainer") and not facts.has("trainer", "max_steps"):
        yield Finding(("trainer",), "trainer.max_steps is missing: a run needs its length in optimizer steps")
    steps = facts.integer("trainer", "max_steps")
    if steps is not None and steps < 1:
        what = f"trainer.max_steps {steps} is less than 1: a run needs its length in optimizer steps"
        yield Finding(("trainer", "max_steps"), what)


def _intervals(facts: Facts) -> Iterator[Finding]:
    interval = facts.get("trainer", "val_check_interval")
    path = ("trainer", "val_check_interval")
    if interval is not None and facts.sound(path):
        if not isinstance(interval, int) or isinstance(interval, bool):
            yield Finding(path, f"trainer.val_check_interval {interval} is not a whole number of optimizer steps")
        elif interval < 1:
            yield Finding(path, f"trainer.val_check_interval {interval} is less than 1 optimizer step")
    for section, key in (("logging", "every"), ("samples", "every")):
        every = facts.integer(section, key)
        if every is not None and every < 1:
            yield Finding((section, key), f"{section}.{key} {every} is less than 1 optimizer step")
    for key in ("every", "keep_every"):
        if facts.steps("checkpoint", key) == 0:
            yield Finding(("checkpoint", key), f"checkpoint.{key} is zero steps: no checkpoint could be written")
    every, keep = facts.steps("checkpoint", "every"), facts.steps("checkpoint", "keep_every")
    if every and keep and keep % every:
        what = f"checkpoint.keep_every ({keep} steps) is not a multiple of checkpoint.every ({every} steps)"
        yield Finding(("checkpoint", "keep_every"), what, "a checkpoint is kept only where one is written")
    kept = facts.integer("checkpoint", "keep_last")
    if kept is not None and kept < 1:
        yield Finding(("checkpoint", "keep_last"), f"checkpoint.keep_last {kept} would leave nothing to resume from")

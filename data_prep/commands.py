"""The stages of `llmrecipes data`: names, functions and help, without importing any of them."""

from __future__ import annotations

import importlib
from collections.abc import Callable, Sequence
from typing import NamedTuple

from llmrecipes.arguments import join_lists
from llmrecipes.errors import UserError


class Stage(NamedTuple):
    """Where the function of a stage is, what it does in one line, and the dataclass of its recipe if it reads one."""

    module: str
    function: str
    help: str
    recipe: str | None = None

    def load(self) -> Callable[..., None]:
        """Imports the module and returns the function; its arguments are the options of the command."""
        function: Callable[..., None] = getattr(importlib.import_module(self.module), self.function)
        return function


STAGES = {
    "import": Stage(
        "data_prep.stages.importing", "run", "parquet, CSV, text, wiki40b, dataset folders to JSONL", "ImportConfig"
    ),
    "clean": Stage("data_prep.stages.clean", "clean", "clean Japanese or English documents by rules", "CleanConfig"),
    "dedup": Stage(
        "data_prep.stages.dedup", "dedup", "remove equal and near-equal documents across all files", "DedupConfig"
    ),
    "noise train": Stage(
        "data_prep.stages.noise", "train", "train a classifier of noise from labelled texts", "NoiseTrainConfig"
    ),
    "noise evaluate": Stage(
        "data_prep.stages.noise", "evaluate", "score a classifier of noise on other labels", "NoiseTrainConfig"
    ),
    "noise apply": Stage("data_prep.stages.noise", "apply", "drop documents that are surely noise", "NoiseApplyConfig"),
    "noise export": Stage(
        "data_prep.stages.noise", "export", "choose the documents most worth labelling", "NoiseExportConfig"
    ),
    "decontaminate": Stage(
        "data_prep.stages.decontaminate", "run", "find and drop what stands in evaluation sets", "DecontaminateConfig"
    ),
    "mix": Stage("data_prep.stages.mix", "mix", "mix sources by tokens into stages, hold out validation", "MixConfig"),
    "cluster": Stage(
        "data_prep.stages.cluster", "cluster", "documents into genres, large ones capped", "ClusterConfig"
    ),
    "domains": Stage(
        "data_prep.stages.domains", "domains", "documents into domains of equal size, for an expert each (c-BTM)"
    ),
    "ask-llm": Stage(
        "data_prep.stages.ask_llm", "ask_llm", "score documents by a language model, keep the best", "AskLlmConfig"
    ),
    "demo": Stage("data_prep.demo_corpus", "demo", "write a small Japanese and English corpus about an invented world"),
    "tokenizer build": Stage(
        "data_prep.stages.vocabulary", "build", "separate vocabularies, merged, scored, exported", "VocabularyConfig"
    ),
    "tokenizer parts": Stage(
        "data_prep.stages.vocabulary",
        "parts",
        "build, first step: one vocabulary for each language",
        "VocabularyConfig",
    ),
    "tokenizer merge": Stage(
        "data_prep.stages.vocabulary", "merge", "build, second step: one vocabulary of all", "VocabularyConfig"
    ),
    "tokenizer reestimate": Stage(
        "data_prep.stages.vocabulary", "reestimate", "build, third step: scores by EM on raw text", "VocabularyConfig"
    ),
    "tokenizer export": Stage(
        "data_prep.stages.vocabulary", "export_scored", "build, last step: export, verified", "VocabularyConfig"
    ),
    "tokenizer stats": Stage("data_prep.tokenizer_stats", "stats", "characters per token of tokenizers on texts"),
    "tokenizer train": Stage(
        "data_prep.tokenizer", "train_tokenizer", "one vocabulary of all text, exported, verified"
    ),
    "tokenizer": Stage("data_prep.tokenizer", "train_tokenizer", "train a tokenizer and export it, verified"),
    "estimate": Stage("data_prep.estimate", "estimate", "tokens of texts from a sample, with an error bar"),
    "tokenize": Stage("data_prep.tokenize", "tokenize", "turn documents into token shards, in parallel, restartable"),
    "stats": Stage("data_prep.inspect_shards", "stats", "count and verify token shards"),
    "inspect": Stage("data_prep.inspect_shards", "inspect", "show documents of a shard, piece by piece"),
}


def help_text() -> str:
    """The stages, one a line."""
    return "\n".join(f"  {name:<20} {stage.help}" for name, stage in STAGES.items())


def run(stage: str, args: Sequence[str]) -> None:
    """Runs `llmrecipes data STAGE ARGS...`.

    Raises:
        UserError: no such stage, or what the stage itself finds wrong.
    """
    if args and f"{stage} {args[0]}" in STAGES:
        stage, args = f"{stage} {args[0]}", args[1:]
    verbs = any(name.startswith(f"{stage} ") for name in STAGES)
    if stage not in STAGES or (verbs and args and not args[0].startswith("-")):
        raise UserError(_no_such_stage(stage, args))
    function = STAGES[stage].load()
    if (recipe := STAGES[stage].recipe) is not None:
        _run_recipe(stage, function, getattr(importlib.import_module(STAGES[stage].module), recipe), args)
        return
    import jsonargparse

    jsonargparse.auto_cli(
        function, args=join_lists(function, args), as_positional=False, prog=f"llmrecipes data {stage}"
    )


def _run_recipe(stage: str, function: Callable[..., None], kind: type, args: Sequence[str]) -> None:
    """A stage whose options stand in a YAML file: `--config FILE [--key value ...]`."""
    from data_prep.frame.config import help_text as keys
    from data_prep.frame.config import read_config

    if {"-h", "--help"} & set(args):
        print(keys(kind, f"llmrecipes data {stage}", STAGES[stage].help))
        raise SystemExit(0)
    function(read_config(kind, args))


def _no_such_stage(stage: str, args: Sequence[str]) -> str:
    import difflib

    if verbs := [name.partition(" ")[2] for name in STAGES if name.startswith(f"{stage} ")]:
        said = f", not {args[0]!r}" if args and not args[0].startswith("-") else ""
        return f"data {stage}: say what to do: {', '.join(verbs)}{said}"
    close = difflib.get_close_matches(stage, STAGES, n=1)
    meant = f" - did you mean {close[0]!r}?" if close else f"; there are: {', '.join(STAGES)}"
    return f"data {stage}: no such stage{meant}"

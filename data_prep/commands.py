"""The stages of `llmrecipes data`: names, functions and help, without importing any of them."""

from __future__ import annotations

import importlib
from collections.abc import Callable, Sequence
from typing import NamedTuple

from llmrecipes.arguments import join_lists
from llmrecipes.errors import UserError


class Stage(NamedTuple):
    """Where the function of a stage is, and what it does in one line."""

    module: str
    function: str
    help: str

    def load(self) -> Callable[..., None]:
        """Imports the module and returns the function; its arguments are the options of the command."""
        function: Callable[..., None] = getattr(importlib.import_module(self.module), self.function)
        return function


STAGES = {
    "demo": Stage("data_prep.demo_corpus", "demo", "write a small Japanese and English corpus about an invented world"),
    "tokenizer": Stage("data_prep.tokenizer", "train_tokenizer", "train a tokenizer and export it, verified"),
    "tokenize": Stage("data_prep.tokenize", "tokenize", "turn documents into token shards, in parallel, restartable"),
    "stats": Stage("data_prep.inspect_shards", "stats", "count and verify token shards"),
    "inspect": Stage("data_prep.inspect_shards", "inspect", "show documents of a shard, piece by piece"),
}


def help_text() -> str:
    """The stages, one a line."""
    return "\n".join(f"  {name:<12} {stage.help}" for name, stage in STAGES.items())


def run(stage: str, args: Sequence[str]) -> None:
    """Runs `llmrecipes data STAGE ARGS...`.

    Raises:
        UserError: no such stage, or what the stage itself finds wrong.
    """
    import jsonargparse

    if stage not in STAGES:
        import difflib

        close = difflib.get_close_matches(stage, STAGES, n=1)
        meant = f" - did you mean {close[0]!r}?" if close else f"; there are: {', '.join(STAGES)}"
        raise UserError(f"data {stage}: no such stage{meant}")
    function = STAGES[stage].load()
    jsonargparse.auto_cli(
        function, args=join_lists(function, args), as_positional=False, prog=f"llmrecipes data {stage}"
    )

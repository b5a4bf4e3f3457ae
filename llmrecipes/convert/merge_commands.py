"""The stages of `llmrecipes merge`: names, functions and help, without importing any of them."""

from __future__ import annotations

import difflib

from llmrecipes.arguments import join_lists
from llmrecipes.convert.commands import Stage
from llmrecipes.errors import UserError

STAGES = {
    "lora": Stage("llmrecipes.convert.merge_lora", "merge_lora", "adapters side by side over the model beneath"),
    "btx": Stage("llmrecipes.convert.merge_btx", "merge_btx", "whole feed-forward networks side by side"),
    "fold": Stage(
        "llmrecipes.convert.fold", "fold", "adapters into the weights: a plain dense model, or a plain mixture"
    ),
}


def main(words: list[str]) -> int:
    """``llmrecipes merge STAGE ...``.

    Raises:
        UserError: no such stage, or what the stage itself finds wrong.
    """
    if not words or words[0] in ("-h", "--help"):
        rows = "\n".join(f"  {name:<6} {stage.help}" for name, stage in STAGES.items())
        print(f"usage: llmrecipes merge STAGE [options]\n\n{rows}\n\nllmrecipes merge STAGE --help for its options")
        return 0
    name, *rest = words
    if name not in STAGES:
        close = difflib.get_close_matches(name, STAGES, n=1)
        meant = f" - did you mean '{close[0]}'?" if close else f"; there are: {', '.join(STAGES)}"
        raise UserError(f"merge {name}: no such stage{meant}")
    import jsonargparse

    function = STAGES[name].load()
    words = _named(join_lists(function, rest), ("seed", "dst") if name != "fold" else ("src", "dst"))
    jsonargparse.auto_cli(function, args=words, as_positional=False, prog=f"llmrecipes merge {name}")
    return 0


def _named(words: list[str], names: tuple[str, ...]) -> list[str]:
    """The first words, which stand alone, as options."""
    alone = 0
    while alone < min(len(words), len(names)) and not words[alone].startswith("--"):
        alone += 1
    return [f"--{name}={word}" for name, word in zip(names, words[:alone], strict=False)] + words[alone:]

"""The stages of `llmrecipes convert`: names, functions and help, without importing any of them."""

from __future__ import annotations

import difflib
import importlib
from collections.abc import Callable
from typing import NamedTuple

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
    "from-hf": Stage("llmrecipes.convert.from_hf", "from_hf", "a Hugging Face folder as one that fit starts from"),
    "to-hf": Stage("llmrecipes.convert.to_hf", "to_hf", "a run, checkpoint or folder of ours as a Hugging Face folder"),
    "from-peft": Stage("llmrecipes.convert.peft", "from_peft", "an adapter of PEFT over a model, as one folder"),
    "to-peft": Stage("llmrecipes.convert.peft", "to_peft", "a trained adapter alone, as PEFT loads it"),
    "upcycle": Stage("llmrecipes.convert.upcycle", "upcycle", "a dense model as a mixture of experts, to train on"),
    "consolidate": Stage(
        "llmrecipes.convert.consolidate", "consolidate", "one safetensors folder of a checkpoint that many ranks wrote"
    ),
}


def main(words: list[str]) -> int:
    """``llmrecipes convert STAGE ...``.

    Raises:
        UserError: no such stage, or what the stage itself finds wrong.
    """
    if not words or words[0] in ("-h", "--help"):
        rows = "\n".join(f"  {name:<12} {stage.help}" for name, stage in STAGES.items())
        print(f"usage: llmrecipes convert STAGE [options]\n\n{rows}\n\nllmrecipes convert STAGE --help for its options")
        return 0
    name, *rest = words
    if name not in STAGES:
        close = difflib.get_close_matches(name, STAGES, n=1)
        meant = f" - did you mean '{close[0]}'?" if close else f"; there are: {', '.join(STAGES)}"
        raise UserError(f"convert {name}: no such stage{meant}")
    import jsonargparse

    jsonargparse.auto_cli(STAGES[name].load(), args=rest, as_positional=True, prog=f"llmrecipes convert {name}")
    return 0

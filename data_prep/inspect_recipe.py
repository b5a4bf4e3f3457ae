"""`llmrecipes data inspect --recipe`: the very rows that a recipe trains on, with what the loss sees."""

from __future__ import annotations

import importlib
import sys
from pathlib import Path
from types import SimpleNamespace
from typing import TYPE_CHECKING, Any

from llmrecipes.errors import UserError

if TYPE_CHECKING:
    from llmrecipes.data.batch import Batch
    from llmrecipes.data.tokenizer import Tokenizer

TRAINED, CONTEXT, RESET = "\x1b[30;42m", "\x1b[2m", "\x1b[0m"  # black on green, dim
OPEN, CLOSE = "⟦", "⟧"


def inspect_recipe(recipes: list[str], step: int, count: int, ids: bool) -> None:
    """Print ``count`` documents of optimizer step ``step`` (from 0) of a recipe.

    What the loss is computed on is green on a terminal, between ⟦ and ⟧ elsewhere.

    Raises:
        UserError: the recipe or its data cannot be read.
    """
    data = open_data(recipes)
    for line in data.describe():
        print(line)
    print()
    tokenizer, batch = data.tokenizer, data.step_batch(step)
    shown = 0
    for row, lengths in enumerate(batch.document_lengths or [[batch.tokens.shape[1]]] * batch.num_rows):
        at = 0
        for length in lengths:
            if shown == count:
                return
            if batch.token_mask is None or bool(batch.token_mask[row, at]):
                _show(batch, row, at, length, tokenizer, f"step {step}, row {row}, position {at}", ids)
                shown += 1
            at += length


def open_data(recipes: list[str]) -> Any:
    """The DataModule of a recipe, ready on one process.

    Raises:
        UserError: there is none, or it finds something wrong.
    """
    from llmrecipes.recipe import read_recipe

    found = read_recipe([Path(recipe) for recipe in recipes]).data.get("data")
    section = found if isinstance(found, dict) else {}
    path = section.get("class_path")
    module, _, name = str(path).rpartition(".")
    if module != "llmrecipes.data":
        raise UserError(f"{recipes[0]}: data.class_path {path}: only data of llmrecipes.data can be shown")
    try:
        data = getattr(importlib.import_module(module), name)(**section["init_args"])
    except (AttributeError, KeyError, TypeError) as error:
        raise UserError(f"{recipes[0]}: data: {error}; llmrecipes check says more") from None
    alone = {"num_replicas": 1, "rank": 0}
    data.trainer = SimpleNamespace(strategy=SimpleNamespace(distributed_sampler_kwargs=alone), max_steps=-1)
    data.setup("fit")
    return data


def _show(batch: Batch, row: int, at: int, length: int, tokenizer: Tokenizer, title: str, ids: bool) -> None:
    tokens = batch.tokens[row, at : at + length].tolist()
    labels = batch.labels[row, at : at + length].tolist()
    # label i is the id after token i; the last one is in no input
    whole = [*tokens, labels[-1]] if labels[-1] >= 0 else tokens
    trained = [False, *(label >= 0 for label in labels)][: len(whole)]
    print(f"--- {title}: {len(whole)} ids, {sum(trained)} trained on")
    print(marked(whole, trained, tokenizer, sys.stdout.isatty()))
    if ids:
        print(" ".join(f"{token}{'*' if mark else ''}" for token, mark in zip(whole, trained, strict=True)))
    print()


def marked(ids: list[int], trained: list[bool], tokenizer: Tokenizer, colour: bool) -> str:
    """The text with its trained parts marked; pieces that spell nothing, such as the end, by their names."""
    runs: list[tuple[bool, list[int]]] = []
    for token, mark in zip(ids, trained, strict=True):
        if not runs or runs[-1][0] != mark:
            runs.append((mark, []))
        runs[-1][1].append(token)
    before, after = (TRAINED, RESET) if colour else (OPEN, CLOSE)
    plain_before, plain_after = (CONTEXT, RESET) if colour else ("", "")
    parts = []
    for mark, run in runs:
        text = _spelled(run, tokenizer)
        parts.append(f"{before}{text}{after}" if mark else f"{plain_before}{text}{plain_after}")
    return "".join(parts)


def _spelled(ids: list[int], tokenizer: Tokenizer) -> str:
    texts, pending = list[str](), list[int]()
    for token in ids:
        if not tokenizer.decode([token]):
            texts += [tokenizer.decode(pending), tokenizer.piece(token)]
            pending = []
        else:
            pending.append(token)
    return "".join([*texts, tokenizer.decode(pending)])

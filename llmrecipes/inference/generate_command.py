"""``llmrecipes generate``: opens the model, continues prompts, shows the text as it comes."""

from __future__ import annotations

import json
import sys
from argparse import Namespace
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from typing import Any

import torch

from llmrecipes.errors import UserError
from llmrecipes.inference.opened import Opened, open_model
from llmrecipes.inference.prompts import Prompt, collect, make
from llmrecipes.inference.stream import Writer
from llmrecipes.models import Sampling, generate_batch

FINISHED = {
    "eos": "the model ended it",
    "stop": "a stop string came",
    "length": "--max_new_tokens reached",
    "positions": "the model has no more positions",
}


@dataclass(frozen=True)
class Written:
    """A prompt and what came of it.

    Attributes:
        prompt: what was to be continued.
        prompt_tokens: its length.
        text: the continuation, without the stop string.
        ids: its tokens, with those of the stop string or the end.
        finish: ``eos``, ``stop``, ``length`` or ``positions``.
    """

    prompt: Prompt
    prompt_tokens: int
    text: str
    ids: list[int]
    finish: str

    def as_dict(self) -> dict[str, Any]:
        """For JSON."""
        asked = {"messages": list(self.prompt.messages)} if self.prompt.messages else {"prompt": self.prompt.text}
        return {
            **asked,
            "text": self.text,
            "finish": self.finish,
            "prompt_tokens": self.prompt_tokens,
            "new_tokens": len(self.ids),
            "ids": self.ids,
        }


@dataclass(frozen=True)
class Request:
    """How prompts are continued.

    Args:
        max_new_tokens: most new tokens per prompt.
        sampling: how a token is chosen.
        stops: texts that end the continuation.
        seed: prompt number i (from 0) draws with the generator of ``seed + i``, whatever stands beside it.
        seeds: of each prompt, instead.
    """

    max_new_tokens: int
    sampling: Sampling
    stops: Sequence[str] = ()
    seed: int = 0
    seeds: Sequence[int] | None = None


def run(args: Namespace) -> int:
    """The command, from its parsed options."""
    request = _request(args)
    prompts = collect(args.prompt, args.prompts, args.field, args.chat, args.system)
    if not prompts and not args.chat:
        prompts = [_from_stdin()]
    opened = open_model(args.model, args.dtype, args.tokenizer, args.template)
    if not prompts:
        from llmrecipes.inference.chat import talk

        return talk(opened, request, args.system, sys.stdin, sys.stdout)
    ids = encode(opened, prompts)
    note_long_texts(opened, ids, request.max_new_tokens)
    alone = len(prompts) == 1 and not args.json
    for start in range(0, len(prompts), args.batch_size):
        group = slice(start, start + args.batch_size)
        show = _print_now if alone else None
        for number, written in enumerate(write(opened, prompts[group], ids[group], request, start, show), start):
            if args.json:
                print(json.dumps(written.as_dict(), ensure_ascii=False), flush=True)
            elif alone:
                print()
            else:
                print(f"--- {number + 1}: {_one_line(written.prompt.text)}\n{written.text}", flush=True)
            if not args.json and sys.stderr.isatty():
                print(f"[{len(written.ids)} tokens; {FINISHED[written.finish]}]", file=sys.stderr)
    return 0


def _request(args: Namespace) -> Request:
    sampling = Sampling(
        temperature=args.temperature,
        top_k=args.top_k,
        top_p=1.0 if args.top_p is None else args.top_p,
        repetition_penalty=args.repetition_penalty,
    )
    problems = [f"--{problem}" for problem in sampling.problems()]
    if args.temperature == 0:
        problems += [
            f"--{name} has no effect with --temperature 0, which takes the most likely token; give --temperature 1"
            for name in ("top_k", "top_p")
            if getattr(args, name) is not None
        ]
    if args.max_new_tokens < 1:
        problems.append(f"--max_new_tokens {args.max_new_tokens}: must be 1 or more")
    if args.batch_size < 1:
        problems.append(f"--batch_size {args.batch_size}: must be 1 or more")
    if not all(args.stop):
        problems.append("--stop '': an empty text would stop everything")
    if args.system and not args.chat:
        problems.append("--system has no effect without --chat")
    if problems:
        raise UserError(*problems)
    return Request(args.max_new_tokens, sampling, args.stop, args.seed)


def _from_stdin() -> Prompt:
    if sys.stdin.isatty():
        raise UserError("no prompt: give --prompt TEXT, --prompts FILE, a text on standard input, or --chat to talk")
    text = from_stream(sys.stdin.read).removesuffix("\n")
    if not text:
        raise UserError("the prompt on standard input is empty; give at least one character to continue")
    return make(text, chat=False, system=None)


def from_stream(read: Callable[[], str]) -> str:
    """What ``read`` gives.

    Raises:
        UserError: it is not UTF-8.
    """
    try:
        text = read()
        text.encode("utf-8")
    except UnicodeError:
        raise UserError("standard input is not valid UTF-8; convert it first") from None
    return text


def encode(opened: Opened, prompts: Sequence[Prompt]) -> list[list[int]]:
    """Ids of every prompt.

    Raises:
        UserError: prompts that make no token, or more than the model has positions for; all are named.
    """
    problems, found = [], []
    for prompt in prompts:
        ids = opened.codec.chat(list(prompt.messages)) if prompt.messages else opened.codec.encode(prompt.text)
        found.append(ids)
        if not ids:
            problems.append(f"prompt {_one_line(prompt.text)!r}: the tokenizer makes no token of it; give more text")
        elif opened.hard_limit and opened.max_seq_len is not None and len(ids) >= opened.max_seq_len:
            problems.append(
                f"prompt {_one_line(prompt.text)!r}: {len(ids)} tokens, but {opened.name} has positions for "
                f"{opened.max_seq_len}, and one must be left to write on; shorten it"
            )
    if problems:
        raise UserError(*problems)
    return found


def note_long_texts(opened: Opened, ids: Sequence[Sequence[int]], max_new_tokens: int) -> None:
    """Say once when texts may grow longer than those that the model was made for."""
    longest = max(map(len, ids)) + max_new_tokens
    if opened.max_seq_len is not None and longest > opened.max_seq_len and not opened.hard_limit:
        print(
            f"note: a text may reach {longest} tokens; {opened.name} was made for {opened.max_seq_len}", file=sys.stderr
        )


def write(
    opened: Opened,
    prompts: Sequence[Prompt],
    ids: Sequence[list[int]],
    request: Request,
    first: int = 0,
    show: Callable[[str], object] | None = None,
) -> list[Written]:
    """Continue prompts side by side.

    Args:
        opened: the model.
        prompts, ids: the prompts and their tokens.
        request: how.
        first: number of the first prompt, for its generator.
        show: called with every piece of text; for one prompt only.
    """
    assert show is None or len(prompts) == 1
    seeds = request.seeds or [request.seed + first + i for i in range(len(prompts))]
    generators = [torch.Generator().manual_seed(seed) for seed in seeds]
    writers = [Writer(opened.codec.decode, prompt, request.stops, show) for prompt in ids]
    done = generate_batch(
        opened.model,
        ids,
        request.max_new_tokens,
        sampling=request.sampling,
        generators=generators,
        eos_ids=opened.codec.eos_ids,
        vocab_size=opened.vocab_size,
        listener=lambda number, token: token not in opened.codec.eos_ids and writers[number].add(token),
    )
    for writer in writers:
        writer.end()
    return [
        Written(prompt, len(tokens), writer.text, result.ids, result.finish)
        for prompt, tokens, writer, result in zip(prompts, ids, writers, done, strict=True)
    ]


def _print_now(text: str) -> None:
    print(text, end="", flush=True)


def _one_line(text: str) -> str:
    line = text.replace("\n", "⏎")
    return line if len(line) <= 60 else line[:59] + "…"

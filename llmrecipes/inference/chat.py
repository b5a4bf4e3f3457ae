"""A conversation on the terminal, or line by line through a pipe."""

from __future__ import annotations

import sys
from typing import TextIO

from llmrecipes.inference.generate_command import Request, encode, from_stream, note_long_texts, write
from llmrecipes.inference.opened import Opened
from llmrecipes.inference.prompts import Message, Prompt


def talk(opened: Opened, request: Request, system: str | None, source: TextIO, sink: TextIO) -> int:
    """Answer each line with everything said so far in mind, until the input ends (Ctrl-D) or is interrupted (Ctrl-C).

    Turn number i draws with the generator of ``seed + i``.
    """
    messages: list[Message] = [{"role": "system", "content": system}] if system else []
    by_hand = source.isatty()
    if by_hand:
        print("one line is one message; Ctrl-D ends", file=sys.stderr)
    turn = 0
    while (line := _read(source, by_hand)) is not None:
        if not line:
            continue
        messages.append({"role": "user", "content": line})
        prompt = Prompt(line, tuple(messages))
        ids = encode(opened, [prompt])
        note_long_texts(opened, ids, request.max_new_tokens)

        def show(text: str) -> None:
            print(text, end="", file=sink, flush=True)

        answer = write(opened, [prompt], ids, request, turn, show)[0]
        print(file=sink, flush=True)
        messages.append({"role": "assistant", "content": answer.text})
        turn += 1
    return 0


def _read(source: TextIO, by_hand: bool) -> str | None:
    """The next line without its end; None when there is none."""
    if by_hand:
        print("> ", end="", file=sys.stderr, flush=True)
    try:
        line = from_stream(source.readline)
    except KeyboardInterrupt:
        line = ""
    return line.strip() if line else None

"""A conversation as text: a tokenizer's own chat template (jinja), or one of those named here. Torch-free."""

from __future__ import annotations

import json
from collections.abc import Sequence
from functools import cached_property
from pathlib import Path
from typing import Any

from llmrecipes.data.conversations import Message
from llmrecipes.errors import UserError

_JA = (
    "{% if messages[0].role != 'system' %}"
    "以下は、タスクを説明する指示です。要求を適切に満たす応答を書きなさい。{% endif %}"
    "{% for m in messages %}{% if m.role == 'system' %}{{ m.content }}"
    "{% elif m.role == 'user' %}{{ '\n\n### 指示:\n' + m.content }}"
    "{% else %}{{ '\n\n### 応答:\n' + m.content + eos_token }}{% endif %}{% endfor %}"
    "{% if add_generation_prompt %}{{ '\n\n### 応答:\n' }}{% endif %}"
)
_EN = (
    _JA.replace("以下は、タスクを説明する指示です。要求を適切に満たす応答を書きなさい。", "{{ default_system }}")
    .replace("指示", "Instruction")
    .replace("応答", "Response")
    .replace(
        "{{ default_system }}",
        "Below is an instruction that describes a task. Write a response that appropriately completes the request.",
    )
)
_CHATML = (
    "{% for m in messages %}{{ '<|im_start|>' + m.role + '\n' + m.content }}"
    "{% if m.role == 'assistant' %}{{ eos_token }}{% else %}{{ '<|im_end|>' }}{% endif %}{{ '\n' }}{% endfor %}"
    "{% if add_generation_prompt %}{{ '<|im_start|>assistant\n' }}{% endif %}"
)
# The source documents' 指示/応答 format, Alpaca's, ChatML; each answer ends with the tokenizer's EOS.
NAMED = {"instruction_ja": _JA, "alpaca": _EN, "chatml": _CHATML}
_SPECIAL = ("bos_token", "eos_token", "unk_token", "pad_token")


class ChatTemplate:
    """Renders conversations in jinja's sandbox, with what transformers gives a template.

    Args:
        source: the template.
        where: how messages call it.
        special: texts of the special pieces by name (``bos_token``, ``eos_token``).
    """

    def __init__(self, source: str, where: str, special: dict[str, str]) -> None:
        self.source, self.where, self.special = source, where, special

    @cached_property
    def _compiled(self) -> Any:
        import jinja2
        from jinja2.ext import Extension, loopcontrols
        from jinja2.sandbox import ImmutableSandboxedEnvironment

        class Generation(Extension):
            """``{% generation %}`` marks the assistant's part for transformers; here it only groups."""

            tags = {"generation"}  # noqa: RUF012 - jinja's own way

            def parse(self, parser: Any) -> Any:
                parser.stream.expect("name:generation")
                return parser.parse_statements(("name:endgeneration",), drop_needle=True)

        environment = ImmutableSandboxedEnvironment(
            trim_blocks=True, lstrip_blocks=True, extensions=[Generation, loopcontrols]
        )
        environment.filters["tojson"] = _to_json
        environment.globals |= {"raise_exception": _raise, "strftime_now": _no_clock}
        try:
            return environment.from_string(self.source)
        except jinja2.TemplateError as error:
            raise UserError(f"{self.where}: not a template that can be read: {error}") from None

    def text(self, messages: Sequence[Message], reply: bool) -> str:
        """The conversation; with ``reply`` up to where the assistant is to speak.

        Raises:
            UserError: the template refuses these messages.
        """
        values: dict[str, Any] = {"messages": list(messages), "add_generation_prompt": reply, "tools": None}
        try:
            return str(self._compiled.render(**values, **self.special))
        except UserError:
            raise
        except Exception as error:  # a template raises what its author chose, through jinja
            raise UserError(f"the chat template of {self.where} refuses these messages: {error}") from None


def _to_json(value: Any, ensure_ascii: bool = False, indent: int | None = None) -> str:
    return json.dumps(value, ensure_ascii=ensure_ascii, indent=indent)


def _raise(message: str) -> None:
    raise ValueError(message)


def _no_clock(form: str) -> str:
    raise ValueError(f"it asks for the date ({form}), and the same recipe must give the same text on every day")


def find_template(folder: Path, named: str | None, eos: str | None = None) -> ChatTemplate | None:
    """The template to use.

    Args:
        folder: of the tokenizer.
        named: one of ``NAMED``, or a jinja file; None = what lies beside the tokenizer.
        eos: text of the piece that ends an answer, where the folder does not say.

    Returns:
        None: nothing was named and there is none in the folder.

    Raises:
        UserError: ``named`` is neither, or the folder's files cannot be read.
    """
    config = _config(folder)
    special = {name: _text(config.get(name)) for name in _SPECIAL}
    special["eos_token"] = special["eos_token"] or eos or ""
    if named in NAMED:
        return ChatTemplate(NAMED[str(named)], str(named), special)
    if named is not None:
        path = Path(named)
        if not path.is_file():
            raise UserError(f"chat template {named!r}: neither a file nor one of {', '.join(NAMED)}")
        return ChatTemplate(path.read_text(encoding="utf-8"), str(path), special)
    beside = folder / "chat_template.jinja"
    own = beside.read_text(encoding="utf-8") if beside.is_file() else _own(config)
    return ChatTemplate(own, str(folder), special) if own else None


def named_end(folder: Path) -> str | None:
    """The piece that the tokenizer's configuration calls the end, as fine-tuning trains it; None: it names none."""
    return _text(_config(folder).get("eos_token")) or None


def _config(folder: Path) -> dict[str, Any]:
    path = folder / "tokenizer_config.json"
    if not path.is_file():
        return {}
    try:
        config = json.loads(path.read_text(encoding="utf-8"))
    except ValueError as error:
        raise UserError(f"{path}: {error}") from None
    return config if isinstance(config, dict) else {}


def _own(config: dict[str, Any]) -> str | None:
    own = config.get("chat_template")
    if isinstance(own, list):  # several, by name
        by_name = {entry.get("name"): entry.get("template") for entry in own if isinstance(entry, dict)}
        own = by_name.get("default")
    return own if isinstance(own, str) else None


def _text(piece: object) -> str:
    """A special piece stands as text or as an object with ``content``."""
    if isinstance(piece, dict):
        piece = piece.get("content")
    return piece if isinstance(piece, str) else ""

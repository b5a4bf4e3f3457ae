"""Text to ids and back, as the model's own tokenizer has it."""

from __future__ import annotations

from collections.abc import Sequence
from functools import cached_property
from pathlib import Path
from typing import Any, Protocol

from llmrecipes.data import Tokenizer
from llmrecipes.data.chat_template import ChatTemplate, find_template, named_end
from llmrecipes.errors import UserError
from llmrecipes.inference.prompts import Message


class Codec(Protocol):
    """What generation and perplexity need of a tokenizer."""

    folder: Path
    vocab_size: int

    @property
    def bos_id(self) -> int | None:
        """Id of the piece that begins a text, if there is one; whether it is put there is another question."""
        ...

    @property
    def eos_ids(self) -> list[int]:
        """Ids that end a text."""
        ...

    def encode(self, text: str) -> list[int]:
        """Ids of a text, with the beginning piece if the tokenizer puts one there by itself."""
        ...

    def encode_span(self, text: str) -> tuple[list[int], int]:
        """The same, and how many characters of ``text`` the first id stands for (0 for a beginning piece)."""
        ...

    def decode(self, ids: Sequence[int]) -> str:
        """Text of ids; special pieces give nothing."""
        ...

    @property
    def chat_template(self) -> str:
        """The chat template, jinja.

        Raises:
            UserError: there is none.
        """
        ...

    def chat_text(self, messages: list[Message], reply: bool = True) -> str:
        """A conversation as text by the chat template; with ``reply`` up to where the assistant is to speak.

        Raises:
            UserError: there is no template, or it refuses these messages.
        """
        ...

    def encode_chat(self, text: str) -> list[int]:
        """Ids of what a chat template wrote: special pieces stand in it, and none is put around it."""
        ...

    def chat(self, messages: list[Message]) -> list[int]:
        """Ids of a conversation by the chat template, up to where the assistant is to speak."""
        ...


class PlainCodec:
    """The tokenizer of a training run: ids exactly as in the token shards, no special pieces around a text.

    Args:
        folder: of the tokenizer.
        template: chat template by name or file; None = the one beside the tokenizer.

    Raises:
        UserError: the folder holds no tokenizer.
    """

    def __init__(self, folder: Path, template: str | None = None) -> None:
        self.folder = folder
        self._template = template
        self._tokenizer = Tokenizer(folder)
        self.vocab_size = self._tokenizer.vocab_size

    @cached_property
    def bos_id(self) -> int | None:
        """See :class:`Codec`: the one that an exported folder names."""
        return self._tokenizer.piece_id("<s>")

    @cached_property
    def eos_ids(self) -> list[int]:
        """The piece that ends a document, and the one that fine-tuning trains as the end where it is another."""
        own, named = self._tokenizer.eos_id, named_end(self.folder)
        found = None if named is None else self._tokenizer.piece_id(named)
        return [own] if found is None or found == own else [own, found]

    def encode(self, text: str) -> list[int]:
        """See :class:`Codec`."""
        return self._tokenizer.encode(text)

    def encode_span(self, text: str) -> tuple[list[int], int]:
        """See :class:`Codec`. The characters that the other ids do not spell are those of the first."""
        ids = self.encode(text)
        rest = self.decode(ids[1:]).lstrip("\ufffd ")
        return ids, max(0, len(text) - len(rest)) if text.endswith(rest) else len(self.decode(ids[:1]))

    def decode(self, ids: Sequence[int]) -> str:
        """See :class:`Codec`."""
        return self._tokenizer.decode(ids)

    @cached_property
    def _chat(self) -> ChatTemplate:
        found = find_template(self.folder, self._template, self._tokenizer.piece(self._tokenizer.eos_id))
        if found is None:
            raise _no_template(self.folder)
        return found

    @property
    def chat_template(self) -> str:
        """See :class:`Codec`."""
        return self._chat.source

    def chat_text(self, messages: list[Message], reply: bool = True) -> str:
        """See :class:`Codec`."""
        return self._chat.text(messages, reply)

    def encode_chat(self, text: str) -> list[int]:
        """See :class:`Codec`."""
        return self._tokenizer.encode_marked(text)

    def chat(self, messages: list[Message]) -> list[int]:
        """See :class:`Codec`: the ids that fine-tuning trains on."""
        return self.encode_chat(self.chat_text(messages))


class HFCodec:
    """The tokenizer of a Hugging Face folder, special pieces as it puts them. Code of the folder is never run.

    Raises:
        UserError: the folder holds no tokenizer that transformers reads.
    """

    def __init__(self, folder: Path, eos_ids: Sequence[int] = (), template: str | None = None) -> None:
        self.folder = folder
        self._template = template
        self._tokenizer = _hugging_face(folder)
        self.vocab_size = 1 + max(self._tokenizer.get_vocab().values())
        begin, own = self._tokenizer.bos_token_id, self._tokenizer.eos_token_id
        self.bos_id = None if begin is None else int(begin)
        self.eos_ids = list(eos_ids) or ([] if own is None else [int(own)])

    def encode(self, text: str) -> list[int]:
        """See :class:`Codec`."""
        return list(self._tokenizer(text, verbose=False)["input_ids"])

    def encode_span(self, text: str) -> tuple[list[int], int]:
        """See :class:`Codec`."""
        if not self._tokenizer.is_fast:
            ids = self.encode(text)
            special = bool(ids) and ids[0] in self._tokenizer.all_special_ids
            return ids, 0 if special else len(self.decode(ids[:1]))
        coded = self._tokenizer(text, verbose=False, return_offsets_mapping=True)
        spans = coded["offset_mapping"]
        return list(coded["input_ids"]), int(spans[0][1]) if spans else 0

    def decode(self, ids: Sequence[int]) -> str:
        """See :class:`Codec`."""
        return str(self._tokenizer.decode(list(ids), skip_special_tokens=True, clean_up_tokenization_spaces=False))

    @cached_property
    def _named(self) -> ChatTemplate | None:
        return None if self._template is None else find_template(self.folder, self._template, self._tokenizer.eos_token)

    @property
    def chat_template(self) -> str:
        """See :class:`Codec`."""
        if self._named is not None:
            return self._named.source
        try:
            return str(self._tokenizer.get_chat_template())
        except ValueError:  # there is none, or there are several of which none is the default
            raise _no_template(self.folder) from None

    def chat_text(self, messages: list[Message], reply: bool = True) -> str:
        """See :class:`Codec`. A folder's own template is written by transformers, for which it was made: some ask it
        for the date, which ours refuse.
        """
        if self._named is not None:
            return self._named.text(messages, reply)
        return apply_template(self._tokenizer, self.folder, messages, reply)

    def encode_chat(self, text: str) -> list[int]:
        """See :class:`Codec`."""
        return list(self._tokenizer(text, add_special_tokens=False, verbose=False)["input_ids"])

    def chat(self, messages: list[Message]) -> list[int]:
        """See :class:`Codec`."""
        return self.encode_chat(self.chat_text(messages))


def _hugging_face(folder: Path) -> Any:
    import transformers

    transformers.utils.logging.set_verbosity_error()
    try:
        return transformers.AutoTokenizer.from_pretrained(str(folder), trust_remote_code=False, local_files_only=True)
    except Exception as error:  # transformers and tokenizers raise whatever they like on a damaged file
        reason = (str(error).strip().splitlines() or [type(error).__name__])[0][:200]
        raise UserError(f"{folder}: no tokenizer that can be read here ({reason}); name one with --tokenizer") from None


def _no_template(folder: Path) -> UserError:
    return UserError(
        f"{folder} has no chat template (chat_template.jinja, or chat_template in tokenizer_config.json): leave --chat "
        "(of an evaluation, ask: chat) out, name one with --template, or a tokenizer that has one with --tokenizer"
    )


def apply_template(tokenizer: Any, folder: Path, messages: list[Message], reply: bool = True) -> str:
    """The conversation as text, with ``reply`` up to where the assistant is to speak (jinja in transformers' sandbox).

    Raises:
        UserError: there is no template, or it refuses these messages.
    """
    if not tokenizer.chat_template:
        raise _no_template(folder)
    try:
        return str(tokenizer.apply_chat_template(messages, tokenize=False, add_generation_prompt=reply))
    except Exception as error:  # a template raises what its author chose, through jinja
        raise UserError(f"the chat template of {folder} refuses these messages: {error}") from None


def open_codec(folder: Path, hugging_face: bool, eos_ids: Sequence[int] = (), template: str | None = None) -> Codec:
    """The tokenizer in ``folder``.

    Args:
        folder: holds it.
        hugging_face: the model came with it in one folder: special pieces as transformers puts them around a text;
            otherwise none, as in training.
        eos_ids: what the model says ends a text; empty = what the tokenizer says.
        template: chat template by name or file; None = the one beside the tokenizer.
    """
    return HFCodec(folder, eos_ids, template) if hugging_face else PlainCodec(folder, template)

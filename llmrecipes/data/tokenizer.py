"""The tokenizer of a folder: ``tokenizer.model`` (SentencePiece) or ``tokenizer.json`` (Hugging Face). Torch-free."""

from __future__ import annotations

import hashlib
import os
import re
from collections.abc import Sequence
from functools import cached_property
from pathlib import Path
from typing import Any

from llmrecipes.errors import UserError

EOS_PIECES = ("</s>", "<|endoftext|>", "<EOD>", "<eod>", "<|end_of_text|>", "<eos>", "<EOD|LLM-jp>")
_AT_A_TIME = 16


class Tokenizer:
    """Encodes and decodes plain text; special pieces are found by their text, never through ``bos_id()``.

    Where both files are present SentencePiece encodes (6-8 times faster than the Hugging Face Unigram, same ids).

    Args:
        folder: holds ``tokenizer.model`` or ``tokenizer.json``.

    Raises:
        UserError: the folder or both files are missing, or the file cannot be read.
    """

    def __init__(self, folder: str | Path) -> None:
        self.folder = Path(folder)
        model, fast = self.folder / "tokenizer.model", self.folder / "tokenizer.json"
        if not self.folder.is_dir():
            raise UserError(f"{self.folder}: no such folder; it should hold tokenizer.model or tokenizer.json")
        if not model.is_file() and not fast.is_file():
            raise UserError(f"{self.folder}: no tokenizer in it: neither tokenizer.model nor tokenizer.json")
        self.path = model if model.is_file() else fast
        self._pieces: Any = None
        self._fast: Any = None
        try:
            if self.path is model:
                import sentencepiece

                self._pieces = sentencepiece.SentencePieceProcessor(model_proto=model.read_bytes())
            else:
                import tokenizers

                os.environ.setdefault("TOKENIZERS_PARALLELISM", "false")  # read by the library at each call
                self._fast = tokenizers.Tokenizer.from_file(str(fast))
        except Exception as error:  # both libraries raise bare Exception or RuntimeError on a damaged file
            raise UserError(f"{self.path}: not a readable tokenizer: {str(error).splitlines()[0]}") from None

    @property
    def name(self) -> str:
        """The folder's own name, for manifests and messages."""
        return self.folder.resolve().name

    @cached_property
    def sha256(self) -> str:
        """Hash of the file that determines the vocabulary: ``tokenizer.model`` if present, else ``tokenizer.json``."""
        return hashlib.sha256(self.path.read_bytes()).hexdigest()

    @cached_property
    def vocab_size(self) -> int:
        """Number of ids, added pieces included; every id is below it."""
        if self._pieces is not None:
            return int(self._pieces.get_piece_size())
        # An added piece may sit beyond a gap: the highest id counts, not the number of pieces.
        return 1 + max(self._fast.get_vocab(with_added_tokens=True).values(), default=-1)

    @cached_property
    def eos_id(self) -> int:
        """Id of the piece that ends a document.

        Raises:
            UserError: none of the known pieces is in the vocabulary.
        """
        for piece in EOS_PIECES:
            found = self.piece_id(piece)
            if found is not None:
                return found
        raise UserError(f"{self.path}: no piece that ends a document (looked for {', '.join(EOS_PIECES)})")

    def piece_id(self, piece: str) -> int | None:
        """Id of a piece by its text, or None when it is not in the vocabulary."""
        if self._fast is not None:
            found = self._fast.token_to_id(piece)
            return None if found is None else int(found)
        index = int(self._pieces.piece_to_id(piece))  # an unknown piece gets the id of <unk>
        return index if 0 <= index < self.vocab_size and self._pieces.id_to_piece(index) == piece else None

    def piece(self, index: int) -> str:
        """The text of a piece by its id."""
        return str(self._pieces.id_to_piece(index) if self._pieces is not None else self._fast.id_to_token(index))

    def encode(self, text: str) -> list[int]:
        """Ids of a text, without special pieces around it."""
        if self._pieces is not None:
            return self._pieces.encode(text, out_type=int, add_bos=False, add_eos=False)
        return self._fast.encode(text, add_special_tokens=False).ids

    def encode_marked(self, text: str) -> list[int]:
        """Ids of a text in which special pieces are written out, as a chat template does: ``...answer</s>``."""
        if self._fast is not None:
            return self.encode(text)
        ids: list[int] = []
        for part in self._control.split(text):
            special = self._controls.get(part)
            ids += [special] if special is not None else self.encode(part)
        return ids

    @cached_property
    def _controls(self) -> dict[str, int]:
        """SentencePiece never reads its control pieces from a text by itself."""
        ids = [i for i in range(self.vocab_size) if self._pieces.is_control(i)]
        return {self.piece(i): i for i in ids}

    @cached_property
    def _control(self) -> re.Pattern[str]:
        longest_first = sorted(self._controls, key=len, reverse=True)
        return re.compile("(" + "|".join(map(re.escape, longest_first)) + ")" if longest_first else "(?!)")

    def encode_batch(self, texts: Sequence[str]) -> list[list[int]]:
        """``encode`` of many texts, in one thread: processes, one per core, are how to use more."""
        if self._pieces is not None:
            return self._pieces.encode(list(texts), out_type=int, add_bos=False, add_eos=False, num_threads=1)
        # An encoding is far larger than its ids: those of 8 MB of text at once were 180 MB. Few also stay in the cache.
        groups = (list(texts[start : start + _AT_A_TIME]) for start in range(0, len(texts), _AT_A_TIME))
        encoded = (self._fast.encode_batch_fast(group, add_special_tokens=False) for group in groups)
        return [encoding.ids for group in encoded for encoding in group]

    def decode(self, ids: Sequence[int]) -> str:
        """Text of ids; control pieces (EOS) give nothing."""
        plain = [int(i) for i in ids]
        if self._pieces is not None:
            return str(self._pieces.decode(plain))
        return str(self._fast.decode(plain, skip_special_tokens=True))

    def __len__(self) -> int:
        return self.vocab_size

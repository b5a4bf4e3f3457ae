"""Reads a ``config.json`` key by key: of the right type, in bounds, and nothing passed over in silence."""

from __future__ import annotations

import math
from collections.abc import Mapping
from dataclasses import dataclass, field
from typing import Any, TypeVar

from llmrecipes.errors import UserError

T = TypeVar("T")

# Keys that every config.json may hold and that change no logits.
_NEUTRAL = {
    "_attn_implementation", "_attn_implementation_internal", "_commit_hash", "_name_or_path", "architectures",
    "bos_token_id", "chunk_size_feed_forward", "decoder_start_token_id", "dtype", "eos_token_id",
    "experts_implementation", "id2label", "initializer_range", "is_decoder", "is_encoder_decoder", "label2id",
    "model_type", "output_attentions", "output_hidden_states", "output_router_logits", "pad_token_id",
    "pretraining_tp", "problem_type", "return_dict", "router_aux_loss_coef", "sep_token_id", "task_specific_params",
    "tokenizer_class", "torch_dtype", "transformers_version", "unk_token_id", "use_cache", "vocab_size",
}  # fmt: skip
# What else is found in published files and changes no logits; from-hf says that it leaves them out.
_LEFT_OUT = {
    # of other software
    "auto_map", "is_llama_config", "transformers.js_config", "unsloth_version", "unsloth_fixed",
    "attn_implementation", "cache_implementation", "gradient_checkpointing", "model_max_length",
    "max_seq_length", "finetuning_task", "prefix", "n_special", "predict_special_tokens", "tie_encoder_decoder",
    "torchscript", "use_bfloat16", "tf_legacy_loss", "output_past", "classifier_dropout", "summary_type",
    "summary_use_proj", "summary_activation", "summary_proj_to_labels", "summary_first_dropout",
    # of generation, where files older than generation_config.json have it
    "bad_words_ids", "begin_suppress_tokens", "diversity_penalty", "do_sample", "early_stopping",
    "encoder_no_repeat_ngram_size", "exponential_decay_length_penalty", "forced_bos_token_id", "forced_eos_token_id",
    "length_penalty", "max_length", "max_new_tokens", "min_length", "no_repeat_ngram_size", "num_beam_groups",
    "num_beams", "num_return_sequences", "output_scores", "remove_invalid_values", "repetition_penalty",
    "return_dict_in_generate", "suppress_tokens", "temperature", "top_k", "top_p", "typical_p",
}  # fmt: skip
# Beyond these a number is a slip, and sizes of tensors would overflow.
_WIDEST, _LONGEST, _MOST_LAYERS = 1 << 20, 1 << 31, 10_000


@dataclass
class Reader:
    """Hands out the values of a ``config.json`` and remembers which were asked for and what is wrong.

    Attributes:
        hf: the parsed file. asked: keys that were looked at. problems: sentences.
    """

    hf: Mapping[str, Any]
    asked: set[str] = field(default_factory=lambda: _NEUTRAL | _LEFT_OUT)
    problems: list[str] = field(default_factory=list)

    def get(self, key: str, default: Any = None) -> Any:
        """The value, or ``default`` where it is missing or null."""
        self.asked.add(key)
        value = self.hf.get(key)
        return default if value is None else value

    def _wrong(self, key: str, value: Any, needed: str) -> None:
        shown = repr(value)
        self.problems.append(f"{key} {shown if len(shown) < 80 else shown[:77] + '...'}: {needed}")

    def size(self, key: str, default: int | None = None, most: int = _WIDEST) -> int:
        """A whole number above 0 that must be there, or have a default."""
        value = self.get(key, default)
        if isinstance(value, bool) or not isinstance(value, int) or value < 1:
            self._wrong(key, value, "a whole number above 0 is needed")
            return 1
        if value > most:
            self._wrong(key, value, f"more than {most:,} is surely a mistake")
            return 1
        return value

    def layers(self, key: str = "num_hidden_layers", default: int | None = None) -> int:
        """How many blocks there are."""
        return self.size(key, default, _MOST_LAYERS)

    def optional_size(self, key: str, default: int | None = None, most: int = _LONGEST) -> int | None:
        """A whole number above 0, or None."""
        return None if self.get(key, default) is None else self.size(key, default, most)

    def number(self, key: str, default: float, least: float | None = None) -> float:
        """A number above 0, or from ``least`` on."""
        value = self.get(key, default)
        if not _is_number(value) or (value <= 0 if least is None else value < least):
            self._wrong(key, value, "a number above 0 is needed" if least is None else f"at least {least} is needed")
            return 1.0
        return float(value)

    def flag(self, key: str, default: bool) -> bool:
        """True or false."""
        value = self.get(key, default)
        if not isinstance(value, bool):
            self._wrong(key, value, "true or false is needed")
            return default
        return value

    def word(self, key: str, meanings: Mapping[str, T], default: str) -> T:
        """What one of several words means."""
        value = self.get(key, default)
        if not isinstance(value, str) or value not in meanings:
            self._wrong(key, value, f"one of {', '.join(meanings)} is supported")
            return meanings[default]
        return meanings[value]

    def numbers(self, key: str, kind: type = int) -> list[Any] | None:
        """A list of whole numbers (``int``), or of words (``str``); None where it is missing."""
        value = self.get(key)
        if value is None:
            return None
        if not isinstance(value, list) or any(not isinstance(one, kind) or isinstance(one, bool) for one in value):
            self._wrong(key, value, f"a list of {'whole numbers' if kind is int else 'words'} is needed")
            return None
        return value

    def only(self, key: str, *allowed: Any, why: str) -> None:
        """Refuse a value that the decoder cannot do; a missing or null one is fine."""
        value = self.get(key)
        if value is not None and value not in allowed:
            self._wrong(key, value, why)

    def dropout(self, *keys: str) -> float:
        """One probability for all places, as the decoder has it."""
        values = {self.number(key, 0.0, least=0.0) for key in keys}
        if len(values) == 1:
            return values.pop()
        self.problems.append(f"{', '.join(keys)} differ: one dropout for all is supported; set them all to 0 or alike")
        return 0.0

    def no_dropout(self, key: str) -> None:
        """Refuse dropout of the attention weights alone."""
        self.only(key, 0, why="dropout of the attention weights alone is not supported; set it to 0")

    def left_out(self) -> list[str]:
        """Keys that say something and change no logits."""
        return [key for key in self.hf if key in _LEFT_OUT and _says_something(self.hf[key])]

    def finish(self) -> None:
        """Refuse what was found wrong, and every key that nobody asked for and that says something."""
        if self.get("quantization_config") is not None:
            self.problems.append("quantization_config: quantized weights are not read; save them in bfloat16 first")
        # A leading underscore marks what transformers keeps for itself, such as the name a file once had.
        unasked = [key for key in self.hf if key not in self.asked and not key.startswith("_")]
        for key in unasked:
            if _says_something(self.hf[key]):
                self._wrong(key, self.hf[key], _UNKNOWN)
        if self.problems:
            raise UserError(*(f"config.json: {problem}" for problem in self.problems))


_UNKNOWN = "not understood; what it does would be lost. If it changes no logits, remove it from config.json"


def _is_number(value: Any) -> bool:
    return isinstance(value, int | float) and not isinstance(value, bool) and math.isfinite(value)


def _says_something(value: Any) -> bool:
    return value is not None and value is not False and value not in ([], {}, "")

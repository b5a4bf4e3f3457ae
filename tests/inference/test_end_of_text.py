"""Where generation stops: at what fine-tuning trained as the end, whatever the tokenizer's own end is called."""

from __future__ import annotations

import sys

from helpers import REPOSITORY

sys.path.insert(0, str(REPOSITORY / "tests" / "data"))
from chat_tokenizers import byte_level

from llmrecipes.data.tokenizer import Tokenizer
from llmrecipes.inference.codec import PlainCodec


def test_the_end_that_the_configuration_names_stops_too(tmp_path):
    """As SmolLM2's tokenizer: documents end with one piece, answers with another. The mutant knows the first only."""
    named = byte_level(tmp_path / "named", eos="<|im_end|>")
    tokenizer = Tokenizer(named)
    ends = [tokenizer.piece_id(piece) for piece in ("</s>", "<|im_end|>")]
    assert ends[0] == tokenizer.eos_id != ends[1]
    assert PlainCodec(named).eos_ids == ends
    assert PlainCodec(byte_level(tmp_path / "plain", eos="</s>")).eos_ids == ends[:1]

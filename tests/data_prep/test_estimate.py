"""Token estimates: exact for small inputs, within the error bar for large ones."""

from pathlib import Path

import pytest

from data_prep.commands import run
from data_prep.estimate import estimate_file
from data_prep.jsonl import documents
from llmrecipes.data.tokenizer import Tokenizer
from llmrecipes.errors import UserError


def test_exact_when_all_are_tokenized_and_within_the_bar_otherwise(corpus, tokenizer, capsys):
    pieces, inside, seen = Tokenizer(tokenizer), 0, 0
    for name in ("ja_towns", "en_towns", "ja_people", "en_people"):
        path = Path(corpus) / f"{name}.jsonl"
        exact = sum(len(pieces.encode(text)) + 1 for text in documents(path))
        whole = estimate_file(path, pieces, 1000, "text", 0)
        assert (whole.tokens, whole.error) == (exact, 0.0)
        for seed in range(10):
            part = estimate_file(path, pieces, 25, "text", seed)
            assert part.sampled == 25 and 0 < part.error < 0.3 * exact
            inside, seen = inside + (abs(part.tokens - exact) <= part.error), seen + 1
    assert seen == 40 and inside >= 34  # 95 % of 40 are 38
    run("estimate", ["--input", str(path), "--tokenizer", str(tokenizer), "--sample", "20"])
    assert "(20 documents tokenized)" in capsys.readouterr().out


def test_mistakes(corpus, tokenizer):
    with pytest.raises(UserError, match="at least 2"):
        run("estimate", ["--input", str(corpus / "ja_towns.jsonl"), "--tokenizer", str(tokenizer), "--sample", "1"])

"""What judging will cost, before the first call. Torch-free."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass

from llmrecipes.evaluate.mt_bench.config import JudgeConfig

JUDGEMENT_TOKENS = 250  # of a usual judgement of GPT-4
MESSAGE_TOKENS = 4  # that an endpoint counts around each message


def about_tokens(text: str) -> float:
    """A guess that needs no tokenizer of the judge: 4 ASCII characters a token, others 1.1 tokens each."""
    plain = sum(character.isascii() for character in text)
    return plain / 4 + (len(text) - plain) * 1.1


@dataclass(frozen=True)
class Estimate:
    """Of all calls that are still to be made.

    Attributes:
        calls: how many.
        tokens_in, tokens_out: about so many.
        cost: in the currency of the prices; None without prices.
    """

    calls: int
    tokens_in: int
    tokens_out: int
    cost: float | None

    def sentence(self) -> str:
        """For people."""
        price = "no prices given" if self.cost is None else f"about {self.cost:,.2f} at the prices of the recipe"
        return (
            f"{self.calls} judgements to ask for: about {self.tokens_in:,} tokens in, {self.tokens_out:,} out; {price}"
        )


def estimate(config: JudgeConfig, calls: Sequence[list[dict[str, str]]]) -> Estimate:
    """The cost of the calls.

    Args:
        config: prices and the longest judgement.
        calls: messages of each.
    """
    tokens_in = sum(about_tokens(m["content"]) + MESSAGE_TOKENS for messages in calls for m in messages)
    tokens_out = min(config.max_tokens, JUDGEMENT_TOKENS) * len(calls)
    cost = None
    if config.price_in is not None and config.price_out is not None:
        cost = (tokens_in * config.price_in + tokens_out * config.price_out) / 1e6
    return Estimate(len(calls), round(tokens_in), tokens_out, cost)

"""The part of a recipe that says how conversations are written and who judges them. Torch-free."""

from __future__ import annotations

import os
from collections.abc import Iterator
from dataclasses import asdict, dataclass, field
from pathlib import Path
from typing import Any, Literal

from data_prep.frame.config import Finding

# Of FastChat's common.py; other categories are answered with temperature 0.
TEMPERATURES = {"writing": 0.7, "roleplay": 0.7, "stem": 0.1, "humanities": 0.1}
WITH_REFERENCE = ["math", "reasoning", "coding"]
KINDS = {"endpoint": ("url", "model"), "model": ("model",), "recorded": ("file",)}  # and what each needs
# What does not change a judgement; the price of a token, who waits how long.
NOT_CONTENT = ("key_env", "price_in", "price_out", "max_cost", "workers", "retries", "timeout", "url")


@dataclass(frozen=True, kw_only=True)
class JudgeConfig:
    """Who judges.

    Args:
        kind: "endpoint" (any OpenAI-compatible server), "model" (a folder that llmrecipes opens), "recorded" (judgements of a file).
        url: of the endpoint, up to and without /chat/completions.
        model: its name at the endpoint, or the folder; of recorded judgements: whose answers were judged, where the file holds several.
        file: of recorded judgements, JSON lines of FastChat: question_id, turn, judgment, model.
        key_env: name of the environment variable that holds the key of the endpoint; null = it wants none.
        temperature: of the judge.
        max_tokens: longest judgement.
        price_in: of a million tokens that the judge reads.
        price_out: of a million tokens that it writes.
        max_cost: do not begin when the estimate is higher.
        workers: judgements asked for at the same time.
        retries: of a call that failed or found the server busy, waiting longer each time.
        timeout: seconds until a call counts as failed.
    """  # noqa: E501 - one line an argument is what the help shows

    kind: Literal["endpoint", "model", "recorded"] = "endpoint"
    url: str | None = None
    model: str | None = None
    file: str | None = None
    key_env: str | None = "OPENAI_API_KEY"
    temperature: float = 0.0
    max_tokens: int = 2048
    price_in: float | None = None
    price_out: float | None = None
    max_cost: float | None = None
    workers: int = 4
    retries: int = 5
    timeout: float = 120.0

    def problems(self) -> Iterator[Finding]:
        """What is wrong."""
        for key in (key for key in KINDS[self.kind] if getattr(self, key) is None):
            yield (key,), f"{key} is missing: a judge of kind {self.kind} needs it", "name it"
        if self.kind == "endpoint" and self.url is not None and not self.url.startswith(("http://", "https://")):
            yield ("url",), f"url: {self.url} is no address", "write http://host:port/v1"
        if self.url is not None and "@" in self.url.partition("://")[2].partition("/")[0]:
            yield ("url",), "url: holds a name or password, which logs would show", "use key_env"
        if self.max_cost is not None and (self.price_in is None or self.price_out is None):
            yield ("max_cost",), "max_cost: without prices nothing can be estimated", "give price_in and price_out"
        small = [key for key in ("workers", "max_tokens") if getattr(self, key) < 1]
        small += [key for key in ("retries", "temperature") if getattr(self, key) < 0] + ["timeout"] * (
            self.timeout <= 0
        )
        for key in small:
            yield (key,), f"{key}: {getattr(self, key)} is too small", "write a larger number"

    def missing(self) -> Iterator[Finding]:
        """Files and keys that are not there."""
        if self.kind == "endpoint" and self.key_env is not None and not os.environ.get(self.key_env):
            what = f"key_env: the environment has no {self.key_env}"
            yield ("key_env",), what, "export it, or write key_env: null for a server that wants no key"
        path = self.file if self.kind == "recorded" else self.model if self.kind == "model" else None
        if path is not None and not Path(path).exists():
            yield (
                ("file" if self.kind == "recorded" else "model",),
                f"{path}: no such file or folder",
                "correct the path",
            )


@dataclass(frozen=True, kw_only=True)
class MTBenchConfig:
    """How conversations are written and judged.

    Args:
        judge: who judges; its keys stand below.
        references: file of reference answers (JSON lines of FastChat, or question_id and reference); null = those of the questions.
        with_reference: categories that are judged against the reference.
        prompts: file of judge prompts (JSON lines of FastChat); null = built in, see language.
        language: of the built-in judge prompts.
        temperatures: of categories; those left out are as in FastChat (writing and roleplay 0.7, stem and humanities 0.1, others 0).
        seed: question number i draws with seed + i.
    """  # noqa: E501 - one line an argument is what the help shows

    judge: JudgeConfig
    references: str | None = None
    with_reference: list[str] = field(default_factory=lambda: list(WITH_REFERENCE))
    prompts: str | None = None
    language: Literal["en", "ja"] = "en"
    temperatures: dict[str, float] = field(default_factory=dict)
    seed: int = 0

    def temperature(self, category: str) -> float:
        """Of a category."""
        return self.temperatures.get(category, TEMPERATURES.get(category, 0.0))

    def content(self) -> dict[str, Any]:
        """What decides answers and judgements."""
        judge = {key: value for key, value in asdict(self.judge).items() if key not in NOT_CONTENT}
        return asdict(self) | {"judge": judge}

    def problems(self) -> Iterator[Finding]:
        """What is wrong."""
        for path, what, hint in self.judge.problems():
            yield ("judge", *path), f"judge.{what}", hint
        for category in (c for c, value in self.temperatures.items() if value < 0):
            yield ("temperatures", category), f"temperatures: {category} is below 0", "write 0 or more"
        if self.prompts is not None and self.language != "en":
            yield ("language",), "language: has no effect beside prompts", "leave one of them out"

    def missing(self) -> Iterator[Finding]:
        """Files that are not there."""
        for key in ("references", "prompts"):
            name = getattr(self, key)
            if name is not None and not Path(name).is_file():
                yield (key,), f"{key}: {name}: no such file", "correct the path"
        for path, what, hint in self.judge.missing():
            yield ("judge", *path), f"judge.{what}", hint

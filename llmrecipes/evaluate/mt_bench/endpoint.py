"""A judge behind an OpenAI-compatible address. Torch-free; the key is read from the environment and shown nowhere."""

from __future__ import annotations

import json
import os
import random
import time
import urllib.error
import urllib.request
from collections.abc import Callable
from typing import Any

from llmrecipes.errors import UserError
from llmrecipes.evaluate.mt_bench.config import JudgeConfig

BUSY = {408, 409, 425, 429, 500, 502, 503, 504, 529}  # worth another try
LONGEST_WAIT = 60.0
Messages = list[dict[str, str]]


class Unanswered(Exception):
    """The endpoint gave no judgement after all tries; repeating the command asks again."""


class _NoRedirect(urllib.request.HTTPRedirectHandler):
    """A redirect would carry the key to another address."""

    def redirect_request(self, *_: Any) -> None:
        """None: the redirect is the answer."""


class Endpoint:
    """Asks ``URL/chat/completions``.

    Args:
        config: of kind ``endpoint``.
        wait: sleeps; replaced in tests.
    """

    def __init__(self, config: JudgeConfig, wait: Callable[[float], object] = time.sleep) -> None:
        assert config.url is not None
        self.config = config
        self.address = config.url.rstrip("/").removesuffix("/chat/completions") + "/chat/completions"
        self._key = os.environ.get(config.key_env, "") if config.key_env else ""
        self._wait = wait
        self._opener = urllib.request.build_opener(_NoRedirect)

    def judge(self, messages: Messages) -> tuple[str, dict[str, int]]:
        """The judgement, and how many tokens the endpoint says it cost.

        Raises:
            UserError: the endpoint refuses for good (wrong key, model or address).
            Unanswered: it failed or was busy at every try.
        """
        reason, again = "", 0.0
        for attempt in range(self.config.retries + 1):
            if attempt:
                self._wait(max(again, min(LONGEST_WAIT, 2.0**attempt) * random.uniform(0.5, 1)))
            try:
                return self._read(self._send(messages))
            except urllib.error.HTTPError as error:
                reason, again = f"HTTP {error.code}: {self._clean(_body(error))}", _retry_after(error)
                if error.code not in BUSY:
                    raise UserError(f"judge {self.address}: {reason}; {_advice(error.code)}") from None
            except (
                OSError,
                ValueError,
                KeyError,
                IndexError,
                TypeError,
            ) as error:  # no answer, or not one of this kind
                reason, again = self._clean(f"{type(error).__name__}: {error}"), 0.0
        raise Unanswered(f"judge {self.address}: {reason} ({self.config.retries + 1} tries)")

    def _send(self, messages: Messages) -> Any:
        body = {
            "model": self.config.model,
            "messages": messages,
            "temperature": self.config.temperature,
            "max_tokens": self.config.max_tokens,
        }
        headers = {"Content-Type": "application/json"} | ({"Authorization": f"Bearer {self._key}"} if self._key else {})
        request = urllib.request.Request(self.address, json.dumps(body).encode(), headers)
        with self._opener.open(request, timeout=self.config.timeout) as answer:
            return json.loads(answer.read())

    @staticmethod
    def _read(answer: Any) -> tuple[str, dict[str, int]]:
        text = answer["choices"][0]["message"]["content"]
        if not isinstance(text, str) or not text.strip():
            raise ValueError("an empty judgement")
        usage = answer.get("usage") or {}
        counted = {key: int(usage.get(f"{key}_tokens") or 0) for key in ("prompt", "completion")}
        return text, counted

    def _clean(self, text: str) -> str:
        """One short line without the key, which some servers repeat."""
        text = " ".join(text.split())[:300]
        return text.replace(self._key, "***") if self._key else text


def _body(error: urllib.error.HTTPError) -> str:
    try:
        return error.read(2000).decode("utf-8", "replace") or str(error.reason)
    except OSError:
        return str(error.reason)


def _retry_after(error: urllib.error.HTTPError) -> float:
    """What the server asks for; it may also be a date, which the usual waiting covers."""
    try:
        return min(LONGEST_WAIT, float(error.headers.get("Retry-After", "")))
    except ValueError:
        return 0.0


def _advice(code: int) -> str:
    if code in (401, 403):
        return "the key in judge.key_env is wrong, or may not use this model"
    if 300 <= code < 400:
        return "give the address it redirects to as judge.url"
    return "check judge.url and judge.model"

"""Tells an address of an alarm. The address is a secret with most services: it is shown nowhere."""

from __future__ import annotations

import json
import urllib.error
import urllib.request
from typing import Any
from urllib.parse import urlsplit

from llmrecipes.errors import UserError

VARIABLE = "LLMRECIPES_WEBHOOK"
TIMEOUT = 10.0


class Webhook:
    """Posts JSON; ``text`` and ``content`` are what Slack and Discord show.

    Args:
        address: http or https.

    Raises:
        UserError: it is no address.
    """

    def __init__(self, address: str) -> None:
        parts = urlsplit(address)
        if parts.scheme not in ("http", "https") or not parts.hostname:
            raise UserError("--webhook: no address of the kind https://host/...")
        self._address, self.host = address, parts.hostname

    def post(self, message: dict[str, Any]) -> str | None:
        """Why it was not delivered; None when it was."""
        text = message["text"]
        body = json.dumps({**message, "content": text}, ensure_ascii=False).encode()
        request = urllib.request.Request(self._address, body, {"Content-Type": "application/json"})
        try:
            with urllib.request.urlopen(request, timeout=TIMEOUT) as answer:
                answer.read(1000)
        except urllib.error.HTTPError as error:
            return f"webhook on {self.host}: HTTP {error.code}"
        except OSError as error:
            return f"webhook on {self.host}: {type(error).__name__}"
        return None

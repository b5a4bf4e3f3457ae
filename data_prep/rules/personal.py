"""Personal data that a pattern can find: e-mail addresses and telephone numbers, masked without changing the rest."""

from __future__ import annotations

import re

EMAIL_MASK = "xxxx@yyyy.com"
PHONE_MASK = "00-0000-0000"
_EMAIL = re.compile(r"[A-Za-z0-9_.+-]{1,64}@(?:[A-Za-z0-9-]+\.)+[A-Za-z]{2,}")
_DASH = r"[-‐‑–−ー－]"
_PHONE = re.compile(
    rf"""(?<![\w.,/-])(?:
      0\d{{1,4}}{_DASH}\d{{1,4}}{_DASH}\d{{3,4}}           # 03-1234-5678
    | 0\d{{1,4}}[ ]?\(\d{{1,4}}\)[ ]?\d{{3,4}}             # 03(1234)5678
    | \(0\d{{1,4}}\)[ ]?\d{{1,4}}{_DASH}\d{{3,4}}          # (03)1234-5678
    | 0[5789]0\d{{8}}                                      # 09012345678
    | \+\d{{1,3}}[ -]\d{{1,4}}[ -]\d{{2,4}}[ -]\d{{3,4}}   # +81 3 1234 5678
    | \(\d{{3}}\)[ ]?\d{{3}}-\d{{4}}                       # (212) 555-0100
    | \d{{3}}-\d{{3}}-\d{{4}}                              # 212-555-0100
    )(?![\w-])""",
    re.VERBOSE,
)


def mask(text: str) -> str:
    """E-mail addresses and Japanese, North American and international telephone numbers replaced by masks."""
    if "@" in text:
        text = _EMAIL.sub(EMAIL_MASK, text)
    return _PHONE.sub(PHONE_MASK, text)

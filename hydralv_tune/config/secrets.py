"""Passwords in texts and URLs, and how they are kept out of what others can read."""

from __future__ import annotations

import re

HIDDEN = "***"
_SECRET_KEY = r"[\w.-]*(?:password|passwd|secret|token|scram_)[\w.-]*"
# A password may hold spaces and '@' where its owner forgot to encode them, so all up to the last
# '@' before another URL is hidden: rather too much than a part of it too little.
_PASSWORD = re.compile(r"(?P<head>://[^:/]*:(?!//))(?:(?!://).)*@", re.DOTALL)
_IN_QUERY = re.compile(rf"(?P<head>[?&]{_SECRET_KEY}=)[^&]*", re.IGNORECASE)
_IN_WORDS = re.compile(
    rf"(?P<head>(?<![\w?&]){_SECRET_KEY}\s*=\s*)(?:'[^']*'|[^\s&'\"]+)", re.IGNORECASE
)


def mask_passwords(text: str) -> str:
    """Return a text in which every password of a URL is `***`, and every other secret too.

    Args:
        text: A URL, or a message of a database driver that may quote one.
    """
    for pattern, end in ((_PASSWORD, "@"), (_IN_QUERY, ""), (_IN_WORDS, "")):
        text = pattern.sub(rf"\g<head>{HIDDEN}{end}", text)
    return text


def is_secret(key: str) -> bool:
    """Return whether the value of a key in a URL's query is not to be shown."""
    return re.fullmatch(_SECRET_KEY, key, re.IGNORECASE) is not None

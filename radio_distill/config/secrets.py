"""Passwords and signatures in addresses: refused in recipes, which are copied into run folders, and cut out of messages."""

from __future__ import annotations

import re

__all__ = ["holds_secret", "without_secrets"]

_LOGIN = re.compile(r"(?<=://)[^/@\s:]+:(?![$*])[^/@\s]+(?=@)")
_QUERY = re.compile(
    r"(?<=[?&])([\w-]*(?:sig|signature|token|secret|password|credential|api_?key)[\w-]*)=(?![$*])[^&\s'\"]+", re.IGNORECASE
)
_HEADER = re.compile(r"(?<=authorization:)\s*(?:bearer|basic)\s+(?![$*])[^\s'\"]+", re.IGNORECASE)


def holds_secret(text: str) -> bool:
    """Whether an address or a command holds a login, a signature or a token in clear; `$VAR` and `${VAR}` are none."""
    return any(pattern.search(text) for pattern in (_LOGIN, _QUERY, _HEADER))


def without_secrets(text: str) -> str:
    """The same text with `***` in their places."""
    return _HEADER.sub(" ***", _QUERY.sub(r"\1=***", _LOGIN.sub("***", text)))

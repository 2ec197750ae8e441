"""Passwords, signatures and tokens in text: refused in recipes and cards, which are copied into run folders, and cut out of messages.

Three ways to tell one: where it stands (a login in an address, `curl -u`), the name it has (`?sig=`, `--password`, `export
FOO_TOKEN=`, `X-Api-Key:`), its own shape (`hf_...`, `AKIA...`). What begins with `$` is a variable and no secret.
"""

from __future__ import annotations

import re
from collections.abc import Iterator
from itertools import pairwise
from typing import Any

from pydantic import BaseModel

from .document import KeyPath, Problem, dotted

__all__ = ["holds_secret", "secret_problems", "without_secrets"]

WORDS = frozenset({
    "sig", "signature", "token", "secret", "password", "passwd", "passphrase", "pass", "pwd", "credential", "credentials",
    "bearer", "apikey", "accesskey", "secretkey", "accountkey", "privatekey", "authtoken", "accesstoken",
})  # fmt: skip
"""Of a name: its value is a secret."""
KEYS = frozenset({"api", "access", "account", "auth", "private", "secret", "signing", "shared", "subscription"})
"""The same before `key`: `access_key`, `AccountKey`."""
HARMLESS = frozenset({
    "pad", "eos", "bos", "unk", "sep", "cls", "class", "mask", "image", "special", "max", "num", "per", "reg", "register",
    "dist", "prefix", "patch",
})  # fmt: skip
"""Of a name: these tokens are those of a network (`pad_token=0`)."""
PLACES = frozenset({
    "file", "path", "dir", "folder", "env", "name", "type", "size", "length", "count", "expires", "expiration", "lifetime",
    "provider", "service",
})  # fmt: skip
"""Last in a name: where the secret is, or a fact about it (`--password-file`)."""

NAME = r"(?P<name>[A-Za-z][A-Za-z0-9_.-]{0,80})"
BEGIN = r"\\?['\"]?(?![$*`<])"
ONE = r"[^\s'\"&;|,<>\\]"
VALUE = rf"{BEGIN}(?P<secret>{ONE}+)"
HARMLESS_VALUE, REST = re.compile(rf"(?i:true|false|none|null|\d{{1,2}})(?!{ONE})"), re.compile(f"{ONE}+")
NAMED = (
    re.compile(rf"(?<![\w./$%{{-]){NAME}={BEGIN}(?={ONE})"),  # ?sig=x, &token=x, export A_TOKEN=x, AccountKey=x
    re.compile(rf"(?<![\w-])--?{NAME}(?:=|\s+)(?![-@]){BEGIN}(?={ONE})"),  # --password x, --token=x
    re.compile(rf"(?:-H|--header)[\s=]*['\"]?{NAME}:\s*(?![@]){BEGIN}(?={ONE})", re.IGNORECASE),  # -H X-Api-Key:x
    re.compile(rf"(?<![\w./]){NAME}:\s+{BEGIN}(?={ONE})"),  # 'X-Api-Key: x'
)
"""A name and where its value begins; it depends on the name. A value may hold names: `path=https://host/?sig=x`."""
PLACED = (
    re.compile(r"://(?P<secret>[^/@\s:$*]*:(?![$*])[^/@\s]+)@"),
    re.compile(rf"authorization\s*[:=]\s*(?:[a-z0-9-]+\s+)?+{VALUE}", re.IGNORECASE),
    re.compile(r"(?<![\w-])bearer[\s:]+(?P<secret>[\w.~+/=-]{12,})", re.IGNORECASE),
    re.compile(r"(?<![\w-])(?:-u|--(?:proxy-)?user)[\s=]*['\"]?(?!\d+:\d+\b)[^\s'\":/$]+:(?P<secret>(?![$*])[^\s'\"]+)"),
    re.compile(rf"(?<![\w-])sshpass\s+-p\s*{VALUE}"),
)
"""What is a secret because of where it stands: logins, `Authorization:`, curl's -u."""
SHAPED = re.compile(
    r"(?<![A-Za-z0-9_-])(?P<secret>"
    r"hf_[A-Za-z0-9]{20,}"  # Hugging Face
    r"|wandb_v\d_\w{20,}|local-[0-9a-f]{40}"  # Weights & Biases, and a server of one's own
    r"|(?:AKIA|ASIA)[0-9A-Z]{16}"  # AWS
    r"|AIza[\w-]{35}|ya29\.[\w-]{20,}|GOOG1?E?[0-9A-Z]{20,}"  # Google
    r"|gh[pousr]_[A-Za-z0-9]{20,}|github_pat_\w{20,}|glpat-[\w-]{20,}"  # GitHub, GitLab
    r"|sk-[\w-]{20,}|xox[abeprs]-[\w-]{10,}|npm_[A-Za-z0-9]{30,}|pypi-[\w-]{30,}"  # OpenAI and Anthropic, Slack, npm, PyPI
    r"|eyJ[\w-]{8,}\.eyJ[\w-]{8,}(?:\.[\w-]*)?"  # JSON web tokens
    r"|-----BEGIN [A-Z ]{0,30}PRIVATE KEY-----"
    r")"
)
"""Tokens by their own shape. Keys of wandb that are 40 hexadecimal digits look like commits: only their name tells."""


def holds_secret(text: str) -> bool:
    """Whether a text holds a login, a signature or a token in clear; `$VAR` and `${VAR}` are none."""
    return without_secrets(text) != text


def without_secrets(text: str) -> str:
    """The same text with `***` in their places."""
    for pattern in (*PLACED, SHAPED):
        text = pattern.sub(_cut, text)
    for pattern in NAMED:
        text = "".join(_cut_named(pattern, text))
    return text


def secret_problems(model: BaseModel) -> list[Problem]:
    """One problem for every text of a recipe or card, of any depth, that holds a secret; no problem shows it."""
    found = {path for path, text in _texts(model.model_dump(), ()) if holds_secret(text)}
    why = "holds a password or token, and recipes and cards are copied into run folders, logs and wandb"
    return [
        Problem(f"{without_secrets(dotted(path))!r} {why}; export it and write $NAME in its place", path)
        for path in sorted(found, key=str)
    ]


def _texts(values: Any, path: KeyPath) -> Iterator[tuple[KeyPath, str]]:
    if isinstance(values, str):
        yield path, values
    elif isinstance(values, dict):
        for key, value in values.items():
            yield (*path, key), str(key)
            yield from _texts(value, (*path, key))
            if isinstance(value, str):  # a name and its value, as in a card's `params`
                yield (*path, key), f"{key}={value}"
    elif isinstance(values, list | tuple):
        for i, value in enumerate(values):
            yield from _texts(value, (*path, i))


def _names_secret(name: str) -> bool:
    words = [word.lower() for word in re.findall(r"[A-Z]+(?![a-z])|[A-Z]?[a-z]+", name)]
    if not words or words[-1] in PLACES or HARMLESS & set(words):
        return False
    keys = any(first in KEYS and second == "key" for first, second in pairwise(words))
    return keys or not WORDS.isdisjoint(words)


def _cut(found: re.Match[str]) -> str:
    start, end = found.span("secret")
    return f"{found.string[found.start() : start]}***{found.string[end : found.end()]}"


def _cut_named(pattern: re.Pattern[str], text: str) -> Iterator[str]:
    kept = at = 0
    while found := pattern.search(text, at):
        at = found.end()
        if _names_secret(found["name"]) and not HARMLESS_VALUE.match(text, at):
            yield f"{text[kept:at]}***"
            value = REST.match(text, at)
            kept = at = value.end() if value else at
    yield text[kept:]

"""Conversations as tokens: the chat template, the image's place, and which tokens are learned."""

from __future__ import annotations

import re
from collections.abc import Iterator, Sequence
from typing import Any, Literal, NamedTuple

from ..errors import DataError

__all__ = ["IMAGE", "IGNORE", "LITERAL_IMAGE", "VICUNA", "Turn", "Encoded", "encode", "render", "with_images"]

IMAGE = "<image>"
"""Where the tokens of an image go; one token in the vocabulary, repeated."""
LITERAL_IMAGE = "\ue000"
"""Stands for the letters `<image>` where a text speaks of them and no image is meant (code, say); of Unicode's private use."""
IGNORE = -100
"""Label of a token that is not learned."""
Template = Literal["chat", "plain"]

# Vicuna 1.5's conversation without its preface, for tokenizers without a template; content may be text or typed parts.
VICUNA = (
    "{{ bos_token or '' }}{% for m in messages %}"
    "{% if m.content is string %}{% set text = m.content %}{% else %}{% set ns = namespace(text='') %}"
    "{% for part in m.content %}{% set ns.text = ns.text + ('<image>\n' if part.type == 'image' else part.text) %}{% endfor %}"
    "{% set text = ns.text %}{% endif %}"
    "{% if m.role == 'user' %}USER: {{ text }} ASSISTANT:"
    "{% elif m.role == 'assistant' %} {{ text }}{{ eos_token }}{% else %}{{ text }} {% endif %}{% endfor %}"
)


class Turn(NamedTuple):
    role: Literal["user", "assistant"]
    text: str


class Encoded(NamedTuple):
    ids: list[int]
    labels: list[int]
    """`ids`, with IGNORE where the user speaks."""


def with_images(turns: Sequence[Turn], tokens: Sequence[int], *, key: str) -> list[Turn]:
    """Put the tokens of every image, `tokens` of them, where the text marks it, or before the first turn when it marks none.

    Images without tokens take their marks away. Raises DataError when there are marks, but not one for every image.
    """
    marks, images = sum(turn.text.count(IMAGE) for turn in turns), len(tokens)
    if marks not in (0, images):
        raise DataError(
            f"conversation {key} marks {marks} images ({IMAGE}) and has {images}; expected a mark for each, or none"
        )
    first, *rest = turns
    if marks == 0:
        first = first._replace(text=f"{IMAGE}\n" * images + first.text)
    if images and not any(tokens):
        return [turn._replace(text=turn.text.replace(f"{IMAGE}\n", "").replace(IMAGE, "").strip()) for turn in (first, *rest)]
    counts = iter(tokens)
    return [turn._replace(text=re.sub(IMAGE, lambda _: IMAGE * next(counts), turn.text)) for turn in (first, *rest)]


def render(tokenizer: Any, turns: Sequence[Turn]) -> str:
    """The text up to where the assistant answers the last turn."""
    messages = [{"role": turn.role, "content": turn.text} for turn in turns]
    return str(tokenizer.apply_chat_template(messages, tokenize=False, add_generation_prompt=True))


def encode(tokenizer: Any, turns: Sequence[Turn], *, template: Template, max_length: int, key: str) -> Encoded:
    """Tokens and labels of a conversation, cut after `max_length` tokens. Raises DataError."""
    parts = _plain(tokenizer, turns) if template == "plain" else _chat(tokenizer, turns, key)
    ids: list[int] = []
    labels: list[int] = []
    for text, is_answer in parts:
        tokens = _tokens(tokenizer, text)
        ids += tokens
        labels += tokens if is_answer else [IGNORE] * len(tokens)
    return Encoded(ids[:max_length], labels[:max_length])


def _tokens(tokenizer: Any, text: str) -> list[int]:
    first, *others = text.split(LITERAL_IMAGE)
    ids: list[int] = tokenizer.encode(first, add_special_tokens=False)
    for other in others:
        ids += tokenizer.encode(IMAGE, add_special_tokens=False, split_special_tokens=True)
        ids += tokenizer.encode(other, add_special_tokens=False)
    return ids


def _plain(tokenizer: Any, turns: Sequence[Turn]) -> Iterator[tuple[str, bool]]:
    """LLaVA's first stage: the image, then what is said about it; the question is left out."""
    yield (tokenizer.bos_token or "") + IMAGE * turns[0].text.count(IMAGE), False
    yield turns[-1].text + tokenizer.eos_token, True


def _chat(tokenizer: Any, turns: Sequence[Turn], key: str) -> Iterator[tuple[str, bool]]:
    """Every answer is what the template adds behind its prompt."""
    done = ""
    for i, turn in enumerate(turns):
        if turn.role != "assistant":
            continue
        prompt = render(tokenizer, turns[:i])
        messages = [{"role": t.role, "content": t.text} for t in turns[: i + 1]]
        whole = str(tokenizer.apply_chat_template(messages, tokenize=False))
        if not (prompt.startswith(done) and whole.startswith(prompt)):
            raise DataError(
                f"conversation {key}: the tokenizer's chat template rewrites earlier turns, so that answers cannot be told from "
                "questions; give the tokenizer another chat_template, or use template=plain"
            )
        yield prompt[len(done) :], False
        yield whole[len(prompt) :], True
        done = whole

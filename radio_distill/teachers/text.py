"""The text tower that belongs to a teacher's summary: for zero-shot classification and retrieval, never for training.

A tower comes from the teacher's card (local weights, or the hub where the card names a hub id and HF_HUB_OFFLINE is not
set), can be saved as one folder beside an export, and comes back from it without the card.

Shapes: n texts, L tokens, C width of the embedding: that of the teacher's summary.
"""

from __future__ import annotations

import json
from collections.abc import Callable
from dataclasses import dataclass
from importlib import import_module
from pathlib import Path
from typing import Any

import torch
from safetensors import SafetensorError
from safetensors.torch import load_file, save_file
from torch import Tensor, nn

from ..config.cards import TeacherCard
from ..errors import CardError, TeacherError

__all__ = ["TextParts", "TextTower", "fill", "load_text_tower", "open_text_tower"]

KINDS: dict[str, str] = {
    "open_clip": "radio_distill.teachers.text_open_clip",
    "transformers": "radio_distill.teachers.text_transformers",
    "toy": "radio_distill.teachers.text_toy",
}
"""Kind -> module with `from_card(card)` and `restore(config, folder, state)`, both giving TextParts."""

FACTS, WEIGHTS = "text.json", "model.safetensors"


@dataclass(frozen=True)
class TextParts:
    """What a kind builds."""

    kind: str
    config: dict[str, Any]
    """The architecture as plain values, enough to build the network again."""
    net: nn.Module
    """Token ids (n, L) -> embeddings (n, C)."""
    tokenize: Callable[[list[str]], Tensor]
    save_tokenizer: Callable[[Path], object]
    """Write what `tokenize` needs into a folder."""


class TextTower:
    """Texts to vectors that are compared with a teacher's summary by cosine; frozen, fp32 until `to` says otherwise."""

    def __init__(self, parts: TextParts) -> None:
        self.parts = parts
        self.net = parts.net.eval().requires_grad_(False)
        self.device = next(self.net.parameters()).device

    def to(self, device: torch.device | str, dtype: torch.dtype | None = None) -> TextTower:
        """Move the network to `device`, its floating-point weights to `dtype`; returns self."""
        self.device = torch.device(device)
        self.net.to(device=self.device, dtype=dtype)
        return self

    @torch.no_grad()
    def encode(self, texts: list[str], *, chunk: int = 256) -> Tensor:
        """Embed texts: (n, C) fp32 on the tower's device, not normalised; at most `chunk` texts in one forward."""
        if not texts:
            raise ValueError("encode was given no texts, expected a list with at least one")
        parts = [texts[i : i + chunk] for i in range(0, len(texts), chunk)]
        return torch.cat([self.net(self.parts.tokenize(part).to(self.device)).float() for part in parts])

    def save(self, folder: Path) -> None:
        """Write text.json, model.safetensors (fp32) and the tokenizer's files into the new folder `folder`."""
        folder.mkdir(parents=True)
        facts = {"kind": self.parts.kind, "config": self.parts.config}
        (folder / FACTS).write_text(json.dumps(facts, indent=1) + "\n")
        state = {name: x.detach().float().cpu().contiguous().clone() for name, x in self.net.state_dict().items()}
        save_file(state, folder / WEIGHTS, metadata={"format": "pt"})
        self.parts.save_tokenizer(folder)


def load_text_tower(card: TeacherCard) -> TextTower:
    """The text tower of a teacher, on the CPU in fp32.

    Raises CardError for a card without `text:` or with an unknown kind or model, TeacherError when weights or tokenizer
    are not there or when the embedding is not as wide as the teacher's summary.
    """
    if card.text is None:
        raise CardError(
            f"teacher {card.name!r} has no text tower; expected a card with `text:`, such as dfn_clip, siglip2_g or toy_clip"
        )
    tower = TextTower(_module(card.text.kind, f"card {card.name!r}").from_card(card))
    width = tower.encode([""]).shape[1]
    if width != card.output.summary:
        raise TeacherError(
            f"teacher {card.name!r}: the text tower {card.text.model!r} gives {width} values and the summary has "
            f"{card.output.summary}, so they cannot be compared; correct `text` or `output` of the card"
        )
    return tower


def open_text_tower(folder: str | Path) -> TextTower:
    """The text tower that `TextTower.save` wrote (an export's `text_towers/NAME`). Raises TeacherError."""
    path = Path(folder)
    try:
        facts = json.loads((path / FACTS).read_text())
        state = load_file(path / WEIGHTS)
    except (OSError, json.JSONDecodeError, SafetensorError) as error:
        raise TeacherError(
            f"{path} holds no text tower ({error}); expected {FACTS}, {WEIGHTS} and a tokenizer, as `radio-distill export "
            "--text-towers` writes them"
        ) from error
    return TextTower(_module(facts["kind"], str(path)).restore(facts["config"], path, state))


def fill(what: str, net: nn.Module, state: dict[str, Tensor]) -> nn.Module:
    """Copy `state` into `net`, every name; raises TeacherError that begins with `what`."""
    try:
        net.load_state_dict(state)
    except RuntimeError as error:
        faults = "; ".join(line.strip() for line in str(error).splitlines()[1:4])
        raise TeacherError(f"{what}: the weights are not those of this text tower: {faults}") from error
    return net


def _module(kind: str, where: str) -> Any:
    if kind not in KINDS:
        raise CardError(f"{where}: unknown kind {kind!r} of text tower, expected one of {', '.join(KINDS)}")
    return import_module(KINDS[kind])

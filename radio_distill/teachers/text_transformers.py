"""Text towers of transformers: CLIP, SigLIP and SigLIP 2, from a folder or hub repository that holds the whole model."""

from __future__ import annotations

from pathlib import Path
from typing import Any

from torch import Tensor, nn

from ..config.cards import TeacherCard
from ..errors import CardError, TeacherError
from .text import TextParts, fill
from .tokens import construct
from .weights import read, resolve

__all__ = ["build", "from_card", "restore"]

CLASSES = {"clip": "CLIPTextModelWithProjection", "siglip": "SiglipTextModel", "siglip2": "Siglip2TextModel"}
"""Type of the whole model -> class of its text side."""


def from_card(card: TeacherCard) -> TextParts:
    """The text side of the folder or hub repository that `text.model` of the card names."""
    from transformers import AutoConfig, AutoTokenizer

    assert card.text is not None
    revision = card.revision if card.text.model == card.source else None
    card = card.model_copy(update={"source": card.text.model, "revision": revision})
    place = str(resolve(card))
    what = f"text tower of {card.name!r} ({place})"
    try:
        whole = AutoConfig.from_pretrained(place, revision=revision)
        kind = _kind(what, whole.model_type)
        tokenizer = AutoTokenizer.from_pretrained(place, revision=revision)
    except (OSError, ValueError) as error:
        raise TeacherError(
            f"{what}: {str(error).splitlines()[0]}; `text.model` of the card takes a folder with config.json, weights and "
            "tokenizer, or a hub id, which is downloaded where HF_HUB_OFFLINE is not set"
        ) from error
    state = read(card, prefix=("text_model.", "text_projection."))
    if kind != "clip":
        state = {name.removeprefix("text_model."): x for name, x in state.items()}
    state = {name: x for name, x in state.items() if not name.endswith("position_ids")}  # a buffer in old files
    return _parts(kind, whole.text_config.to_dict(), _filled(what, kind, whole.text_config.to_dict(), state), tokenizer)


def restore(config: dict[str, Any], folder: Path, state: dict[str, Tensor]) -> TextParts:
    """The tower that was saved in `folder`."""
    from transformers import AutoTokenizer

    kind = config["model_type"].partition("_")[0]
    net = _filled(str(folder), kind, config, {name.removeprefix("model."): x for name, x in state.items()})
    return _parts(kind, config, net, AutoTokenizer.from_pretrained(folder))


def build(kind: str, config: dict[str, Any]) -> Any:
    """The class of transformers for a text configuration, with random weights."""
    import transformers

    cls = getattr(transformers, CLASSES[kind])
    return cls(cls.config_class(**config))


def _filled(what: str, kind: str, config: dict[str, Any], state: dict[str, Tensor]) -> nn.Module:
    with construct("pretrained"):
        net = build(kind, config)
    return fill(what, net, state)


def _kind(what: str, model_type: str) -> str:
    kind = model_type.partition("_")[0]
    if kind not in CLASSES:
        raise CardError(f"{what} is a {model_type!r}, expected a model of type {', '.join(CLASSES)}")
    return kind


def _parts(kind: str, config: dict[str, Any], model: nn.Module, tokenizer: Any) -> TextParts:
    length = config["max_position_embeddings"]

    def tokenize(texts: list[str]) -> Tensor:
        cleaned = texts if kind == "clip" else [_canonical(text) for text in texts]
        return tokenizer(cleaned, padding="max_length", max_length=length, truncation=True, return_tensors="pt").input_ids

    return TextParts("transformers", config, Embedding(model), tokenize, tokenizer.save_pretrained)


def _canonical(text: str) -> str:
    """SigLIP was trained on lower-case text without punctuation; not every tokenizer of it does that by itself."""
    from open_clip.tokenizer import get_clean_fn

    return get_clean_fn("canonicalize")(text)


class Embedding(nn.Module):
    """Token ids to the projected embedding. No mask: CLIP is causal, and SigLIP was trained to see its padding."""

    def __init__(self, model: Any) -> None:
        super().__init__()
        self.model = model

    def forward(self, tokens_nL: Tensor) -> Tensor:
        out = self.model(input_ids=tokens_nL)
        return out.text_embeds if hasattr(out, "text_embeds") else out.pooler_output

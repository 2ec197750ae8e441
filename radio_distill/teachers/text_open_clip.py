"""Text towers of open_clip: of the same file or repository that the image teacher comes from.

CLIP's tokenizer comes with open_clip; SigLIP's lies in the folder of the weights, or on the hub under open_clip's name.
"""

from __future__ import annotations

from pathlib import Path
from typing import Any

from torch import Tensor, nn

from ..config.cards import TeacherCard
from ..errors import CardError, TeacherError
from .open_clip import FILES
from .text import TextParts, fill
from .tokens import construct
from .weights import read, resolve

__all__ = ["build", "from_card", "restore", "tower_config"]

TOKENIZER_FILES = ("tokenizer.json", "tokenizer_config.json", "spiece.model")
TOP_LEVEL = ("positional_embedding", "token_embedding.", "transformer.", "ln_final.", "text_projection")
"""Names of the tower in files of a model that does not put it under `text.`"""


def from_card(card: TeacherCard) -> TextParts:
    """The text side of the open_clip model that `text.model` of the card names, with the weights of `text.pretrained`'s
    hub repository where the card's own source is not an open_clip model."""
    config = tower_config(card)
    card = _weights_card(card)
    state = read(card, FILES, prefix=("text.", *TOP_LEVEL))
    if any(name.startswith("text.") for name in state):
        state = {name.removeprefix("text."): x for name, x in state.items() if name.startswith("text.")}
    what = f"text tower of {card.name!r} ({card.source})"
    if "token_embedding.weight" not in state:
        raise TeacherError(f"{what}: the file holds no text encoder; use the file of the whole open_clip model as `source`")
    state.pop("attn_mask", None)  # old files hold it as a buffer
    return _parts(what, config, state, _tokenizer_place(card, config))


def restore(config: dict[str, Any], folder: Path, state: dict[str, Tensor]) -> TextParts:
    """The tower that was saved in `folder`."""
    return _parts(str(folder), config, state, str(folder))


def tower_config(card: TeacherCard) -> dict[str, Any]:
    """What of open_clip's configuration makes the text tower. Raises CardError for a name that open_clip does not know."""
    import open_clip

    assert card.text is not None
    config = open_clip.get_model_config(card.text.model)
    if config is None:
        raise CardError(f"card {card.name!r}: open_clip has no model {card.text.model!r}; see open_clip.list_models()")
    if config["text_cfg"].get("hf_model_name"):
        raise CardError(
            f"card {card.name!r}: the text encoder of {card.text.model!r} is a model of transformers; expected one of open_clip's own"
        )
    text = {**config["text_cfg"], "output_tokens": False}
    return {"embed_dim": config["embed_dim"], "quick_gelu": config.get("quick_gelu", False), "text_cfg": text}


def build(config: dict[str, Any]) -> nn.Module:
    """The network, token ids (n, L) to embeddings (n, C); random where the caller's context does not say otherwise."""
    from open_clip.model import _build_text_tower  # the public constructors build the image tower too

    return _build_text_tower(config["embed_dim"], config["text_cfg"], quick_gelu=config["quick_gelu"])


def _weights_card(card: TeacherCard) -> TeacherCard:
    """The card whose source is the whole open_clip model: the teacher's own, or one made of `text.pretrained`."""
    assert card.text is not None
    if card.family == "open_clip":
        return card
    from open_clip.pretrained import get_pretrained_cfg

    tag = card.text.pretrained
    known = get_pretrained_cfg(card.text.model, tag) if tag else None
    source = known.get("hf_hub", "").rstrip("/") if known else tag
    if not source:
        raise CardError(
            f"card {card.name!r}: `text.pretrained` is {tag!r}, expected a tag that open_clip has on the hub for "
            f"{card.text.model}, or a path of the whole open_clip model"
        )
    return card.model_copy(update={"source": source, "revision": None})


def _tokenizer_place(card: TeacherCard, config: dict[str, Any]) -> str:
    """Folder or hub id of the tokenizer; unused for towers whose tokenizer comes with open_clip."""
    source = resolve(card)
    if isinstance(source, Path):
        folder = source.parent if source.is_file() else source
        if any((folder / name).is_file() for name in TOKENIZER_FILES):
            return str(folder)
    return str(config["text_cfg"].get("hf_tokenizer_name") or "")


def _parts(what: str, config: dict[str, Any], state: dict[str, Tensor], tokenizer_place: str) -> TextParts:
    tokenizer = _tokenizer(what, config["text_cfg"], tokenizer_place)
    with construct("pretrained"):
        net = build(config)
    fill(what, net, state)
    save = getattr(tokenizer, "save_pretrained", lambda folder: None)
    return TextParts("open_clip", config, net, tokenizer, save)


def _tokenizer(what: str, text: dict[str, Any], place: str) -> Any:
    from open_clip.tokenizer import HFTokenizer, SimpleTokenizer

    length, options = text.get("context_length", 77), text.get("tokenizer_kwargs") or {}
    if not text.get("hf_tokenizer_name"):
        return SimpleTokenizer(context_length=length, **options)
    try:
        return HFTokenizer(place, context_length=length, tokenizer_mode=text.get("tokenizer_mode"), **options)
    except (OSError, ValueError) as error:
        raise TeacherError(
            f"{what}: no tokenizer in {place} ({str(error).splitlines()[0]}); put {TOKENIZER_FILES[0]} and "
            f"{TOKENIZER_FILES[1]} beside the weights, or unset HF_HUB_OFFLINE to download them"
        ) from error

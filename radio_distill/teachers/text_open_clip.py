"""Text towers of open_clip: of the same file or repository that the image teacher comes from.

CLIP's tokenizer comes with open_clip; SigLIP's lies in the folder of the weights, or on the hub under open_clip's name.
"""

from __future__ import annotations

from pathlib import Path
from typing import Any

from ..config.cards import TeacherCard
from ..errors import CardError, TeacherError
from .open_clip import FILES
from .text import fill
from .text_tower import TextTower, build, make_tokenizer
from .tokens import construct
from .weights import read, resolve

__all__ = ["from_card", "tower_config", "weights_card"]

TOKENIZER_FILES = ("tokenizer.json", "tokenizer_config.json", "spiece.model")
TOP_LEVEL = ("positional_embedding", "token_embedding.", "transformer.", "ln_final.", "text_projection")
"""Names of the tower in files of a model that does not put it under `text.`"""


def from_card(card: TeacherCard) -> TextTower:
    """The text side of the open_clip model that `text.model` of the card names, with the weights of `text.pretrained`'s
    hub repository where the card's own source is not an open_clip model."""
    config = tower_config(card)
    card = weights_card(card)
    state = read(card, FILES, prefix=("text.", *TOP_LEVEL))
    if any(name.startswith("text.") for name in state):
        state = {name.removeprefix("text."): x for name, x in state.items() if name.startswith("text.")}
    what = f"text tower of {card.name!r} ({card.source})"
    if "token_embedding.weight" not in state:
        raise TeacherError(f"{what}: the file holds no text encoder; use the file of the whole open_clip model as `source`")
    state.pop("attn_mask", None)  # old files hold it as a buffer
    with construct("pretrained"):
        net = build("open_clip", config)
    fill(what, net, state)
    place = _tokenizer_place(card, config)
    try:
        return TextTower("open_clip", config, net, make_tokenizer("open_clip", config, place, net))
    except (OSError, ValueError) as error:
        raise TeacherError(
            f"{what}: no tokenizer in {place} ({str(error).splitlines()[0]}); put {TOKENIZER_FILES[0]} and "
            f"{TOKENIZER_FILES[1]} beside the weights, or unset HF_HUB_OFFLINE to download them"
        ) from error


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


def weights_card(card: TeacherCard) -> TeacherCard:
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

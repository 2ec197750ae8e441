"""Text towers of transformers: CLIP, SigLIP and SigLIP 2, from a folder or hub repository that holds the whole model."""

from __future__ import annotations

from ..config.cards import TeacherCard
from ..errors import CardError, RadioDistillError, TeacherError
from ..hub import Repository
from .text import fill
from .text_tower import TEXT_CLASSES, TextTower, build, make_tokenizer
from .tokens import construct
from .weights import read, resolve

__all__ = ["from_card", "weights_card"]


def from_card(card: TeacherCard) -> TextTower:
    """The text side of the folder or hub repository that `text.model` of the card names."""
    from transformers import AutoConfig

    card = weights_card(card)
    source, revision = resolve(card), card.revision
    place = str(source)
    what = f"text tower of {card.name!r} ({place})"
    try:
        if isinstance(source, str):
            Repository(source, revision).need("config.json")
        whole = AutoConfig.from_pretrained(place, revision=revision)
        if whole.model_type not in TEXT_CLASSES:
            raise CardError(f"{what} is a {whole.model_type!r}, expected a model of type {', '.join(TEXT_CLASSES)}")
        config = whole.text_config.to_dict()
        with construct("pretrained"):
            net = build("transformers", config)
        tokenizer = make_tokenizer("transformers", config, place, net)
    except CardError:
        raise
    except (OSError, ValueError, RadioDistillError) as error:
        raise TeacherError(
            f"{what}: {str(error).splitlines()[0]}; `text.model` of the card takes a folder with config.json, weights and "
            "tokenizer, or a hub id, which is downloaded where HF_HUB_OFFLINE is not set"
        ) from error
    state = read(card, prefix=("text_model.", "text_projection."))
    if whole.model_type != "clip":
        state = {name.removeprefix("text_model."): x for name, x in state.items()}
    # position_ids: a buffer in old files
    fill(what, net, {f"model.{name}": x for name, x in state.items() if not name.endswith("position_ids")})
    return TextTower("transformers", config, net, tokenizer)


def weights_card(card: TeacherCard) -> TeacherCard:
    """The card whose source is the folder or repository of the text tower."""
    assert card.text is not None
    revision = card.revision if card.text.model == card.source else None
    return card.model_copy(update={"source": card.text.model, "revision": revision, "family": "transformers", "loader": None})

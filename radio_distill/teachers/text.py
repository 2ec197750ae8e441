"""The text tower that belongs to a teacher's summary: for zero-shot classification and retrieval, never for training.

A tower comes from the teacher's card (local weights, or the hub where the card names a hub id and HF_HUB_OFFLINE is not
set), or from the folder that an export keeps beside its adaptors. Its kinds:

- open_clip: of the same file or repository that the image teacher comes from. CLIP's tokenizer comes with open_clip; SigLIP's
  lies in the folder of the weights, or on the hub under open_clip's name.
- transformers: CLIP, SigLIP and SigLIP 2, from a folder or hub repository that holds the whole model.
- classifier, in place of a text tower: a text stands for the class that it names, as the row of the classifier's matrix. Classes
  that share a name (`missile` and `sunglasses` twice among ImageNet's) are one vector, the mean of their rows. Zero-shot tasks
  then compare summaries with these rows by cosine, without the classifier's bias.
- toy: beside the toy teacher (toy.py).
"""

from __future__ import annotations

import json
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Any

import torch
from safetensors import SafetensorError
from torch import Tensor, nn

from ..config.cards import TeacherCard
from ..errors import CardError, RadioDistillError, TeacherError
from ..files import digest_of
from ..fingerprint import weights_digest
from ..hub import Repository
from . import text_tower, toy
from .open_clip import FILES
from .text_tower import TEXT_CLASSES, TextTower, build, canonicalize, make_tokenizer
from .tokens import construct
from .weights import read, resolve

__all__ = ["load_text_tower", "open_text_tower", "tower_config", "tower_digest"]

TOKENIZER_FILES = ("tokenizer.json", "tokenizer_config.json", "spiece.model")
TOP_LEVEL = ("positional_embedding", "token_embedding.", "transformer.", "ln_final.", "text_projection")
"""Names of the tower in files of a model that does not put it under `text.`"""


def load_text_tower(card: TeacherCard) -> TextTower:
    """The text tower of a teacher, on the CPU in fp32; `encode(texts)` gives (n, C), not normalised.

    Raises CardError for a card without `text:` or with an unknown kind or model, TeacherError when weights or tokenizer
    are not there or when the embedding is not as wide as the teacher's summary.
    """
    if card.text is None:
        raise CardError(
            f"teacher {card.name!r} has no text tower; expected a card with `text:`, such as dfn_clip, siglip2_g or toy_clip"
        )
    target = KINDS.get(card.text.kind)
    if target is None:
        raise CardError(
            f"card {card.name!r}: unknown kind {card.text.kind!r} of text tower, expected one of {', '.join(KINDS)}"
        )
    tower = target(card)
    width = tower.encode([tower.example]).shape[1]
    if width != card.output.summary:
        raise TeacherError(
            f"teacher {card.name!r}: the text tower {card.text.model!r} gives {width} values and the summary has "
            f"{card.output.summary}, so they cannot be compared; correct `text` or `output` of the card"
        )
    return tower


def tower_digest(card: TeacherCard) -> str:
    """What the vectors of a card's text tower depend on, as one short word: the card's `text` and the content of the weights.

    Raises CardError as `load_text_tower`, where the card does not say where the tower lies.
    """
    if card.text is None:
        return "none"  # `load_text_tower` says so
    holder = HOLDERS[card.text.kind](card) if card.text.kind in HOLDERS else card
    return digest_of([card.text.model_dump(mode="json"), weights_digest(holder) or [holder.source, holder.revision]])[:12]


def open_text_tower(folder: str | Path) -> TextTower:
    """The text tower in a folder: an export's `text_towers/NAME`, or what `TextTower.save` wrote. Raises TeacherError."""
    try:
        with construct("pretrained"):
            return text_tower.open_text_tower(folder)
    except (OSError, RuntimeError, json.JSONDecodeError, SafetensorError) as error:
        raise TeacherError(
            f"{folder} holds no text tower ({str(error).splitlines()[0]}); expected {text_tower.FACTS}, {text_tower.WEIGHTS} "
            "and a tokenizer, as `radio-distill export --text-towers` writes them"
        ) from error


def _of_open_clip(card: TeacherCard) -> TextTower:
    """The text side of the open_clip model that `text.model` of the card names, with the weights of `text.pretrained`'s
    hub repository where the card's own source is not an open_clip model."""
    config = tower_config(card)
    card = _open_clip_card(card)
    state = read(card, FILES, prefix=("text.", *TOP_LEVEL))
    if any(name.startswith("text.") for name in state):
        state = {name.removeprefix("text."): x for name, x in state.items() if name.startswith("text.")}
    what = f"text tower of {card.name!r} ({card.source})"
    if "token_embedding.weight" not in state:
        raise TeacherError(f"{what}: the file holds no text encoder; use the file of the whole open_clip model as `source`")
    state.pop("attn_mask", None)  # old files hold it as a buffer
    with construct("pretrained"):
        net = build("open_clip", config)
    _fill(what, net, state)
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


def _open_clip_card(card: TeacherCard) -> TeacherCard:
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


def _of_transformers(card: TeacherCard) -> TextTower:
    """The text side of the folder or hub repository that `text.model` of the card names."""
    from transformers import AutoConfig

    card = _transformers_card(card)
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
    _fill(what, net, {f"model.{name}": x for name, x in state.items() if not name.endswith("position_ids")})
    return TextTower("transformers", config, net, tokenizer)


def _transformers_card(card: TeacherCard) -> TeacherCard:
    """The card whose source is the folder or repository of the text tower."""
    assert card.text is not None
    revision = card.revision if card.text.model == card.source else None
    return card.model_copy(update={"source": card.text.model, "revision": revision, "family": "transformers", "loader": None})


def _of_classifier(card: TeacherCard) -> TextTower:
    """The rows of the tensor `text.model` in the card's source. Raises CardError when it is not there or its rows are not the classes."""
    from open_clip import IMAGENET_CLASSNAMES

    assert card.text is not None
    state, name, classes = read(card), card.text.model, card.text.classes or tuple(IMAGENET_CLASSNAMES)
    if name not in state or state[name].ndim != 2:
        matrices = [key for key, x in state.items() if x.ndim == 2]
        raise CardError(
            f"card {card.name!r}: text.model is {name!r}, expected the classifier's matrix in {card.source}: {', '.join(matrices) or 'it has none'}"
        )
    matrix = state[name]
    if len(matrix) != len(classes):
        named = "text.classes names" if card.text.classes else "without text.classes they are ImageNet's"
        raise CardError(
            f"card {card.name!r}: {name} has {len(matrix)} rows, and {named} {len(classes)}; name every row in text.classes"
        )
    config = {"classes": list(classes), "width": matrix.shape[1]}
    net = build("classifier", config)
    _fill(f"classifier of {card.name!r} ({card.source})", net, {"weight": _of_one_name_together(matrix.float(), classes)})
    try:
        return TextTower("classifier", config, net, make_tokenizer("classifier", config, "", net))
    except ValueError as error:
        raise CardError(f"card {card.name!r}: text.classes: {error}") from error


def _of_one_name_together(matrix_NC: Tensor, classes: Sequence[str]) -> Tensor:
    names = [canonicalize(name) for name in classes]
    rows = {name: [i for i, other in enumerate(names) if other == name] for name in dict.fromkeys(names)}
    return torch.stack([matrix_NC[rows[name]].mean(0) for name in names])


def _fill(what: str, net: nn.Module, state: dict[str, Tensor]) -> None:
    """Copy `state` into `net`, every name; raises TeacherError that begins with `what`."""
    try:
        net.load_state_dict(state)
    except RuntimeError as error:
        faults = "; ".join(line.strip() for line in str(error).splitlines()[1:4])
        raise TeacherError(f"{what}: the weights are not those of this text tower: {faults}") from error


KINDS: dict[str, Callable[[TeacherCard], TextTower]] = {
    "open_clip": _of_open_clip,
    "transformers": _of_transformers,
    "toy": toy.text_tower_of,
    "classifier": _of_classifier,
}
HOLDERS: dict[str, Callable[[TeacherCard], TeacherCard]] = {"open_clip": _open_clip_card, "transformers": _transformers_card}
"""Kind -> what makes of a card the one whose source holds the tower; others lie in the teacher's own file."""
